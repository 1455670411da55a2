"""A run whose numbers leave the finite: said once, in one line, by exit code, and in the run's folder."""

import numpy as np
from commands import roots

from roots_dist.config.load import to_yaml
from roots_dist.config.schema import Config
from roots_dist.learning.data.store import Writer


def test_a_weight_that_is_not_finite_ends_two_ranks_with_one_line(tmp_path):
    with Writer(tmp_path / "text", np.dtype("<u2")) as writer:
        writer.add(np.arange(400, dtype="<u2") % 61)
        writer.commit()
    config = Config.model_validate(
        {
            "model": {"layers": 1, "hidden": 32, "heads": 4, "vocab": 61},
            "data": {"train": str(tmp_path / "text"), "seq_length": 8},
            "parallel": {"tp": 2},
            "train": {"steps": 5, "global_batch": 4, "device": "cpu"},
            "optim": {"lr": 1e30, "clip_grad": 0},
            "track": {"folder": str(tmp_path / "run"), "wandb": "disabled"},
        }
    )
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    found = roots("train", str(tmp_path / "run.yaml"), ranks=2)
    assert found.returncode == 2, found.stderr
    errors = [line for line in found.stderr.splitlines() if line.startswith("✗")]
    assert len(errors) == 1 and "Traceback" not in found.stderr
    assert (
        errors[0].startswith("✗ step 2: ")
        and " on rank 0 (pp0 dp0 tp0). " in errors[0]
        and "Fix: lower optim.lr" in errors[0]
    )
    traces = sorted((tmp_path / "run" / "errors").iterdir())
    assert [path.name for path in traces] == ["rank_00000.txt", "rank_00001.txt"]
    assert all("NotFiniteError: step 2: " in path.read_text() for path in traces)
    assert not (tmp_path / "run" / "summary.json").exists()
