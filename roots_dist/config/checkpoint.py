"""Keys of checkpoints: how often they are saved, how many are kept, and what a failed save does."""

from __future__ import annotations

from pydantic import Field

from roots_dist.config.section import Section


class CheckpointConfig(Section):
    every: int = Field(0, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    asynchronous: bool = Field(
        True,
        description="training goes on while a checkpoint is written, from a copy in host memory; the last one is "
        "waited for",
    )
    resume: bool = Field(
        True,
        description="go on from the newest checkpoint of the run's folder; false begins anew and renames what is there",
    )
    max_failures: int = Field(
        10, ge=1, description="saves that may fail in a row (a full disk) before the run stops; each is tried again"
    )
    fallback_folder: str | None = Field(
        None,
        description="where a run that cannot save in its folder saves a last time before it stops; a folder, or a URL "
        "as s3://bucket/place",
    )
    url: str | None = Field(
        None,
        pattern=r"^[a-z0-9]+://.*[^/]",
        examples=["s3://bucket/runs/mine"],
        description="object store where checkpoints are, as s3://bucket/runs/mine, one for each run; default: they are "
        "in the run's folder",
    )
    run_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$",
        examples=["first-try"],
        description="with checkpoint.url: id of the run whose checkpoints are there, with which this one goes on where "
        "track.folder is new; default: the id in the run's folder, or a random one",
    )
