"""Weights & Biases as one view of the run: never a prompt, never in training's way (background.py calls all of this).

Without a key a run is written offline into the run's folder, and `wandb sync` sends it later. A server that does not
answer within INIT_TIMEOUT_S means offline, too. A restart goes on with the same W&B run.
"""

from __future__ import annotations

import importlib.util
import logging
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from roots_dist import environment
from roots_dist.config.schema import Config
from roots_dist.errors import missing_package
from roots_dist.runs.track.background import first_line
from roots_dist.scrub import scrub

if TYPE_CHECKING:
    from wandb import Run


log = logging.getLogger(__name__)

INIT_TIMEOUT_S, FINISH_TIMEOUT_S = 15.0, 25.0
ID_FILE = "wandb_id.txt"
NO_TELEMETRY = {"WANDB_ERROR_REPORTING": "false"}
"""Else the end of the process waits 20 s for a server that does not answer to take what W&B says of itself."""
Mode = Literal["online", "offline"]


def is_wanted(config: Config) -> bool:
    """Raises EnvironmentProblem if W&B was asked for by name and is not installed; with `auto` that is no error."""
    asked = config.track.wandb
    if asked == "disabled":
        return False
    if importlib.util.find_spec("wandb") is not None:
        return True
    if asked == "auto":
        return False
    raise missing_package("wandb", "wandb")


def open_wandb(
    config: Config, folder: Path, facts: Mapping[str, object], logged_step: int = -1, known: Collection[str] = ()
) -> Wandb | None:
    """The run's tracker as `track.wandb` wants it, or None. On rank 0 only: one W&B run per job.

    Nothing up to and with `logged_step` is logged again. known: secrets that nothing may show.
    """
    if not is_wanted(config):
        return None
    environment.export(NO_TELEMETRY, replace=False)
    import wandb

    mode = _mode(wandb, config.track.wandb)
    if mode is None:
        return None
    return Wandb(wandb, _begin(wandb, mode, config, Path(folder), facts, known), logged_step, config.track.artifacts)


def _mode(wandb: ModuleType, asked: str) -> Mode | None:
    """Offline without a key. `auto` follows WANDB_MODE, which wandb reads itself."""
    wanted = wandb.setup(wandb.Settings(silent=True)).settings.mode if asked == "auto" else asked
    if wanted == "disabled":
        return None
    if wanted == "offline":
        return "offline"
    if wandb.login(prompt=False, verify=False):
        return "online"
    if asked == "online":
        log.warning("track.wandb = 'online', but there is no W&B key: the run is written offline. Fix: wandb login.")
    return "offline"


def _begin(
    wandb: ModuleType, mode: Mode, config: Config, folder: Path, facts: Mapping[str, object], known: Collection[str]
) -> Run:
    """A W&B run of this folder: new, or the one that the folder has begun before."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
        console="off",  # output stays on the terminal and in the log
        silent=True,
        disable_git=True,  # remotes hold passwords
        disable_code=True,
        save_code=False,
        x_disable_meta=True,  # the command line, which holds secrets; `facts` says what is worth knowing
    )
    track = config.track
    shown = scrub({"project": track.project, "name": track.name or folder.resolve().name, "group": track.group}, known)
    options: dict[str, Any] = {
        **shown,
        "tags": scrub(list(track.tags), known),
        "config": scrub({**config.model_dump(mode="json"), "facts": facts}, known),
        "dir": str(folder),
        "id": _identity(folder / ID_FILE, anew=not config.checkpoint.resume),
        "resume": "allow",
        "settings": settings,
    }
    if mode == "online":
        try:
            online: Run = wandb.init(mode="online", **options)
            return online
        except Exception as error:
            log.warning("W&B does not answer, the run is written offline: %s", first_line(error))
            wandb.teardown()  # the attempt holds on to the run's id
    offline: Run = wandb.init(mode="offline", **options)
    return offline


def _identity(file: Path, anew: bool) -> str:
    """Kept in the run's folder. A run that begins anew there is another one."""
    if anew or not file.exists():
        file.write_text(secrets.token_hex(4) + "\n")
    return file.read_text().strip()


class Wandb:
    """A tracker. What W&B raises comes through: background.py takes care of it."""

    def __init__(self, wandb: ModuleType, run: Run, logged_step: int = -1, artifacts: bool = False):
        self._wandb, self._run, self._logged, self._artifacts = wandb, run, logged_step, artifacts
        self._validations: list[dict[str, float]] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if "loss/validation" in metrics:
            self._validations.append({"step": step, **metrics})
        if step > self._logged:
            self._run.log(dict(metrics), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """As preformatted HTML: W&B's own text panels drop line breaks."""
        safe = text.replace("&", "&amp;").replace("<", "&lt;")
        if step > self._logged:
            self._run.log({name: self._wandb.Html(f"<pre>{safe}</pre>", inject=False)}, step=step)

    def checkpoint(self, step: int, path: Path) -> None:
        """As an artifact by reference: its place and step, none of its bytes."""
        if not self._artifacts or not path.is_dir():  # newer ones have taken its place
            return
        artifact = self._wandb.Artifact(f"checkpoint-{self._run.id}", type="model", metadata={"step": step})
        artifact.add_reference(path.resolve().as_uri(), checksum=False)
        self._run.log_artifact(artifact, aliases=["latest", f"step-{step}"])

    def close(self) -> None:
        if self._validations:
            columns = list(self._validations[0])
            rows = [[record.get(name) for name in columns] for record in self._validations]
            self._run.log({"validation": self._wandb.Table(columns=columns, data=rows)})
        self._run.finish()
