"""What vLLM says of exports: run by vllm_loads.py, in a python that has vLLM and need not have ROOTS.

    python tools/vllm_reader.py JOBS.json    # [{"folder": "exports/quickstart", "prompts": [[52, 3213]], ...}, ...]

Writes into each job's folder `answer` a log, answer.json (versions, class, tokens) and logits.safetensors: of a
decoder, log-probabilities of all words at every position of prompt and answer; of an encoder or a classifier, its
logits. A fork each, since one process holds one engine, and what vLLM refuses ends its own fork only. S positions, N
new tokens, V words, C classes.
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import torch
import transformers
import vllm

# before the forks, which would each take half a minute to import it; CPUs' worker wants it too
import vllm.v1.worker.gpu_worker
from safetensors.torch import save_file
from vllm import PoolingParams, SamplingParams


def scores(places: list, vocab: int) -> torch.Tensor:
    """[places, V], from what vLLM lists for each place: word -> log-probability."""
    found = torch.full((len(places), vocab), float("nan"))
    for row, words in zip(found, places, strict=True):
        ids = list(words)
        row[torch.tensor(ids)] = torch.tensor([words[i].logprob for i in ids])
    return found


def generated(llm, job: dict) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Greedy. Of each prompt the new tokens, and [S - 1 + N, V]: the places that have a next word."""
    greedy = dict(temperature=0, max_tokens=job["new"], ignore_eos=True, detokenize=False)
    everything = SamplingParams(**greedy, logprobs=-1, prompt_logprobs=-1)
    found = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], everything, use_tqdm=False)
    tokens = [list(one.outputs[0].token_ids) for one in found]
    return tokens, [scores([*one.prompt_logprobs[1:], *one.outputs[0].logprobs], job["vocab"]) for one in found]


def pooled(llm, job: dict) -> list[torch.Tensor]:
    """Outputs of each text: [C] (classify) or [S, C] (token_classify); C is V for an encoder with its head of words."""
    inputs = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    raw = PoolingParams(task=job["task"], use_activation=False)
    return [
        one.outputs.data for one in llm.encode(inputs, pooling_params=raw, pooling_task=job["task"], use_tqdm=False)
    ]


def answer(job: dict) -> None:
    folder = Path(job["answer"])
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    how = dict(dtype="float32", enforce_eager=True, max_num_seqs=4, seed=0, skip_tokenizer_init=not job["text"])
    if job["task"] == "generate":
        llm = vllm.LLM(job["folder"], max_logprobs=-1, **how)
        tokens, logits = generated(llm, job)
    else:
        llm = vllm.LLM(job["folder"], runner="pooling", hf_overrides=job["overrides"], **how)
        tokens, logits = [], pooled(llm, job)
    [kind] = llm.apply_model(lambda model: type(model).__name__)
    versions = {module.__name__: module.__version__ for module in (vllm, transformers, torch)}
    words = llm.get_tokenizer().encode(job["text"]) if job["text"] else []
    save_file({str(i): one.float().contiguous().cpu() for i, one in enumerate(logits)}, folder / "logits.safetensors")
    (folder / "answer.json").write_text(
        json.dumps({"versions": versions, "class": kind, "tokens": tokens, "ids": words})
    )


if __name__ == "__main__":
    for one in json.loads(Path(sys.argv[1]).read_text()):
        fork = multiprocessing.get_context("fork").Process(target=answer, args=(one,))
        fork.start()
        fork.join()
