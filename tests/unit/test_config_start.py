"""What a config and the model that it starts from must agree on: told before anything is read or started."""

from pathlib import Path

import pytest

from roots_dist.config.init_from import complete_from_model
from roots_dist.config.load import read, to_yaml
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError


@pytest.fixture
def start(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def asked(start: Path, there: dict, *overrides: str) -> Config:
    """The config that `overrides` make, going on from a run whose config.yaml says `there`."""
    (start / "config.yaml").write_text(to_yaml(Config.model_validate(there)))
    task = start.parent / "task.yaml"
    task.write_text(f"finetune: {{init_from: {start}}}\n")
    return complete_from_model(read(task, overrides)).config


LORA = {"finetune": {"strategy": "lora", "lora_rank": 4, "lora_alpha": 8.0, "lora_targets": ("up",)}}


def test_adapters_that_are_gone_on_with_are_those_of_the_start(start):
    f = asked(start, LORA, "finetune.strategy=lora").finetune
    assert (f.lora_rank, f.lora_alpha, f.lora_targets) == (4, 8.0, ("up",))
    f = asked(start, {}, "finetune.strategy=lora").finetune  # nothing is there yet to agree with
    assert (f.lora_rank, f.lora_alpha) == (8, 16.0)


@pytest.mark.parametrize(
    "wrong, key",
    [
        ("lora_rank=8", "finetune.lora_rank"),
        ("lora_alpha=16", "finetune.lora_alpha"),
        ("lora_targets=[query]", "finetune.lora_targets"),
    ],
)
def test_adapters_of_another_size_or_scale_are_refused(start, wrong, key):
    with pytest.raises(ConfigError) as refused:
        asked(start, LORA, "finetune.strategy=lora", f"finetune.{wrong}")
    assert [problem.key for problem in refused.value.problems] == [key]


def test_a_start_with_adapters_wants_lora_or_to_be_merged(start):
    with pytest.raises(
        ConfigError, match=r"expected a model without adapters.*Fix: .*roots export .*roots import MERGED RUN"
    ):
        asked(start, LORA)


@pytest.mark.parametrize("again", ["{}", "{}/", "{}/../run"])
def test_a_run_is_not_written_into_what_it_starts_from(start, again):
    with pytest.raises(ConfigError, match="track.folder = .*: expected another folder than finetune.init_from"):
        asked(start, {}, f"track.folder={again.format(start)}")


def test_a_run_that_has_begun_goes_on_without_its_start(start):
    gone, own = (
        start / "gone",
        {
            "model": {"hidden": 64, "heads": 2},
            "objective": {"name": "instruct"},
            "finetune": {"init_from": f"{start}/gone"},
        },
    )
    assert not gone.exists()
    c = asked(start, own, f"finetune.init_from={gone}", f"track.folder={start}")
    assert (c.model.hidden, c.objective.name, c.track.folder) == (64, "instruct", str(start))
    with pytest.raises(ConfigError, match="model.hidden = 128 .*: expected 64"):
        asked(start, own, f"finetune.init_from={gone}", f"track.folder={start}", "model.hidden=128")


@pytest.mark.parametrize(
    "words",
    [
        ("track.folder={}/new",),
        ("track.folder={}", "checkpoint.resume=false"),
        ("track.folder={}", "finetune.init_from={}/2"),
    ],
)
def test_a_run_that_begins_needs_its_start(start, words):
    own = {"finetune": {"init_from": f"{start}/gone"}}
    with pytest.raises(ConfigError, match="finetune.init_from = .*: expected the folder of a run or of an import"):
        asked(start, own, f"finetune.init_from={start}/gone", *(word.format(start) for word in words))
