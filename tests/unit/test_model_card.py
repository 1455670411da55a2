"""The card of an export says what was recorded, leaves out what was not, and leaves the licence to a person."""

from __future__ import annotations

import json

from roots_dist.config.schema import Config
from roots_dist.storage.exchange.model_card import model_card

TREE = {
    "model": {"layers": 1, "hidden": 8, "heads": 1, "vocab": 64},
    "data": {"train": [{"path": "a/train", "weight": 3.0}, "b/train"]},
    "track": {"folder": "runs/little"},
}


def test_a_card_says_what_a_run_has_recorded(tmp_path):
    (tmp_path / "origin.json").write_text(json.dumps({"layout": "TP2×PP1×DP1", "versions": {"torch": "2.13.0"}}))
    (tmp_path / "summary.json").write_text(
        json.dumps({"steps": 20, "data/tokens": 2560.0, "loss/train": 5.5214, "loss/validation": 5.4})
    )
    card = model_card(Config.model_validate(TREE), tmp_path, "step_00000020", "GPT2LMHeadModel")
    assert card.startswith("---\nlibrary_name: transformers\nlicense: other  # FILL IN")
    for words in (
        "# little",
        "- `a/train`, weight 3\n- `b/train`, weight 1",
        "| layout | TP2×PP1×DP1 |",
        "| tokens read | 2,560 |",
        "| training loss, nats per target | 5.521 |",
        "| trained with | torch 2.13.0 |",
        "the checkpoint `step_00000020`",
        "GPT2LMHeadModel.from_pretrained(folder)",
    ):
        assert words in card, words


def test_a_card_of_little_knowledge_claims_little(tmp_path):
    config = Config.model_validate(TREE | {"data": {}, "finetune": {"init_from": "runs/base"}})
    card = model_card(config, tmp_path, "step_00000000", "GPT2LMHeadModel")
    assert "How far" not in card and "began with the weights of `runs/base`" in card and "None" not in card
