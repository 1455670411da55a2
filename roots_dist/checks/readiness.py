"""Checks of this machine against a config: files, memory, devices, packages. Pure over gathered Facts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from shlex import quote

from roots_dist.accounting.memory import GIB, save_copy_bytes, shares, state_bytes
from roots_dist.accounting.sizes import parameters
from roots_dist.checks.facts import CorpusFacts, Facts
from roots_dist.config.records import corpus_tokens, num_sentinels, objective_of, special_tokens_of
from roots_dist.config.schema import Config
from roots_dist.config.special_tokens import called, fix_of
from roots_dist.errors import Problem
from roots_dist.idx_format import MANIFEST, TOKENIZER
from roots_dist.layout import Layout

TEXT_FILE = r"\.(txt|jsonl|ndjson|json|parquet)(\.(gz|bz2|xz|zst))?$"
"""Names of files that `roots prepare` reads."""


def check(config: Config, layout: Layout, facts: Facts) -> list[Problem]:
    return [
        *_corpora(config, facts),
        *_tokenizer(config, facts),
        *_folder(config, facts),
        *_store(config, facts),
        *_devices(config, facts),
        *_compiler(config, facts),
        *_memory(config, layout, facts),
        *_packages(config, layout, facts),
    ]


def _corpora(config: Config, facts: Facts) -> Iterator[Problem]:
    if objective_of(config).rows:  # rows are read by learning/data/tasks.py
        if not config.data.train:
            yield Problem(
                key="data.train",
                found=[],
                expected="a file of rows (jsonl, json, csv, tsv, parquet)",
                fix="set data.train=FILE.jsonl",
            )
        return
    if not config.data.train:
        yield Problem(
            key="data.train",
            found=[],
            expected="the prefix of a prepared corpus",
            fix="run `roots prepare TEXT --output data/mine`, then set data.train=data/mine/train_text_document",
        )
    for key, sources in (("data.train", config.data.train), ("data.validation", config.data.validation)):
        for source in sources:
            found = facts.corpora.get(source.path)
            if found is not None:
                yield from _corpus(key, source.path, found, config)


def _corpus(key: str, path: str, found: CorpusFacts, config: Config) -> Iterator[Problem]:
    if found.trouble is not None:
        yield Problem(
            key=key, found=path, expected=f"a readable corpus ({found.trouble})", fix=_fix_of(key, path, found)
        )
        return
    if found.made_with is not None:
        yield Problem(
            key=key,
            found=path,
            expected=(
                f"a corpus made with data.tokenizer = {config.data.tokenizer}, not with {found.made_with}: its "
                "ids are other words"
            ),
            fix=(
                f"prepare the text with `roots prepare --tokenizer {config.data.tokenizer}`, or set "
                f"data.tokenizer={found.made_with}"
            ),
        )
    if found.vocab is not None and found.vocab > config.model.vocab:
        yield Problem(
            key="model.vocab",
            found=config.model.vocab,
            expected=f"at least {found.vocab}, the vocabulary of {path}",
            fix=f"set model.vocab={found.vocab}",
        )
    objective = objective_of(config)
    least = corpus_tokens(config)
    if found.tokens < least:
        yield Problem(
            key="data.seq_length",
            found=config.data.seq_length,
            expected=(f"less than the {found.tokens} tokens of {path}, which must hold the {least} of a sample"),
            fix="lower data.seq_length, or prepare more text",
        )
    elif objective.pairs and found.documents is not None and found.documents < 2:
        yield Problem(
            key=key,
            found=path,
            expected="a corpus of two documents or more: half of the second texts come from another one; it has one",
            fix="prepare text of several documents, or choose an objective without pairs of texts",
        )


def _fix_of(key: str, path: str, found: CorpusFacts) -> str:
    """Say what to do about a corpus that cannot be read: what is meant by its path depends on what is there."""
    is_text = re.search(TEXT_FILE, path) and PurePath(path).name not in (MANIFEST, TOKENIZER)
    prepare = f"`roots prepare {quote(path)} --output data/mine`"
    if path.endswith((".bin", ".idx")):
        return "give the path without .bin or .idx"
    if is_text and found.is_file:
        split = "validation" if key == "data.validation" else "train"
        return f"make it of this text with {prepare}, and set {key}=data/mine/{split}_text_document"
    if path.startswith("~"):
        return "write the whole path: ~ is not replaced here"
    if found.beside:
        return f"did you mean {_of_split(key, found.beside)}"
    if "," in path:
        return f"write a list, {key}=[{', '.join(path.split(','))}]"
    if is_text:
        return f"there is no such text either: check its path, then prepare it with {prepare}"
    if found.fix:
        return found.fix
    split, name = ("validation" if key == "data.validation" else "train"), quote(f"data/{PurePath(path).name}")
    made = f"{key}={name}/{split}_text_document"
    return f"check the path, or make it: `roots prepare TEXT --output {name}`, and set {made}"


def _of_split(key: str, prefixes: Sequence[str]) -> str:
    """The one of several corpora that a key takes."""
    word = "validation" if key == "data.validation" else "train"
    return next((prefix for prefix in prefixes if PurePath(prefix).name.startswith(word)), prefixes[0])


def _tokenizer(config: Config, facts: Facts) -> Iterator[Problem]:
    if facts.tokenizer_trouble is not None:
        yield Problem(
            key="data.tokenizer",
            found=config.data.tokenizer,
            expected=f"a readable tokenizer.json ({facts.tokenizer_trouble})",
            fix=f"did you mean {facts.tokenizer_beside}"
            if facts.tokenizer_beside
            else "give the file that `roots prepare` wrote beside the corpus",
        )
    elif facts.tokenizer_vocab is not None and facts.tokenizer_vocab > config.model.vocab:
        yield Problem(
            key="model.vocab",
            found=config.model.vocab,
            expected=f"at least {facts.tokenizer_vocab}, the vocabulary of {config.data.tokenizer}",
            fix=f"set model.vocab={facts.tokenizer_vocab}",
        )
    else:
        yield from _special_tokens(config, facts)


def _special_tokens(config: Config, facts: Facts) -> Iterator[Problem]:
    objective, tokenizer = objective_of(config), config.data.tokenizer
    wanted = special_tokens_of(config)
    missing = [token for token in wanted if token not in facts.special_tokens]
    if objective.rows and tokenizer is None:
        fix = "name the tokenizer.json that the model was trained with"
        yield Problem(key="data.tokenizer", found=None, expected="a tokenizer: the rows of a task are text", fix=fix)
    elif wanted and tokenizer is None:
        expected, fix = (
            f"the tokenizer of the corpus, for its {called(missing)}",
            "name the tokenizer.json beside the corpus",
        )
        yield Problem(key="data.tokenizer", found=None, expected=expected, fix=fix)
    elif missing:
        expected = f"a token for {called(missing)}"
        yield Problem(key="data.tokenizer", found=tokenizer, expected=expected, fix=fix_of(missing))
    elif facts.sentinels < (spans := num_sentinels(config)):
        yield Problem(
            key="data.tokenizer",
            found=tokenizer,
            expected=f"{spans} sentinels (<extra_id_0> …), one for each span of a sample; it has {facts.sentinels}",
            fix=(
                "lower data.seq_length or objective.mask_probability, raise objective.mean_span_length, or "
                "prepare the corpus with roots prepare --kind unigram"
            ),
        )


def _folder(config: Config, facts: Facts) -> Iterator[Problem]:
    if facts.folder_trouble is not None:
        yield Problem(
            key="track.folder",
            found=config.track.folder,
            expected=f"a folder that can be written ({facts.folder_trouble})",
            fix="choose another folder, or make room there",
        )


def _store(config: Config, facts: Facts) -> Iterator[Problem]:
    if facts.store_trouble is not None:
        yield Problem(
            key="checkpoint.url" if config.checkpoint.url is not None else "checkpoint.fallback_folder",
            found=config.checkpoint.url or config.checkpoint.fallback_folder,
            expected=f"a store that can be written ({facts.store_trouble})",
            fix="make the bucket, or pip install 'roots_dist[s3]' for s3://, or what fsspec names for another store",
        )


def _devices(config: Config, facts: Facts) -> Iterator[Problem]:
    if config.train.device == "cuda" and facts.gpus < facts.local_size:
        yield Problem(
            key="train.device",
            found="cuda",
            expected=f"a GPU for each of this machine's processes ({facts.local_size}), {facts.gpus} can be used",
            fix="set train.device=cpu" + (f", or start {facts.gpus} processes per machine" if facts.gpus else ""),
        )


def _compiler(config: Config, facts: Facts) -> Iterator[Problem]:
    if config.train.compile is True and not facts.compiler and not facts.gpus:  # on a GPU it is tried
        yield Problem(
            key="train.compile",
            found=True,
            expected="a C++ compiler, which torch.compile calls: CXX, or g++ in PATH",
            fix="install g++ on every machine of the run (Debian: apt-get install g++), or set train.compile=false",
        )


def _memory(config: Config, layout: Layout, facts: Facts) -> Iterator[Problem]:
    if facts.gpus or facts.memory is None:
        return
    all_learns = config.finetune.strategy in ("full", "progressive")  # the checks have seen that its last phase comes
    needed = state_bytes(config, layout, all_learns=all_learns) * facts.local_size
    has = f"the {facts.memory / GIB:.1f} GiB that this machine has left"
    if needed > facts.memory:
        yield Problem(
            key="model",
            found=f"{parameters(config) / 1e9:.3g} billion parameters",
            expected=f"weights and optimizer states of {facts.local_size} processes to fit into {has}; they need "
            f"{needed / GIB:.1f} GiB",
            fix=(
                "choose a smaller model, or more machines with a higher parallel.tp, parallel.pp or parallel.zero_stage"
            ),
        )
        return
    mine, experts = shares(config, layout)
    learning = (mine, experts) if config.finetune.strategy == "full" else (0, 0)  # else a part that is not known here
    copies = save_copy_bytes(config, layout, mine, learning[0], experts, learning[1]) * facts.local_size
    if needed + copies > facts.memory:
        yield Problem(
            key="checkpoint.asynchronous",
            found=True,
            expected=f"weights, optimizer states and a copy of both for checkpoints to fit into {has}; they need "
            f"{(needed + copies) / GIB:.1f} GiB",
            fix="set checkpoint.asynchronous=false: training waits for its checkpoints, and nothing is copied",
        )


def _packages(config: Config, layout: Layout, facts: Facts) -> Iterator[Problem]:
    if objective_of(config).has_labels and facts.versions.get("scikit-learn", "") is None:
        expected, fix = "it to be installed, for accuracy, F1 and MCC", "pip install 'roots_dist[finetune]'"
        yield Problem(key="scikit-learn", found="not installed", expected=expected, fix=fix)
    wanted = ["torch"] + (["deepspeed"] if config.advanced.engine == "deepspeed" else [])
    for name in wanted:
        if name not in facts.versions:
            continue
        version, pinned = facts.versions[name], facts.pinned.get(name)
        if version is None or (pinned is not None and version.partition("+")[0] != pinned):
            target = f"{name}=={pinned}" if pinned else name
            yield Problem(
                key=name,
                found=version or "not installed",
                expected=f"version {pinned}, which this release was tried with" if pinned else "it to be installed",
                fix=f"pip install {target}",
            )
