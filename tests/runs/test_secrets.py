"""Secrets that are planted where users have them are in no file that a run and its report write, and on no terminal."""

from __future__ import annotations

import numpy as np
from commands import roots

from roots_dist.config.load import to_yaml
from roots_dist.config.schema import Config
from roots_dist.learning.data.store import Writer

IN_ENVIRONMENT = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_CanaryCanaryCanaryCanary01",
    "AWS_SECRET_ACCESS_KEY": "canary/aws+Secret02",
    "PGPASSWORD": "canary-pg-Password03",
    "MY_SERVICE_CREDENTIALS": "canary-credentials-04",
    "DATABASE_URL": "postgres://me:canary-url-Password05@db.example/x",
}
"""The last one's password is a secret, its name is not that of one."""
IN_CONFIG = {
    "track.name": "a run of https://me:canary-name-06@git.example/x",
    "track.group": "Authorization: Bearer canary.group.token07",
    "track.tags": [
        "plain",
        "api_key=canary-tag-08",
        "ghp_CanaryCanaryCanary09",
        "canary-pg-Password03",
        "x --token canary-opt-10",
    ],
}
CANARIES = [
    *(value for name, value in IN_ENVIRONMENT.items() if name != "DATABASE_URL"),
    *("canary-url-Password05", "canary-name-06", "canary.group.token07", "canary-tag-08"),
    *("ghp_CanaryCanaryCanary09", "canary-opt-10"),
]


def test_no_planted_secret_is_in_any_file_or_on_the_terminal(tmp_path):
    with Writer(tmp_path / "text", np.dtype("<u2")) as writer:
        writer.add(np.random.default_rng(0).integers(0, 31, 3000).astype("<u2"))
        writer.commit()
    config = Config.model_validate(
        {
            "model": {"layers": 2, "hidden": 32, "heads": 4, "vocab": 61},
            "data": {"train": str(tmp_path / "text"), "validation": str(tmp_path / "text"), "seq_length": 16},
            "train": {"steps": 4, "global_batch": 4, "device": "cpu", "eval_sequences": 4, "eval_every": 2},
            "checkpoint": {"every": 2},
            "track": {
                "folder": str(tmp_path / "out" / "run"),
                "wandb": "offline",
                "tensorboard": "on",
                "artifacts": True,
            },
        }
    )
    (tmp_path / "run.yaml").write_text(to_yaml(config.changed({"track.group": IN_CONFIG["track.group"]})))
    home = tmp_path / "out" / "home"
    home.mkdir(parents=True)
    variables = IN_ENVIRONMENT | {"HOME": home, "NETRC": home / "netrc"}
    words = [f"track.name={IN_CONFIG['track.name']!r}", f"track.tags={IN_CONFIG['track.tags']}"]
    said = ""
    for command in (
        ["train", str(tmp_path / "run.yaml"), *words],
        ["report", str(tmp_path / "out" / "run")],
    ):
        done = roots(*command, **variables)
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    written = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    leaks = [(canary, path) for path, content in written.items() for canary in CANARIES if canary.encode() in content]
    assert leaks == [] and not [canary for canary in CANARIES if canary in said]

    def files(pattern: str) -> list[bytes]:
        return [written[path] for path in (tmp_path / "out" / "run").glob(pattern)]

    for pattern in ("config.yaml", "wandb/offline-run-*/*.wandb", "tensorboard/events.*", "report.html"):
        (content,) = files(pattern)  # what is no secret stays
        assert b"a run of https://***@git.example/x" in content and b"plain" in content, pattern
    assert files("metrics.jsonl") and files("origin.json") and files("checkpoints/*/state.json") and len(written) > 15
