"""Weights & Biases as a view of the run: it never prompts and never delays training (background.py calls all of this).

Without a key the run is written offline into its folder, and `wandb sync` sends it later; the same holds if the server
does not answer within INIT_TIMEOUT_S. A restart continues the same W&B run.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from roots_dist import environment
from roots_dist.config.schema import Config
from roots_dist.files import read_plain, write_atomically
from roots_dist.runs.track.background import first_line
from roots_dist.runs.track.tracker import is_wanted
from roots_dist.scrub import scrub
from roots_dist.storage.checkpoint.object_store import Place

if TYPE_CHECKING:
    from wandb import Run


log = logging.getLogger(__name__)

INIT_TIMEOUT_S, FINISH_TIMEOUT_S = 15.0, 25.0
ID_FILE = "wandb_id.txt"
NO_TELEMETRY = {"WANDB_ERROR_REPORTING": "false"}
"""Variable that turns off W&B's own error reporting, for which the end of the process waits 20 s if the server does not
answer."""
Mode = Literal["online", "offline"]


def open_wandb(
    config: Config, folder: Path, facts: Mapping[str, object], logged_step: int = -1, known: Collection[str] = ()
) -> Wandb | None:
    """Open the W&B tracker as `track.wandb` says, or return None. Only rank 0 calls it: one W&B run per job.

    Nothing up to and including `logged_step` is logged again. `known` are secrets that must not be shown.
    """
    if not is_wanted("wandb", config.track.wandb):
        return None
    environment.export(NO_TELEMETRY, replace=False)
    import wandb

    mode = _mode(wandb, config.track.wandb)
    if mode is None:
        return None
    return Wandb(wandb, _begin(wandb, mode, config, Path(folder), facts, known), logged_step, config.track.artifacts)


def _mode(wandb: ModuleType, setting: str) -> Mode | None:
    """Mode of the W&B run; offline without a key. `auto` follows WANDB_MODE, which wandb reads itself."""
    wanted = wandb.setup(wandb.Settings(silent=True)).settings.mode if setting == "auto" else setting
    if wanted == "disabled":
        return None
    if wanted == "offline":
        return "offline"
    if wandb.login(prompt=False, verify=False):
        return "online"
    if setting == "online":
        log.warning("track.wandb = 'online', and there is no W&B key, so the run is written offline. Fix: wandb login.")
    return "offline"


def _begin(
    wandb: ModuleType, mode: Mode, config: Config, folder: Path, facts: Mapping[str, object], known: Collection[str]
) -> Run:
    """Start a W&B run for this folder, or continue the one that the folder has."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
        console="off",  # output stays on the terminal and in the log
        silent=True,
        disable_git=True,  # remotes hold passwords
        disable_code=True,
        save_code=False,
        x_disable_meta=True,  # the command line may hold secrets; `facts` has what is needed
    )
    track = config.track
    shown = scrub({"project": track.project, "name": track.name or folder.resolve().name, "group": track.group}, known)
    options: dict[str, Any] = {
        **shown,
        "tags": scrub(list(track.tags), known),
        "config": scrub({**config.model_dump(mode="json"), "facts": facts}, known),
        "dir": str(folder),
        "id": _identity(folder / ID_FILE, is_new=not config.checkpoint.resume),
        "resume": "allow",
        "settings": settings,
    }
    if mode == "online":
        try:
            online: Run = wandb.init(mode="online", **options)
            return online
        except Exception as error:
            log.warning("W&B does not answer, so the run is written offline: %s", first_line(error))
            wandb.teardown()  # the failed attempt keeps the run's id
    offline: Run = wandb.init(mode="offline", **options)
    return offline


def _identity(file: Path, is_new: bool) -> str:
    """Id of the W&B run, kept in the run's folder. A run that starts from scratch gets a new one."""
    try:
        kept = "" if is_new else read_plain(file).decode().strip()
    except (FileNotFoundError, UnicodeDecodeError):
        kept = ""
    if not kept:
        kept = secrets.token_hex(4)
        write_atomically(file, kept + "\n")
    return kept


class Wandb:
    """A tracker. Exceptions of W&B are passed on: background.py handles them."""

    def __init__(self, wandb: ModuleType, run: Run, logged_step: int = -1, artifacts: bool = False):
        self._wandb, self._run, self._logged, self._artifacts = wandb, run, logged_step, artifacts
        self._validations: list[dict[str, float]] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if "loss/validation" in metrics:
            self._validations.append({"step": step, **metrics})
        if step > self._logged:
            self._run.log(dict(metrics), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """Log the text as preformatted HTML: W&B's own text panels drop line breaks."""
        safe = text.replace("&", "&amp;").replace("<", "&lt;")
        if step > self._logged:
            self._run.log({name: self._wandb.Html(f"<pre>{safe}</pre>", inject=False)}, step=step)

    def checkpoint(self, step: int, path: Place) -> None:
        """Log the checkpoint as an artifact by reference: its path and step, none of its bytes."""
        if not self._artifacts or not path.is_dir():  # newer ones have taken its place
            return
        artifact = self._wandb.Artifact(f"checkpoint-{self._run.id}", type="model", metadata={"step": step})
        uri = path.resolve().as_uri() if isinstance(path, Path) else str(path)
        artifact.add_reference(uri, checksum=False)
        self._run.log_artifact(artifact, aliases=["latest", f"step-{step}"])

    def close(self) -> None:
        if self._validations:
            columns = list(self._validations[0])
            rows = [[record.get(name) for name in columns] for record in self._validations]
            self._run.log({"validation": self._wandb.Table(columns=columns, data=rows)})
        self._run.finish()
