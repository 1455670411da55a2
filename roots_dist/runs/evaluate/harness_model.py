"""The live parallel model behind lm-evaluation-harness's model interface: log-likelihoods, rolling ones, generated
texts.

    lm_eval's requests, equal on every rank --tokens, cut to max_length--> Passes, decode.py --> answers on every rank

Tokenization, windows of long texts and truncation of contexts follow lm_eval's own HFLM for causal models, so that a
run and its export get the same numbers. Data ranks share the requests. B requests, S tokens of the longest.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from roots_dist.assembly.passes import Passes
from roots_dist.config.special_tokens import GENERATION, read_companions
from roots_dist.errors import DataError, Problem, UserError, present
from roots_dist.learning.data.ends import ends_of
from roots_dist.learning.data.specials import read_specials
from roots_dist.learning.data.tokenizer import load_codec
from roots_dist.runs.generate.decode import decode
from roots_dist.runs.generate.request import Request
from roots_dist.runs.generate.sampling import Sampling
from roots_dist.runs.generate.stops import Stops
from roots_dist.world.batch import IGNORE, MicroBatch

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM


AT_A_TIME = 16
"""Number of microbatches per pipeline rank in one forward pass."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
BEAMS = {"num_beams": "beams", "length_penalty": "length_penalty", "early_stopping": "early_stopping"}
"""lm_eval's and transformers' names of beam options -> ours."""


Scored = tuple[Any, list[int], list[int]]
"""Request of lm_eval: texts (or None), ids of a context, ids of the continuation."""


def token_scores(
    passes: Passes, asked: Sequence[tuple[list[int], list[int]]], max_length: int
) -> list[tuple[float, bool]]:
    """The log-probability of the continuation of each (context, continuation), neither empty, and True if greedy
    decoding would generate it. A context that is too long loses its beginning. Collective over the world; equal on
    every rank."""
    mesh = passes.mesh
    longest_first = sorted(range(len(asked)), key=lambda i: -sum(map(len, asked[i])))
    batches = list(_batches(passes, asked, longest_first, max_length))
    together = mesh.ep.size > 1  # then data ranks send each other tokens, and have as many batches: all of them
    if not together:
        batches = batches[mesh.dp_cp.rank :: mesh.dp_cp.size]
    found = torch.zeros(len(asked), 2, dtype=torch.float64, device=mesh.device)
    left = iter(batches)
    with passes.model.tp.without_sequence_sharding():  # texts have any length
        while some := list(islice(left, AT_A_TIME * mesh.pp.size)):
            for (numbers, batch), (scores, hits) in zip(
                some, passes.forward([batch.to(mesh.device) for _, batch in some])
            ):
                right = (hits | (present(batch.targets).to(hits.device) == IGNORE)).all(1)
                found[numbers] = torch.stack([scores.double().sum(1), right.double()], 1)
    if mesh.tp.rank > 0 or (together and mesh.dp_cp.rank > 0):
        found.zero_()
    return [(score, right > 0) for score, right in mesh.world.sum_(found).tolist()]


def _batches(
    passes: Passes, asked: Sequence[tuple[list[int], list[int]]], order: list[int], max_length: int
) -> Iterator[tuple[list[int], MicroBatch]]:
    """Yield (numbers, microbatch), each with as many requests as have the tokens of a microbatch of the run's
    evaluation."""
    config, first = passes.config, 0
    while first < len(order):
        context, continuation = asked[order[first]]
        length = min(max_length, len(context) + len(continuation) - 1)
        rows = max(1, config.train.micro_batch * config.data.seq_length // length)
        numbers = order[first : first + rows]
        tokens, targets = (
            torch.zeros(len(numbers), length, dtype=torch.int64),
            torch.full((len(numbers), length), IGNORE),
        )
        for row, i in enumerate(numbers):
            context, continuation = asked[i]
            ids = (context + continuation)[-(max_length + 1) :]
            tokens[row, : len(ids) - 1] = torch.tensor(ids[:-1])
            targets[row, len(ids) - 1 - len(continuation) : len(ids) - 1] = torch.tensor(continuation)
        yield numbers, MicroBatch(tokens=tokens, targets=targets, sample_ids=torch.tensor(numbers), logits_at="targets")
        first += rows


def harness_model(passes: Passes) -> LM:
    """Wrap the model as an lm_eval.api.model.LM. Raises DataError if the tokenizer has no token that ends a text."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        has_bos_prefix,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    config = passes.config
    tokenizer = present(config.data.tokenizer)
    specials = read_specials(tokenizer, config.model.vocab)
    specials.require("end")
    end = present(specials.end)
    codec = load_codec(tokenizer)
    backend = codec.backend
    begins, ends = present(specials.tokens.first), frozenset(ends_of(config, codec, specials.tokens))
    backend.encode_special_tokens = False  # as in transformers: a special token spelled out is that token
    begin_text = backend.decode([begins], skip_special_tokens=False)
    before, after = specials.tokens.before, specials.tokens.after
    defaults = read_companions(Path(tokenizer).parent).get(GENERATION, {})

    class Live(TemplateLM):
        eot_token_id = end
        prefix_token_id = begins
        max_length = config.model.max_positions or config.data.seq_length

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
            if add_special_tokens is None:
                add_special_tokens = not has_bos_prefix(string, begin_text)
            ids = backend.encode(string, add_special_tokens=False).ids
            return [*before, *ids, *after] if add_special_tokens else ids

        def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            return scores

        def _loglikelihood_tokens(self, requests: Sequence[Scored], **more: object) -> list[tuple[float, bool]]:
            for texts, _, continuation in requests:
                if not 0 < len(continuation) <= self.max_length:
                    problem = Problem(
                        key="continuation of a task",
                        found=texts[1] if texts else "",
                        expected=f"1 to {self.max_length} tokens (data.seq_length); it has {len(continuation)}",
                        fix="leave the task out, or evaluate a run with a larger data.seq_length",
                    )
                    raise UserError(problem)
            return token_scores(passes, [(context, said) for _, context, said in requests], self.max_length)

        def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
            windows: list[Scored] = []
            owners: list[int] = []
            for number, (text,) in enumerate(request.args for request in requests):
                tokens = self.tok_encode(text)
                rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
                windows += [(None, *make_disjoint_window(window)) for window in rolling]
                owners += [number] * (len(windows) - len(owners))
            sums = [0.0] * len(requests)
            for number, (score, _) in zip(owners, self._loglikelihood_tokens(windows)):
                sums[number] += score
            return sums

        def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
            alike: dict[str, list[int]] = defaultdict(list)
            for number, request in enumerate(requests):
                alike[json.dumps(request.args[1], sort_keys=True)].append(number)
            texts = [""] * len(requests)
            for how, numbers in alike.items():
                answers = self._generate([requests[i].args[0] for i in numbers], json.loads(how))
                for number, text in zip(numbers, answers):
                    texts[number] = text
            return texts

        def _generate(self, contexts: list[str], how: dict[str, Any]) -> list[str]:
            options = normalize_gen_kwargs(how, default_max_gen_toks=256)
            until = handle_stop_sequences(options.pop("until"), eos=backend.decode([end], skip_special_tokens=False))
            request = _request(options, self.max_length, defaults)
            room = self.max_length - request.max_tokens
            prompts = [self.tok_encode(text)[-room:] for text in contexts]
            stops = Stops(ends, tuple(filter(None, until)), codec)
            answers = []
            for answer, *_ in decode(passes, prompts, request, stops):
                text = backend.decode([i for i in answer.tokens if i != end], skip_special_tokens=True)
                answers.append(postprocess_generated_text(text, until, None))
            return answers

    return Live()


def _request(options: dict[str, Any], max_length: int, defaults: Mapping[str, Any]) -> Request:
    """Request from lm_eval's normalised generation options; `defaults` are those of generation_config.json, which
    transformers uses for an export. Raises DataError for an option that is unknown or cannot be combined."""
    most, samples = options.pop("max_gen_toks"), options.pop("do_sample")
    if most >= max_length:
        expected, fix = f"less than data.seq_length = {max_length}", "set it in the task's generation_kwargs"
        raise DataError(Problem(key="generation_kwargs.max_gen_toks", found=most, expected=expected, fix=fix))
    usual = ("top_k", "top_p", "min_p", "repetition_penalty") if samples else ("repetition_penalty",)
    sampling = {name: defaults[name] for name in usual if defaults.get(name) is not None}
    sampling |= {name: options.pop(name) for name in SAMPLING if name in options}
    beams = {ours: options.pop(name) for name, ours in BEAMS.items() if name in options}
    if options:
        name, value = next(iter(options.items()))
        expected = f"one of until, max_gen_toks, do_sample, {', '.join([*SAMPLING, *BEAMS])}"
        raise DataError(
            Problem(key=f"generation_kwargs.{name}", found=value, expected=expected, fix="leave it out of the task")
        )
    if not samples:
        sampling["temperature"] = 0.0
    if beams.get("beams", 1) != 1 and (penalty := sampling.get("repetition_penalty", 1.0)) != 1.0:
        expected, fix = "1.0 with num_beams", "set it to 1.0 in the task's generation_kwargs, or leave num_beams out"
        raise DataError(Problem(key="repetition_penalty", found=penalty, expected=expected, fix=fix))
    beams["beams"] = 0 if beams.get("beams", 1) == 1 else beams["beams"]
    return Request(most, Sampling(**sampling), **beams)
