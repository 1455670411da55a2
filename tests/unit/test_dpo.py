"""Preferences: rows as data sets write them, the loss and its gradients as the paper defines them, references kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chat_templates import plain, write_tokenizer

from roots_dist.assembly.rank_model import build_model
from roots_dist.checks.checks import check
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, DataError
from roots_dist.learning.data.tasks import Example, Examples, open_examples
from roots_dist.learning.data.tokenizer import load_codec
from roots_dist.learning.objectives import make_row_objective
from roots_dist.learning.objectives.dpo import Preferences
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.learning.objectives.task_checks import check_rows, complete_from_rows
from roots_dist.runs.evaluate.evaluate import evaluate
from roots_dist.runs.evaluate.references import REFERENCES
from roots_dist.runs.train.loop import train
from roots_dist.world.batch import IGNORE, PADDING
from roots_dist.world.mesh import Mesh

ASK, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "Add 1."), ("assistant", "2"), ("assistant", "3 or so"))
)
ROWS = {
    "texts after a prompt": {"prompt": "Add 1.", "chosen": "2", "rejected": "3 or so"},
    "messages after a prompt": {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    "whole conversations": {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "whole conversations, and a prompt that repeats them": {
        "prompt": "Add 1.", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]
    },
    "messages as JSON": {"chosen": json.dumps([ASK, GOOD]), "rejected": json.dumps([ASK, BAD])},
}  # fmt: skip
WRONG = {
    "no rejected answer": ({"prompt": "a", "chosen": "b"}, "rejected"),
    "nothing in common": ({"chosen": [ASK, GOOD], "rejected": [ASK | {"content": "?"}, BAD]}, "chosen"),
    "the same answers": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen"),
    "no answer": ({"prompt": "a", "chosen": [ASK], "rejected": [ASK, BAD]}, "chosen"),
}


def written(folder: Path, rows: list[dict], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def config_in(folder: Path, **finetune: object) -> Config:
    return Config.model_validate(
        {
            "model": {"layers": 2, "hidden": 16, "heads": 2, "vocab": 500, "init_std": 0.3, "positions": "rotary"},
            "objective": {"name": "dpo"},
            "data": {
                "tokenizer": write_tokenizer(folder, "bytes", plain("chatml")),
                "train": str(folder / "rows.jsonl"),
                "validation": str(folder / "rows.jsonl"),
                "seq_length": 160,
            },
            "finetune": finetune,
            "train": {"steps": 3, "global_batch": 4, "micro_batch": 2, "device": "cpu", "eval_sequences": 5},
            "optim": {"lr": 1e-2},
            "track": {"folder": str(folder / "run"), "wandb": "disabled", "tensorboard": "off"},
        }
    )


@pytest.mark.parametrize("name", ROWS)
def test_a_pair_is_two_conversations_of_which_the_answers_are_learned(name, tmp_path):
    config = config_in(tmp_path)
    (row,) = open_examples(written(tmp_path, [ROWS[name]]), config).rows
    codec = load_codec(config.data.tokenizer)
    for ids, marks, answer in ((row.first, row.token_labels, "2"), (row.second, row.second_labels, "3 or so")):
        text = f"<|im_start|>user\nAdd 1.<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        assert codec.decode(ids.tolist()) == text
        assert codec.decode(ids[marks == 1].tolist()) == f"{answer}<|im_end|>"


@pytest.mark.parametrize("name", WRONG)
def test_a_row_that_is_no_pair_is_refused_by_its_column(name, tmp_path):
    row, column = WRONG[name]
    path = written(tmp_path, [ROWS["messages as JSON"], row])
    with pytest.raises(DataError, match=rf"{path}:2.*{column}"):
        open_examples(path, config_in(tmp_path))


def some(length: int, first: int, question: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(first, first + length, dtype=np.int32), (np.arange(length) >= question).astype(np.int32)


def objective_of_length(seq: int) -> Preferences:
    config = Config.model_validate(
        {"objective": {"name": "dpo"}, "data": {"seq_length": seq}, "model": {"vocab": 90, "hidden": 16, "heads": 2}}
    )
    found = proof_objective(config).objective
    assert isinstance(found, Preferences)
    return found


@pytest.mark.parametrize("seq, kept", [(20, (7, 5)), (10, (5, 5)), (9, (4, 5)), (8, (4, 4))])
def test_a_long_pair_is_cut_at_both_ends(seq, kept):
    (first, marks), (second, other_marks) = some(8, 10, 3), some(6, 50, 2)
    example = Example(first, second, marks, other_marks)
    objective = objective_of_length(seq)
    fields = objective.sample(Examples("rows", (example,)), 0, np.random.default_rng(0))
    lengths = [(fields["document_ids"] == document).sum() for document in (0, 1, PADDING)]
    assert objective.length(example) == 14, "the chosen text alone may fill the half of a sample"
    assert lengths == [*kept, seq - sum(kept)] and objective.too_long(example) == (sum(kept) < 12)
    assert fields["tokens"][: kept[0]].tolist() == first[: kept[0]].tolist()
    chosen, rejected = fields["targets"][: kept[0]], fields["targets"][kept[0] : sum(kept)]
    assert chosen.tolist() == [IGNORE, IGNORE, *range(13, 11 + kept[0])]
    assert rejected.tolist() == [IGNORE, *range(52, 51 + kept[1])]
    assert fields["position_ids"][: sum(kept)].tolist() == [*range(kept[0]), *range(kept[1])]


@pytest.mark.parametrize("lengths, kept", [((4, 12), (3, 8)), ((12, 4), (8, 3))])
def test_what_a_short_text_leaves_is_the_other_ones(lengths, kept):
    (first, marks), (second, other_marks) = some(lengths[0], 10, 2), some(lengths[1], 50, 2)
    source = Examples("rows", (Example(first, second, marks, other_marks),))
    fields = objective_of_length(11).sample(source, 0, np.random.default_rng(0))
    assert tuple((fields["document_ids"] == document).sum() for document in (0, 1)) == kept


@pytest.mark.parametrize("smoothing, softcap", [(0.0, None), (0.2, 1.7)])
def test_loss_and_gradients_are_those_of_the_paper(smoothing, softcap):
    """Equation 7 by plain autograd over whole logits, each text read alone; conservative DPO with smoothing."""
    config = Config.model_validate(
        {
            "model": {
                "layers": 2, "hidden": 16, "heads": 2, "vocab": 61, "init_std": 0.5, "logits_scaling": 1.5,
                "logit_softcap": softcap,
            },
            "objective": {"name": "dpo", "dpo_beta": 0.3, "label_smoothing": smoothing},
            "data": {"seq_length": 24},
            "train": {"global_batch": 4, "micro_batch": 4},
            "advanced": {"float64": True, "engine": "reference", "loss_chunk": 7},
        }
    )  # fmt: skip
    model = build_model(config, Mesh.single())
    (stage,) = model.stages.values()
    (batch,) = random_batches(config, 0, 0, 1)
    (term,) = stage({}, batch).results
    term.sum.backward()
    found = {p.name: p.tensor.grad.clone() for p in model.params}
    stage.zero_grad()
    head = stage.pieces[-1]
    hidden: list[torch.Tensor] = []
    head.register_forward_pre_hook(lambda _, args: hidden.append(args[0]["hidden"]))
    losses = []
    for b in range(4):
        gained = []
        for document in (0, 1):
            here = batch.document_ids[b] == document
            tokens, targets = batch.tokens[b][here][None], batch.targets[b][here]
            stage({}, replace(batch, tokens=tokens, targets=targets[None], sample_ids=batch.sample_ids[:1],
                              document_ids=None, position_ids=None, references=None))  # fmt: skip
            logits = F.linear(head.norm(hidden[-1][0]), head.weight)[:, :61] / 1.5
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            scored = targets != IGNORE
            own = logits.log_softmax(-1)[scored].gather(1, targets[scored].unsqueeze(1)).sum()
            gained.append(own - batch.references[b, document])
        margin = 0.3 * (gained[0] - gained[1])
        losses.append(-F.logsigmoid(margin) * (1 - smoothing) - F.logsigmoid(-margin) * smoothing)
    expected = torch.stack(losses).sum()
    torch.testing.assert_close(term.sum, expected, rtol=1e-12, atol=1e-12)
    assert int(term.count) == 4
    expected.backward()
    for p in model.params:
        torch.testing.assert_close(found[p.name], p.tensor.grad, rtol=1e-10, atol=1e-11, msg=p.name)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dpo")
    rows = [{"prompt": f"Add {n}.", "chosen": f"{n + 1}", "rejected": f"{n} again"} for n in range(5)]
    written(folder, rows)
    assert train(config_in(folder), Mesh.single()) == 0
    return folder


def logged(folder: Path, key: str) -> list[float]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [found[key] for line in lines if key in (found := json.loads(line))]


def test_a_run_begins_where_no_answer_is_preferred_and_learns_to(place):
    first, *_, last = logged(place, "loss/validation")
    assert first == pytest.approx(math.log(2), abs=1e-6)
    assert last < first and logged(place, "accuracy/validation/dpo")[-1] == 1.0


def test_a_run_goes_on_with_the_references_that_it_began_with(place, caplog):
    before = (place / "run" / REFERENCES).read_bytes()
    assert train(config_in(place).changed({"train.steps": 4}), Mesh.single()) == 0
    assert (place / "run" / REFERENCES).read_bytes() == before
    found = evaluate(config_in(place), Mesh.single())
    assert found is not None and found.loss == pytest.approx(logged(place, "loss/validation")[-1], abs=1e-6)


def test_other_rows_are_evaluated_with_references_of_their_own(place, tmp_path):
    rows = (place / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "turned.jsonl").write_text("".join(reversed(rows)))
    turned = config_in(place).changed({"data.validation": [str(tmp_path / "turned.jsonl")]})
    found = evaluate(turned, Mesh.single())
    assert found is not None and found.loss == pytest.approx(logged(place, "loss/validation")[-1], abs=1e-6)


def test_references_of_other_rows_are_those_of_the_start_without_adapters(place, tmp_path):
    rows = (place / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "turned.jsonl").write_text("".join(reversed(rows)))
    written(tmp_path, [json.loads(row) for row in rows])
    adapted = config_in(tmp_path, init_from=str(place / "run"), strategy="lora", lora_rank=2)
    assert train(adapted, Mesh.single()) == 0
    found = evaluate(adapted.changed({"data.validation": [str(tmp_path / "turned.jsonl")]}), Mesh.single())
    assert found is not None and found.loss == pytest.approx(logged(tmp_path, "loss/validation")[-1], abs=1e-6)
    assert logged(tmp_path, "loss/validation")[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_run_does_not_go_on_with_other_rows_or_without_its_references(place, tmp_path):
    other = written(tmp_path, [ROWS["whole conversations"]])
    with pytest.raises(DataError, match="file of rows = .*, of which .*references.npz holds the references"):
        train(config_in(place).changed({"data.validation": [other], "train.steps": 6}), Mesh.single())
    kept = (place / "run" / REFERENCES).rename(place / "elsewhere")
    try:
        with pytest.raises(DataError, match="references of the rows.*start the run anew"):
            train(config_in(place).changed({"train.steps": 6}), Mesh.single())
    finally:
        kept.rename(place / "run" / REFERENCES)


def test_a_prompt_that_the_answers_do_not_repeat_is_put_before_them_or_refused(tmp_path):
    system = {"role": "system", "content": "Be kind."}
    row = {"prompt": [system], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}
    config = config_in(tmp_path)
    (example,) = open_examples(written(tmp_path, [row]), config).rows
    assert "Be kind." in load_codec(config.data.tokenizer).decode(example.first.tolist())
    for wrong in ({"prompt": "Something else."}, {"system": "a", "prompt": [system]}):
        with pytest.raises(DataError, match=r":1.*(prompt|system)"):
            open_examples(written(tmp_path, [row | wrong], "wrong.jsonl"), config)


def test_a_row_without_one_of_its_answers_is_told_how_the_column_is_called(tmp_path):
    path = written(tmp_path, [{"prompt": "Add 1.", "chosen": "2", "refused": "3"}])
    with pytest.raises(DataError, match="rejected = None.*Fix: rename the column that holds it to rejected"):
        open_examples(path, config_in(tmp_path))


def test_references_belong_to_what_a_sample_holds_of_the_rows(place):
    with pytest.raises(ConfigError, match=r"data\.seq_length = 70: expected \d+, with which the references in "):
        train(config_in(place).changed({"data.seq_length": 70, "train.steps": 6}), Mesh.single())


@pytest.mark.parametrize("content, said", [(b"", "damaged"), (b"hello", "damaged"), (None, "no such file")])
def test_a_damaged_file_of_references_is_named(place, content, said, tmp_path):
    path = place / "run" / REFERENCES
    kept = path.read_bytes()
    try:
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(DataError, match=f"{REFERENCES} = '{said}"):
            evaluate(config_in(place), Mesh.single())
    finally:
        path.write_bytes(kept)


def test_pairs_that_are_cut_too_early_are_skipped_where_rows_are(tmp_path):
    long = {"prompt": "Add " + "1 and " * 60, "chosen": "2", "rejected": "3"}
    path = written(tmp_path, [ROWS["whole conversations"], long])
    with pytest.raises(ConfigError, match=r"use at least \d+, or leave such rows out with finetune\.on_error=skip"):
        check_rows(config_in(tmp_path))
    skipping = config_in(tmp_path, on_error="skip")
    check_rows(skipping)
    objective = make_row_objective(skipping)
    assert objective.num_samples(objective.open(path)) == 1
    whole = config_in(tmp_path).changed({"data.seq_length": objective.length(open_examples(path, skipping).rows[1])})
    check_rows(whole)


def test_what_is_read_is_not_said_to_be_unread(tmp_path):
    row = {"prompt": "Add 1.", "chosen": "2", "rejected": "3 or so", "source": "mine"}
    found = open_examples(written(tmp_path, [row]), config_in(tmp_path))
    assert [line.partition(":")[0] for line in found.remarks] == ["column 'source' is not read (objective.name=dpo)"]


def test_packing_is_refused_by_name_before_any_row_is_packed(tmp_path):
    written(tmp_path, [ROWS["whole conversations"]])
    config = complete_from_rows(config_in(tmp_path, packing=True, epochs=2))
    assert [problem.key for problem in check(config, 1)] == ["finetune.packing"]
