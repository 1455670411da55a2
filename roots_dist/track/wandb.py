"""Weights & Biases as one view of the run: never a prompt, never in training's way.

Without a key a run is written offline into the run's folder, and `wandb sync` sends it later. A server that does not
answer within INIT_TIMEOUT_S means offline, too. Whatever fails later is said once and ends tracking, not training.
"""

from __future__ import annotations

import importlib.util
import logging
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from roots_dist.config.schema import Config
from roots_dist.errors import needs
from roots_dist.track.scrub import scrub

log = logging.getLogger(__name__)

INIT_TIMEOUT_S, FINISH_TIMEOUT_S = 15.0, 60.0
ID_FILE = "wandb_id.txt"
Mode = Literal["online", "offline"]


def open_wandb(config: Config, folder: Path, facts: Mapping[str, object]) -> Wandb | None:
    """The run's tracker as `track.wandb` wants it, or None. On rank 0 only: one W&B run per job.

    Raises EnvironmentProblem if W&B was asked for by name and is not installed; with `auto` that is no error.
    """
    asked = config.track.wandb
    if asked == "disabled":
        return None
    if importlib.util.find_spec("wandb") is None:
        if asked == "auto":
            return None
        raise needs("wandb", "wandb")
    try:
        import wandb

        mode = _mode(wandb, asked)
        return Wandb(wandb, _begin(wandb, mode, config, folder, facts)) if mode else None
    except Exception as error:  # W&B raises many kinds; none of them is worth a training run
        log.warning("W&B is off for this run: %s", _first_line(error))
        return None


def _mode(wandb, asked: str) -> Mode | None:
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


def _begin(wandb, mode: Mode, config: Config, folder: Path, facts: Mapping[str, object]):
    """A W&B run of this folder: new, or the one that the folder has begun before."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    id_file = folder / ID_FILE
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4) + "\n")
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
    options = {
        "project": config.track.project,
        "name": config.track.name or folder.resolve().name,
        "tags": list(config.track.tags),
        "config": {**scrub(config.model_dump(mode="json")), "facts": scrub(facts)},
        "dir": str(folder),
        "id": id_file.read_text().strip(),
        "resume": "allow",
        "settings": settings,
    }
    if mode == "online":
        try:
            return wandb.init(mode="online", **options)
        except Exception as error:
            log.warning("W&B does not answer, the run is written offline: %s", _first_line(error))
            wandb.teardown()  # the attempt holds on to the run's id
    return wandb.init(mode="offline", **options)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class Wandb:
    """A tracker."""

    def __init__(self, wandb, run):
        self._wandb, self._run = wandb, run

    def _guard(self, call: Callable[[], object]) -> None:
        if self._run is None:
            return
        try:
            call()
        except Exception as error:
            self._run = None
            log.warning("W&B is off from here on: %s", _first_line(error))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._guard(lambda: self._run.log(dict(metrics), step=step))

    def text(self, step: int, name: str, text: str) -> None:
        """As preformatted HTML: W&B's own text panels drop line breaks."""
        safe = text.replace("&", "&amp;").replace("<", "&lt;")
        self._guard(lambda: self._run.log({name: self._wandb.Html(f"<pre>{safe}</pre>", inject=False)}, step=step))

    def close(self) -> None:
        self._guard(lambda: self._run.finish())
        self._run = None
