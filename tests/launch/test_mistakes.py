"""What people type wrong, bring along or forget: each mistake is answered with one line that says what to do.

Commands run in this process: all of these are refused before any rank is started.
"""

from __future__ import annotations

import io
import json
import re
import socket
import struct
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import roots

from roots_dist import environment
from roots_dist.cli.main import app, main
from roots_dist.cli.terminal import progress_bar
from roots_dist.config.load import load
from roots_dist.config.schema import Config
from roots_dist.config.text import parse_file
from roots_dist.environment import LAUNCHERS
from roots_dist.errors import EnvironmentProblem
from roots_dist.learning.data.prepare import InputProgress
from roots_dist.runs.ranks.rendezvous import rendezvous

CONFIG = """\
model: {layers: 2, hidden: 32, heads: 4, vocab: 300}
data: {train: corpus, seq_length: 16}
train: {device: cpu, steps: 2, global_batch: 4}
track: {folder: runs/mine}
"""
TYPED = {
    "a misspelt command": ("trian a.yaml", "Did you mean 'train'? Fix: write roots train a.yaml."),
    "the beginning of a command": ("gen runs/there hi", "Fix: write roots generate runs/there hi."),
    "a command of another program": ("tokenize 'my text.jsonl'", "Fix: write roots prepare 'my text.jsonl'."),
    "a percentage of the run": ("train a.yaml train.steps=50 optim.warmup_steps=10%", "write optim.warmup_steps=5, "),
    "a switch that is misspelt": (
        "train a.yaml parallel.sequence_parallel=yess",
        "write parallel.sequence_parallel=true",
    ),
    "a time with its unit": ("launch a.yaml --on slurm --time 2h --dry-run", "Fix: write --time 02:00:00."),
    "an axis by its whole name": ("train a.yaml parallel.tensor=2", "Fix: it is called parallel.tp here."),
    "a folder to resume": ("train a.yaml --resume runs/there", "write track.folder=runs/there: a run goes on from the"),
    "an option that is too long": ("verify a.yaml --exactly", "Fix: write --exact."),
    "no command": ("a.yaml", "write roots train a.yaml"),
    "help without dashes": ("help", "write roots --help"),
    "help about a command": ("help train", "Fix: write roots train --help."),
    "no config": ("train", "Missing argument 'CONFIG'. Fix: write it as roots train configs/quickstart.yaml parallel."),
    "no folder to write to": ("export runs/there", "write it as roots export runs/quickstart exports/quickstart, say;"),
    "an output that is missing": ("prepare a.docx", "Fix: add --output, as in roots prepare books/*.jsonl.gz"),
    "a number below its bound": (
        "generate runs/there x --temperature -1",
        "--temperature = -1: expected at least 0. Fix: give --temperature at least 0.",
    ),
    "no text": ("train a.yaml track.folder=", "Fix: write track.folder=TEXT ("),
    "an example of two lines": ("prepare", "books/*.jsonl.gz --text-key body --output data/books"),
    "a unit of memory": ("plan a.yaml --gpu-memory 80GB", "Fix: write --gpu-memory 80."),
    "a misspelt option": ("train a.yaml --proceses 4", "--processes"),
    "a dash of a word processor": ("train a.yaml —processes=4", "write "),
    "words for a number": ("train a.yaml --processes four", "--processes"),
    "a count beyond 32 bits": ("prepare a.docx --output out --min-count 99999999999999999999", "--min-count"),
    "a number of processes that no world has": ("plan a.yaml --processes 1000000000000", "--processes"),
    "no number of processes": ("train a.yaml --processes 0", "--processes"),
    "a unit for an option": (
        "prepare a.docx --output out --vocab 16k",
        "--vocab = 16k: expected a whole number. Fix: write --vocab 16000.",
    ),
    "an option beyond its bound": (
        "plan a.yaml --processes 0",
        "--processes = 0: expected at least 1. Fix: give --processes at least 1.",
    ),
    "a flag that is misspelt": ("plan a.yaml --mesure", "Fix: write --measure."),
    "an option with an underscore": ("generate runs/there x --max_tokens 5", "Fix: write --max-tokens 5."),
    "the beginning of an option": ("generate runs/there x --temp 0.5", "Fix: write --temperature 0.5."),
    "an option that is also a key's end": ("sample a.yaml --steps 3", "Fix: write --step 3."),
    "a comma for a point": ("train a.yaml optim.lr=0,002", "Fix: write optim.lr=0.002"),
    "a key as an option": ("train a.yaml --train.steps 5", "Fix: write train.steps=5."),
    "a key as an option, with =": ("train a.yaml --train.steps=5", "Fix: write train.steps=5."),
    "a key and its value": ("train a.yaml train.steps 5", "Fix: write train.steps=5."),
    "spaces around =": ("train a.yaml train.steps = 5", "Fix: write train.steps=5."),
    "a colon": ("train a.yaml train.steps:5", "Fix: write train.steps=5."),
    "a full-width =": ("train a.yaml train.steps＝5", "Fix: write train.steps=5."),
    "a key without its section": ("train a.yaml steps=5", "Fix: write train.steps=5."),
    "a misspelt key": ("train a.yaml optim.lrr=1", "Fix: did you mean optim.lr."),
    "a key of Hugging Face": ("train a.yaml optim.learning_rate=1", "Fix: it is called optim.lr here."),
    "an option of Megatron-LM": ("train a.yaml --tensor-model-parallel-size 2", "Fix: write parallel.tp=2."),
    "a key of DeepSpeed without its section": ("train a.yaml gradient_clipping=1", "Fix: write optim.clip_grad=1."),
    "a key that is called otherwise now": ("train a.yaml train.batch=4", "it is called train.global_batch now"),
    "no value": ("train a.yaml train.steps=", "train.steps = None (command line): expected a whole number"),
    "a word for a number": ("train a.yaml train.steps=many", "expected a whole number"),
    "a word that is no choice": ("train a.yaml train.precision=fp16", "choose one of 'fp32' or 'bf16'"),
    "a word beside true and false": (
        "train a.yaml train.compile=sometimes",
        "Fix: choose one of 'auto', true or false.",
    ),
    "a value for a list": (
        "train a.yaml model.layer_kinds=window",
        "Fix: write model.layer_kinds=[window] (",
    ),
    "a section for a key": ("train a.yaml model={}", "Fix: write model.family=VALUE."),
    "nothing for a section": ("train a.yaml model=null", "Fix: write model.family=VALUE."),
    "a value for a section": ("train a.yaml train=5", "train = '5' (command line): expected an override of one key"),
    "keys of a section": ("train a.yaml 'parallel={tp: 2, zero_stage: 1}'", "parallel.tp=2 parallel.zero_stage=1."),
    "an escape character": ("train a.yaml track.name=a\x1bb", "but character 2 is U+001B. Fix: remove it"),
    "a deletion": ("train a.yaml track.name=a\x7fb", "but character 2 is U+007F. Fix: remove it"),
    "bytes that are no text": ("train a.yaml track.name=a\udc80", "but character 2 is U+DC80. Fix: remove it"),
    "a zero in a path": ("train a.yaml 'track.folder=\"a\\0b\"'", "U+0000, which is in no path. Fix: remove"),
    "half a character": ("train a.yaml 'track.name=\"\\ud800\"'", "U+D800, which is in no path. Fix: remove"),
    "a leading zero": ("train a.yaml train.steps=010", "010 is 8 in base 8). Fix: write it without the leading 0"),
    "a time": ("train a.yaml train.log_every=12:30", "12:30 is 750 in base 60). Fix: write one number"),
    "overrides before the config": ("train train.steps=5 a.yaml", "Fix: name the config before the overrides."),
    "a misspelt schedule": ("schedule 1f2b --ranks 2 --microbatches 2", "Fix: choose one of them"),
    "a misspelt launcher": ("launch a.yaml --on slrum", "Fix: choose one of them"),
    "a missing output": ("prepare a.txt", "Missing option '--output'"),
    "a number with a unit": ("train a.yaml data.seq_length=4k", "Fix: write data.seq_length=4000 ("),
    "a number with commas": ("train a.yaml train.steps=1,000", "Fix: write train.steps=1000 ("),
    "a decimal comma": ("train a.yaml optim.lr=3,5e-4", "Fix: write optim.lr=0.00035 ("),
    "a decimal comma before an exponent": ("train a.yaml optim.lr=2,e-3", "Fix: write optim.lr=0.002 ("),
    "nodes that do not share a replica": (
        "launch a.yaml --on slurm --nodes 3 parallel.tp=2 --dry-run",
        "cannot be shared out among 3 nodes. Fix: add --processes-per-node 2, say, for 6 processes.",
    ),
    "a percentage": ("train a.yaml optim.lr=10%", "Fix: write optim.lr=0.1 ("),
    "a whole number as a float": ("train a.yaml train.steps=1e3", "Fix: write train.steps=1000 ("),
    "full-width digits": ("train a.yaml train.steps=５０", "Fix: write train.steps=50 ("),
    "a unit of time": (
        "train a.yaml advanced.timeout_s=10m",
        "a whole number. Fix: write advanced.timeout_s=600, its",
    ),
    "half of a number": (
        "train a.yaml train.steps=2.5",
        "expected a whole number. Fix: write train.steps=100, its",
    ),
    "the number of data ranks": ("train a.yaml parallel.dp=2", "leave it out: the number of data ranks is that of the"),
    "the number of data ranks alone": ("train a.yaml dp=2", "leave it out: the number of data ranks is that of the"),
    "a key in capitals": ("train a.yaml TRAIN.STEPS=5", "did you mean train.steps"),
    "a key of vLLM": ("train a.yaml parallel.tensor_parallel_size=2", "it is called parallel.tp here"),
    "options that are a key, with one dash": ("train a.yaml -tp 2", "Fix: write parallel.tp=2."),
    "a key as an option without its value": (
        "train a.yaml --recompute",
        "write train.recompute=VALUE, where VALUE is 'none', 'selective' or 'full'.",
    ),
    "a misspelt key as an option": ("train a.yaml --recompue full", "Fix: write train.recompute=full."),
    "a misspelt option without likeness to a key": ("prepare a.txt --output o --vocob 5", "Fix: write --vocab 5."),
    "a key as an option of another command": ("prepare a.txt --output o --seq-length 5", "see roots prepare --help"),
    "two keys in one word": ("train a.yaml tp=2,parallel.pp=2", "Fix: write parallel.tp=2 parallel.pp=2."),
    "items without brackets": ("train a.yaml train.batch_ramp=2,2,4", "Fix: write train.batch_ramp=[2,2,4] ("),
    "betas without brackets": ("train a.yaml optim.betas=0.9,0.95", "write optim.beta1=0.9 optim.beta2=0.95."),
    "a switch for a section": ("train a.yaml train.exact=true", "as train.exact={{tensor: 1, data: 1, context: 1}} ("),
    "an option of another program": ("train a.yaml --dry-run", "Fix: write --print-config."),
    "another program's option of another command": ("finetune a.yaml --dry-run", "Fix: write --print-config."),
    "an option of transformers": ("generate runs/there x --max_new_tokens 5", "Fix: write --max-tokens 5."),
    "a folder of checkpoints": ("train a.yaml checkpoint.dir=out", "Fix: it is called track.folder here."),
    "an option that is a key": ("train a.yaml --tp=2", "Fix: write parallel.tp=2."),
    "an option of Hugging Face": (
        "train a.yaml --warmup_ratio 0.1",
        "Fix: write optim.warmup_steps=N, where N is warmup_ratio × train.steps.",
    ),
    "a switch of Hugging Face": ("train a.yaml --bf16", "Fix: write train.precision=bf16."),
    "an option that follows": ("train a.yaml --gradient-accumulation-steps=4", "Fix: leave it out: it follows from"),
    "an option with a value that its key refuses": (
        "train a.yaml --num-layers 0",
        "Fix: give model.layers a whole number greater than or equal to 1",
    ),
    "a value that its key refuses": ("train a.yaml model.layers 0", "Fix: give model.layers a whole number greater"),
    "an option of torchrun": ("train a.yaml --nproc_per_node 4", "Fix: write --processes 4."),
    "an option of mpirun": ("train a.yaml -n 4", "Fix: write --processes 4."),
    "an option for the config": ("train --config a.yaml", "Fix: write roots train a.yaml."),
    "a value on its own": ("train a.yaml 4", "Fix: write a key of the config, as optim.lr=1e-3."),
    "a prompt without quotes": (
        "generate runs/there Hello my world",
        "quotes: roots generate runs/there 'Hello my world'",
    ),
    "the end of a line of Windows": ("train 'a.yaml\r'", "Fix: type it again as a.yaml; or convert the script"),
    "the end of a line behind a value": ("train a.yaml 'train.steps=5\r'", "without U+000D at one of its ends"),
    "a space of a web page": ("train a.yaml train.steps=5\u00a0", "without U+00A0 at one of its ends"),
    "a mark that nobody sees": (
        "train \ufeffa.yaml",
        "without U+FEFF at one of its ends. Fix: type it",
    ),
}
PATHS = {
    "a config that is not there": (
        "train b.yaml",
        "b.yaml in {here}, the working directory. Fix: name one of the files there: a.yaml, crlf.yaml",
    ),
    "a misspelt config": ("train crfl.yaml", "Fix: did you mean crlf.yaml."),
    "a folder for a config": ("train sub", "Fix: name one of the files there: c.yaml."),
    "a run for a config": ("train runs/there", "Fix: the config of this run is runs/there/config.yaml."),
    "a config for a run": ("generate a.yaml hello", "Fix: name the folder that its run is in, runs/mine."),
    "a run beside a config": ("evaluate runs/hi/there", "Fix: did you mean runs/there."),
    "a run of another name": (
        "evaluate runs/hi",
        "runs/hi in {here}, the working directory. Fix: name a run, as runs/there",
    ),
    "a misspelt run": ("evaluate runs/thre", "Fix: did you mean runs/there."),
    "a folder before the run": ("export out runs/there", "Fix: write roots export runs/there out."),
    "no run": ("export zzz out", "there is no zzz in {here}, the working directory. Fix: name a run, as runs/there"),
    "the folder of runs": (
        "evaluate runs",
        "runs is not the folder of a run: it holds no config.yaml. Fix: name a run, as",
    ),
    "a checkpoint of a run": ("evaluate runs/there/checkpoints", "Fix: name the run that it is in, runs/there."),
    "a corpus that is not there": ("train a.yaml data.train=corpse", "corpse.idx in {here}, the working directory"),
    "a config of another folder": ("train sub/c.yaml", "relative to the working directory, not to the config"),
    "the folder of a corpus": ("train a.yaml data.train=data/mine", "did you mean data/mine/train_text_document"),
    "the folder of a held-out corpus": (
        "train a.yaml data.validation=data/mine/",
        "did you mean data/mine/validation_text_document",
    ),
    "the beginning of a corpus": (
        "train a.yaml data.train=data/mine/train",
        "did you mean data/mine/train_text_document",
    ),
    "corpora without brackets": ("train a.yaml data.train=a,b", "write a list, data.train=[a, b]"),
    "the folder of a tokenizer": ("train a.yaml data.tokenizer=data/mine", "did you mean data/mine/tokenizer.json"),
    "a config on the web": ("train https://host/a.yaml", "download it first, and give the path"),
    "a path of Windows": ("train 'sub\\c.yaml'", "did you mean sub/c.yaml"),
    "a link to nowhere": ("train link.yaml", "the file is a link to nowhere, where there is none"),
    "a corpus with its ending": ("train a.yaml data.train=corpus.bin", "give the path without .bin or .idx"),
    "a text for a corpus": (
        "train a.yaml 'data.train=my text.jsonl'",
        "roots prepare 'my text.jsonl' --output data/mine`, and set data.train=data/mine/train_text_document",
    ),
    "a text that is not there for a corpus": (
        "train a.yaml data.train=gone.txt",
        "check its path, then prepare it with `roots prepare gone.txt --output data/mine`",
    ),
    "a page for a config": ("train notes.md", "Fix: name a YAML file, such as those in configs/."),
    "rows that a config says how to make": ("finetune task.yaml", "Fix: run python examples/tasks.py data/tasks."),
    "a file of runs": ("ls a.yaml", "FOLDER = 'a.yaml': expected a folder, and this is a file."),
    "a config that is none": ("train odd.json", "CONFIG = 'odd.json': expected a config, whose keys are model, "),
    "a model's own config": ("train model.json", "Fix: import this model: roots import ITS_FOLDER runs/NAME."),
    "a tokenizer by its name": (
        "train a.yaml data.tokenizer=gpt2 data.train=data/mine/train_text_document",
        "Fix: did you mean data/mine/tokenizer.json.",
    ),
    "a corpus by its name": (
        "train a.yaml data.train=wikitext",
        "`roots prepare TEXT --output data/wikitext`, and set data.train=data/wikitext/train_text_document.",
    ),
    "a text of another ending": ("prepare notes.md --output out", "copy it under such a name: cp notes.md notes.txt."),
    "a tokenizer for a corpus": (
        "train a.yaml data.train=data/mine/tokenizer.json",
        "Fix: did you mean data/mine/train_text_document",
    ),
    "a misspelt corpus": (
        "train a.yaml data.train=data/mine/train_text_documnt",
        "Fix: did you mean data/mine/train_text_document",
    ),
    "a corpus that a config says how to make": (
        "train first.yaml",
        "Fix: run roots prepare embedded:state-of-the-union --output data/sotu --vocab 4096.",
    ),
    "a corpus of a misspelt folder": (
        "train a.yaml data.train=data/mne/train_text_document",
        "Fix: did you mean data/mine/train_text_document",
    ),
    "a tilde": ("train a.yaml 'data.train=~/corpus'", "write the whole path: ~ is not replaced here"),
    "a tokenizer that is not there": ("train a.yaml data.tokenizer=t.json", "t.json in {here}, the working directory"),
    "a folder that cannot be written": (
        "train a.yaml track.folder=/proc/run/1",
        "written (/proc/run cannot be made). Fix:",
    ),
    "a folder that takes no files": ("train a.yaml track.folder=/proc", "(/proc takes no files). Fix: choose another"),
    "a folder in a file": ("train a.yaml track.folder=a.docx/run", "(a.docx is no folder). Fix: choose another"),
    "a page that is a folder": ("report runs/there --output sub", "a file that can be written (is a directory)"),
    "a page that cannot be written": (
        "report runs/there --output /proc/a.html",
        "be written (it cannot be made there). Fix:",
    ),
    "a config in a file": ("init a.docx/b.yaml --from gpt-quickstart", "CONFIG = 'a.docx/"),
    "a variable that is not set": ("prepare '' --output out", "argument 1 = '': expected a word that is not empty"),
    "an output that is not set": ("prepare a.docx --output ''", "--output = '': expected a word that is not empty"),
    "an output that is not set, with =": ("plan a.yaml --json=", "--json = '': expected a word that is not empty"),
    "a run that is not set": ("generate '' hello", "argument 1 = '': expected"),
    "a folder that is not set": ("train a.yaml track.folder=''", "expected text. Fix: write track.folder=TEXT ("),
    "an empty folder": ("train a.yaml 'track.folder=\"\"'", "track.folder = '' (command line): expected text that is"),
    "a model of a hub": ("import Qwen/Qwen3-0.6B runs/q", "Fix: download it first, hf download Qwen/Qwen3-0.6B"),
    "a text that is not there": ("prepare b.txt --output out", "Fix: check the path."),
    "a model in a folder of downloads": (
        "import downloads/qwen2 runs/q",
        "there is no folder downloads/qwen2 in {here}, the working directory. Fix: name a folder that is there, or get",
    ),
    "a model that was not downloaded": ("import downloads/qwen2 runs/q", "OWNER/NAME --local-dir downloads/qwen2."),
    "a model in a folder that is there": ("import sub/qwen2 runs/q", "hf download OWNER/NAME --local-dir sub/qwen2."),
    "a model here": ("import ./qwen2 runs/q", "hf download OWNER/NAME --local-dir qwen2."),
    "a model without an owner": ("import qwen2 runs/q", "hf download OWNER/NAME --local-dir qwen2."),
    "a misspelt model": ("import hub/qwen3 runs/q", "Fix: did you mean hub/qwen2."),
    "a file that is no text": ("prepare a.docx --output out", "expected a name ending in one of .txt"),
    "another column of text": ("prepare rows.jsonl --output out", "name it with --text-key body"),
    "a config that is there already": ("init a.yaml --from gpt-quickstart", "Fix: name another file"),
    "a name that is no config": ("init b.yaml --from zzz", "bert-quickstart, bloom-quickstart, electra-quickstart"),
    "a name that is like no config": ("init b.yaml --from zzz", "Fix: give the path of a YAML file."),
    "the beginning of a config's name": (
        "init b.yaml --from gpt",
        "such as gpt-quickstart, gpt-answers, gpt-j-6b, gpt2-large, gpt2-medium, gpt2-small, gpt2-xl. Fix: write",
    ),
    "the beginning of another one's": (
        "init b.yaml --from BERT_",
        "such as bert-quickstart, bert-base, bert-languages",
    ),
    "a part of a config's name": ("init b.yaml --from 8x7b", "write --from mixtral-8x7b"),
    "the name of quickstart.yaml in part": ("init b.yaml --from quick", "such as gpt-quickstart, bert-quickstart"),
    "a config's name with two letters turned": ("init b.yaml --from gtp", "write --from gpt-quickstart"),
    "a misspelt config to begin with": ("init b.yaml --from lama-quickstart", "write --from llama-quickstart"),
    "a path of a config that is not there": ("init b.yaml --from configs/gpt.yaml", "write --from gpt-quickstart"),
    "a tokenizer that never ends": ("train a.yaml data.tokenizer=/dev/zero", "data.tokenizer = '/dev/zero'"),
    "a config that never ends": ("train /dev/zero", "a YAML file of at most 16,777,216 characters"),
    "a profile that never ends": ("plan a.yaml --profile /dev/zero", "profile = '/dev/zero'"),
    "an extension that never ends": ("train a.yaml advanced.extensions=[/dev/zero]", "can be read (not a plain file)"),
    "a profile that is not there": ("plan a.yaml --profile p.json", "p.json in {here}, the working directory"),
    "no profile yet": (
        "plan a.yaml --profile p.json",
        "Fix: write it on the cluster with roots doctor --json p.json",
    ),
    "a tokenizer of the Hub": (
        "prepare rows.jsonl --output out --tokenizer gpt2",
        "Fix: download it, hf download gpt2 tokenizer.json --local-dir gpt2, and give gpt2/tokenizer.json.",
    ),
    "the folder of a tokenizer for a text": (
        "prepare rows.jsonl --output out --tokenizer data/mine",
        "Fix: give data/mine/tokenizer.json.",
    ),
    "the prompt before the run": ("generate 'Four score' runs/there", "Fix: roots generate runs/there 'Four score'."),
    "no store": (
        "train a.yaml checkpoint.url=there",
        "text as s3://bucket/runs/mine. Fix: write checkpoint.url",
    ),
}
YAML = {
    "a tab": ("model:\n\tlayers: 2\n", "indent with spaces: this line has a tab"),
    "no space after a colon": ("model:\n  layers:2\n", "write a space after the colon, layers: 2"),
    "a full-width colon": ("model:\n  layers：2\n", "write : instead of ："),
    "an equals sign": ("model:\n  layers = 2\n", "write a colon, layers: 2"),
    "a line that is not far enough": ("model:\n  layers: 2\n heads: 4\n", "Fix: indent it as the keys above it"),
    "a crooked line": ("model:\n layers: 2\n  heads: 4\n", "Fix: indent it as the line above"),
    "an open brace": ("model: {layers: 2\n", "close the bracket"),
    "a key twice": (
        "model:\n  layers: 2\n  layers: 3\n",
        "✗ slip.yaml:3: model.layers is written twice; expected YAML. Fix: remove one of",
    ),
    "a key without its section": ("layers: 2\n", "did you mean model.layers"),
    "bytes": ("\udc80", "expected a YAML file that can be read"),
    "latin-1": ("track: {name: \udce9}\n", "iconv -f LATIN1 -t UTF-8"),
    "utf-16": ("\udcff\udcfem\0", "iconv -f UTF-16 -t UTF-8"),
    "utf-16 without its mark": ("m\0o\0", "Fix: save the file as UTF-8."),
    "an escape character": (
        "model:\n  layers: 2\ntrack: {name: a\x1bb}\n",
        "✗ slip.yaml:3: 'track: {{name: a\\x1bb}}'; expected text",
    ),
    "a zero in a path": ('model: {layers: 2}\ntrack: {folder: "a\\0b"}\n', "(slip.yaml:2): expected a text without"),
    "a leading zero": ("model:\n  layers: 010\n", "is 8 in base 8; expected YAML. Fix: write it without"),
    "a time": ("model:\n  layers: 12:30\n", "Fix: write one number without colons"),
}
INTERLEAVED = "parallel.schedule=interleaved parallel.virtual_stages=2"
SIZES = {
    "heads that tp does not divide": ("train a.yaml parallel.tp=8", "choose one of 1, 2, 4"),
    "heads and a vocabulary that tp does not divide at once": (
        "train a.yaml parallel.tp=3 model.heads=6 model.hidden=48 model.vocab=304 advanced.vocab_multiple=1",
        "Fix: choose one of 1, 2.",
    ),
    "too many stages": ("train a.yaml parallel.pp=3", "use 3 layers or more"),
    "stages for a schedule that has one a rank": (
        "train a.yaml parallel.virtual_stages=2",
        "expected 1 with parallel.schedule=1f1b. Fix: set parallel.virtual_stages=1, or parallel.schedule=interleaved.",
    ),
    "a schedule without its stages": (
        "train a.yaml parallel.schedule=interleaved",
        "parallel.virtual_stages = 1: expected at least 2 with parallel.schedule=interleaved. Fix: set parallel.",
    ),
    "stages of a drawing": (
        "schedule interleaved --ranks 2 --microbatches 2",
        "virtual stages = 1: expected at least 2 with the schedule interleaved. Fix: use 2 or more, or choose 1f1b",
    ),
    "microbatches that a schedule cannot group": (
        f"train a.yaml model.layers=4 train.global_batch=3 parallel.pp=2 {INTERLEAVED}",
        "= 1 × 1 × 2 = 2 with parallel.schedule=interleaved. Fix: use 4, or set parallel.schedule=1f1b.",
    ),
    "processes that the layout does not fill": ("train a.yaml parallel.tp=2 --processes 3", "start 4 processes."),
    "fewer processes than the layout has": (
        "train a.yaml parallel.tp=2 --processes 1",
        "Fix: start 2 processes, or write parallel.tp=1.",
    ),
    "a batch that dp does not divide": ("train a.yaml --processes 3", "use 6 or another multiple of 3"),
    "a GPU that is not there": ("train a.yaml train.device=cuda", "train.device"),
    "a warm-up beyond the end": ("train a.yaml optim.warmup_steps=9", "optim.warmup_steps = 9"),
    "a model that is too large": ("train a.yaml model.hidden=65536 model.layers=99", "choose a smaller model"),
    "a number that no size has": ("train a.yaml model.ffn=1000000000000", "whole numbers of at most 2,147,483,647"),
    "a vocabulary that no model has": ("plan a.yaml model.vocab=1000000000000000", "less than or equal to 16777216"),
    "a batch beyond counting": ("train a.yaml train.global_batch=1000000000000", "train.global_batch = 1000000000000"),
    "microbatches beyond counting": (
        "train a.yaml train.global_batch=1048576",
        "expected at most 262,144 microbatches in a step of a rank, and not 1,048,576",
    ),
    "a microbatch that no device holds": (
        "plan a.yaml train.micro_batch=1048576 train.global_batch=1048576 data.seq_length=128",
        "expected at most 524,288: with data.seq_length = 128",
    ),
    "a step beyond the run": ("sample a.yaml --step 9223372036854775807", "less than train.steps = 2; the first"),
    "more positions than tokens": ("train a.yaml data.seq_length=5000", "lower data.seq_length"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("mistakes")
    (found / "corpus.idx").write_bytes(b"MMIDIDX\x00\x00" + struct.pack("<QBQQiqqq", 1, 8, 1, 2, 1000, 0, 0, 1))
    (found / "corpus.bin").write_bytes(bytes(2000))
    (found / "a.yaml").write_text(CONFIG)
    (found / "crlf.yaml").write_bytes(b"\xef\xbb\xbf" + CONFIG.replace("\n", "\r\n").encode())
    (found / "sub").mkdir()
    (found / "sub" / "c.yaml").write_text(CONFIG.replace("corpus", "corpora"))
    (found / "runs" / "there").mkdir(parents=True)
    (found / "runs" / "there" / "config.yaml").write_text(CONFIG)
    (found / "runs" / "there" / "origin.json").write_text("{}")
    (found / "data" / "mine").mkdir(parents=True)
    for split in ("train", "validation"):
        for suffix in ("idx", "bin"):
            (found / "data" / "mine" / f"{split}_text_document.{suffix}").symlink_to(found / f"corpus.{suffix}")
    (found / "data" / "mine" / "tokenizer.json").write_text("{}")
    (found / "hub" / "qwen2").mkdir(parents=True)
    (found / "hub" / "qwen2" / "config.json").write_text("{}")
    (found / "link.yaml").symlink_to("nowhere")
    (found / "my text.jsonl").write_text('{"text": "a"}\n')
    (found / "rows.jsonl").write_text('{"body": "a"}\n')
    (found / "a.docx").write_text("a")
    (found / "notes.md").write_text("a: b: c")
    how = "python examples/tasks.py data/tasks"
    task = "objective: {name: classify}\nfinetune: {init_from: runs/there}\ndata: {train: data/tasks/a.jsonl}\n"
    (found / "task.yaml").write_text(f"# Its rows: {how}\n{task}")
    how = "roots prepare embedded:state-of-the-union --output data/sotu --vocab 4096"
    (found / "first.yaml").write_text(f"# First: {how}\n{CONFIG.replace('corpus', 'data/sotu/train_text_document')}")
    (found / "odd.json").write_text(json.dumps(dict.fromkeys(("version", "normalizer", "decoder", "model"))))
    (found / "model.json").write_text(
        json.dumps(dict.fromkeys(("architectures", "bos_token_id", "use_cache", "dtype")))
    )
    return found


@pytest.fixture
def said(place, monkeypatch, capsys):
    """Function that runs a command in the folder and returns the one line with which it is refused."""
    monkeypatch.chdir(place)
    for name in (*LAUNCHERS["torchrun or deepspeed"], "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def run(line: str, expected: str) -> None:
        with pytest.raises(SystemExit) as ended:
            main(_words(line))
        out, err = capsys.readouterr()
        assert ended.value.code == 2 and not out, out + err
        (only,) = err.splitlines()
        assert only.startswith("✗ ") and expected.format(here=place) in only and "Fix: " in only, only

    return run


def _words(line: str) -> list[str]:
    """As a shell parts them."""
    import shlex

    return shlex.split(line)


@pytest.mark.parametrize("case", TYPED)
def test_what_is_typed_wrong_is_answered_with_what_to_type(said, case):
    said(*TYPED[case])


@pytest.mark.parametrize("case", PATHS)
def test_a_path_that_is_another_thing_is_answered_with_what_it_is(said, case):
    said(*PATHS[case])


@pytest.mark.parametrize("case", YAML)
def test_a_slip_in_a_config_is_answered_with_its_line(said, place, case):
    text, expected = YAML[case]
    (place / "slip.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    said("train slip.yaml", expected)


@pytest.mark.parametrize("case", SIZES)
def test_sizes_that_do_not_go_together_are_answered_with_one_that_does(said, case):
    said(*SIZES[case])


def test_line_ends_and_byte_order_marks_of_windows_are_no_mistake(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as ended:
        main(["train", "crlf.yaml", "--print-config"])
    assert ended.value.code == 0 and "layers: 2" in capsys.readouterr().out


VARIABLES = {
    "half of torchrun's": ({"RANK": "0"}, "WORLD_SIZE is not set"),
    "a rank that is no number": ({"RANK": "first", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "RANK = 'first'"),
    "a rank beyond the world": ({"RANK": "3", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "less than WORLD_SIZE = 2"),
    "a port that is none": (
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"},
        "MASTER_PORT = 'http'",
    ),
    "threads that are no number": ({"OMP_NUM_THREADS": "all"}, "OMP_NUM_THREADS = 'all'"),
}


@pytest.mark.parametrize("case", VARIABLES)
def test_wrong_variables_are_named(said, monkeypatch, case):
    variables, expected = VARIABLES[case]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said("train a.yaml", expected)


def test_a_port_in_use_is_one_line_with_one_that_is_free():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        world = environment.World(0, 2, 0, 2, "127.0.0.1", taken.getsockname()[1], "torchrun or deepspeed")
        with pytest.raises(EnvironmentProblem, match=r"^MASTER_PORT = \d+ on rank 0 .* Fix: .* \(\d+ is free there\)"):
            rendezvous(world, 1.0, "here")


def test_long_preparation_says_how_far_it_is_in_a_pipe_too(monkeypatch, capsys):
    monkeypatch.setattr("roots_dist.logs.FIRST_S", 0.0)
    monkeypatch.setattr("roots_dist.logs.EVERY_S", 100.0)
    with progress_bar() as report:
        for done in (25, 50):
            report(InputProgress("tokens", done, 100, done * 1000))
    assert capsys.readouterr().err == "tokens: 25% of the text, 25,000 documents\n"


SILENT = {
    "ls": ("ls .", "reading the runs in ."),
    "report": ("report runs/there --output there.html", "reading the runs"),
    "sample": ("sample a.yaml data.seq_length=9999", "opening the data"),
    "schedule": ("schedule 1f1b --ranks 2 --microbatches 2", "playing the schedule"),
    "export": ("export runs/there out", "exporting runs/there"),
    "import": ("import sub runs/imported", "importing sub"),
    "train, before its ranks meet": ("train a.yaml parallel.pp=9", "checking the config and the data"),
}


@pytest.mark.parametrize("case", SILENT)
def test_what_may_take_long_is_said_while_it_does(place, monkeypatch, capsys, case):
    line, expected = SILENT[case]
    begun = []

    @contextmanager
    def still_busy(what, say=None, first_s=None):
        begun.append(what)
        yield

    monkeypatch.setattr("roots_dist.logs.still_busy", still_busy)
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit):
        main(_words(line))
    assert begun == [expected], capsys.readouterr()


def test_an_extra_that_is_not_installed_is_named_with_the_command_that_installs_it(said, place, monkeypatch):
    (place / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    said("prepare rows.parquet --output out", "pip install 'roots_dist[formats]'")


def test_an_older_python_is_told_so_before_anything_is_imported():
    source = (Path(__file__).parents[2] / "roots_dist" / "__main__.py").read_text()

    class Old(tuple):
        __slots__ = ()

    sys_of_old = type("sys", (), {"version_info": Old((3, 9, 1)), "version": "3.9.1 (main)", "exit": None})

    def ended(message):
        raise SystemExit(message)

    sys_of_old.exit = staticmethod(ended)
    head = source[: source.index("from roots_dist")].replace("import sys\n", "")
    with pytest.raises(SystemExit, match=r"✗ Python 3.9.1: expected 3.10 or later. Fix: "):
        exec(compile(head, "__main__", "exec"), {"sys": sys_of_old})


ROWS = {
    "pairs of answers for conversations": (
        {"prompt": "a", "chosen": "b", "rejected": "c"}, "instruct", "Fix: set objective.name=dpo"
    ),
    "columns of another name": ({"q": "a", "a": "b"}, "instruct", "name yours with finetune.text_column"),
    "one answer of two": ({"prompt": "a", "chosen": "b"}, "dpo", "rename the column that holds it to rejected"),
    "a text in another column": ({"sentence": "a", "label": 1}, "tag", "Fix: set finetune.text_column=sentence"),
    "messages in another column": (
        {"dialogue": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "instruct",
        "Fix: set finetune.text_column=dialogue",
    ),
    "a question and its answer": (
        {"question": "a", "response": "b"}, "instruct",
        "Fix: set finetune.text_column=question finetune.label_column=response",
    ),
    "an answer under another name, with an input": (
        {"instruction": "a", "input": "b", "response": "c"}, "instruct", "Fix: rename response to output in all lines"
    ),
    "no answer": ({"prompt": "a"}, "instruct", "Fix: add completion to each line, beside prompt"),
    "an answer that is misspelt": ({"prompt": "a", "choosen": "b", "rejected": "c"}, "dpo", "rename choosen to chosen"),
    "one label": ({"text": "a", "label": "x"}, "classify", "expected rows of two labels or more; in all of them label"),
    "nothing": ("", "instruct", "it has none. Fix: write rows into it, as {{\"messages\": ["),
    "nothing to label": ("", "classify", "it has none. Fix: write rows into it, as {{\"text\": "),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_foreign_rows_are_answered_with_the_key_that_reads_them(said, place, case):
    from roots_dist.learning.data.tokenizer import train

    row, objective, expected = ROWS[case]
    (place / "tokenizer.json").write_text(train(["a b c"] * 9, 300).json)
    (place / "foreign.jsonl").write_text(f"{json.dumps(row)}\n" if row else "")
    said(
        f"train a.yaml objective.name={objective} data.train=foreign.jsonl data.tokenizer=tokenizer.json"
        f"{' data.seq_length=64' if objective != 'tag' else ''}",
        expected,
    )


@pytest.mark.parametrize("columns", [80, 120])
def test_help_keeps_to_the_width_of_the_terminal(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    names = [info.name for info in app.registered_commands]
    assert {"train", "ls", "plan"} <= set(names)
    for words in (["--help"], *([name, "--help"] for name in names)):
        with pytest.raises(SystemExit):
            main(words)
        said = capsys.readouterr().out
        assert all(len(line) <= columns for line in said.splitlines()), words
        assert "roots " in said


def test_a_config_is_begun_from_another_one_with_comments_and_a_schema(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as ended:
        main(["init", "new/mine.yaml", "--from", "gpt-quickstart"])
    assert not ended.value.code, capsys.readouterr().err
    assert load("new/mine.yaml") == load(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
    first, *lines = Path("new/mine.yaml").read_text().splitlines()
    assert first == "# yaml-language-server: $schema=roots.schema.json" and "  # number of Transformer blocks" in str(
        lines
    )
    schema = json.loads(Path("new/roots.schema.json").read_text())
    assert set(schema["properties"]) == set(Config.model_fields)
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")):
        for section, keys in parse_file(path)[0].items():
            known = schema["$defs"][schema["properties"][section]["$ref"].rpartition("/")[2]]
            assert set(keys) <= set(known["properties"]) and not known["additionalProperties"], path
    assert {"type": "string"} in schema["$defs"]["DataConfig"]["properties"]["train"]["anyOf"]


def test_a_config_is_begun_from_five_answers(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.stdin", io.StringIO("llama\ndata/mine/\n2\n40\nruns/mine\n"))
    with pytest.raises(SystemExit) as ended:
        main(["init", "answers.yaml"])
    assert not ended.value.code, capsys.readouterr().err
    found = load("answers.yaml")
    assert (found.model.norm, found.parallel.tp, found.parallel.pp, found.train.steps) == ("rmsnorm", 2, 1, 40)
    assert found.data.train[0].path == "data/mine/train_text_document" and found.track.folder == "runs/mine"


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ("gpt\nd\n0\n40\nr\n", "parallel.tp = 0: expected"),
        ("gpt\nd\n3\n40\nr\n", "parallel.tp = 3: expected"),
        ("gpt\nd\n1\n-1\nr\n", "train.steps = -1: expected"),
        (None, "this installation has no configs"),
        ("an old schema", "roots.schema.json': expected the schema of this version"),
        ("gpt\n", "expected five answers, and the input has ended. Fix: name a config"),
    ],
)
def test_answers_that_are_no_config_write_none(tmp_path, monkeypatch, capsys, answers, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(answers or ""))
    if answers is None:
        monkeypatch.setattr("roots_dist.cli.init.SHIPPED", tmp_path)
    elif words.startswith("roots.schema"):
        Path("roots.schema.json").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        main(["init", "refused.yaml"])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and words in err and not Path("refused.yaml").exists(), err
    assert ("Model (" in out) == ("\n" in (answers or ""))


def test_a_quiet_run_says_nothing_and_leaves_the_same_files(place):
    config = CONFIG.replace("corpus", str(place / "corpus")).replace("runs/mine", str(place / "runs" / "quiet"))
    (place / "quiet.yaml").write_text(config)
    done = roots("train", str(place / "quiet.yaml"), "track.wandb=disabled", "track.tensorboard=off", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (place / "runs" / "quiet" / "summary.json").is_file()


def test_versions_are_said_in_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert not ended.value.code
    assert re.fullmatch(r"roots \S.*, Python [\d.]+, torch \S+, deepspeed \S+\n", capsys.readouterr().out)


def test_a_run_that_cannot_be_read_does_not_end_the_list_of_the_others(tmp_path, capsys):
    for name, config in (("good", "model: {layers: 2}\n"), ("cut", "model: {layers: [\n"), ("bytes", b"\xff\xfe")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_bytes(config if isinstance(config, bytes) else config.encode())
        (tmp_path / name / "origin.json").write_text("{}")
    (tmp_path / "bytes" / "metrics.jsonl").mkdir()  # no file
    with pytest.raises(SystemExit) as ended:
        main(["ls", str(tmp_path)])
    said = capsys.readouterr()
    assert ended.value.code == 1
    assert [line.split()[-1] for line in said.out.splitlines()].count("unreadable") == 2
    assert "good" in said.out
    assert len(said.err.splitlines()) == 2
    assert "cut/config.yaml:" in said.err
    assert "bytes/config.yaml" in said.err
