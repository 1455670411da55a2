"""EleutherAI's lm-evaluation-harness on a run's live model, in any layout: `roots evaluate RUN --lm-eval TASKS`.

    names --open_tasks--> Tasks --simple_evaluate, on every rank alike--> harness_model.py --> results, RUN/lm_eval.json

Every rank makes the same requests in the same order, so the model's collectives match; lm_eval itself sees one process.
Custom tasks are YAML files in a folder with rows in jsonl, and need no network.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any

from roots_dist import environment
from roots_dist.assembly.passes import Passes
from roots_dist.errors import DataError, Problem, missing_package
from roots_dist.files import write_atomically
from roots_dist.logs import still_busy
from roots_dist.runs.evaluate.harness_model import harness_model
from roots_dist.runs.evaluate.options import EvaluateOptions

RESULTS_FILE = "lm_eval.json"
DRAWS = 1000
"""Number of bootstrap draws, for standard errors that have no formula."""


@dataclass(frozen=True)
class Tasks:
    names: list[str]
    manager: object
    """TaskManager that has loaded them."""


def open_tasks(options: EvaluateOptions, rank: int) -> Tasks:
    """Open the tasks of --include-path, else those that lm_eval ships. Raises DataError for a task that is unknown or
    cannot be loaded."""
    environment.export({"DISABLE_MULTIPROC": "1"})  # otherwise its bootstrap forks while threads hold a process group
    with _quiet(rank):
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise missing_package("lm-eval", "evaluation") from None

        class LoadedOnce(TaskManager):
            loaded: Any = None

            def load(self, names: list[str]) -> Any:
                self.loaded = self.loaded or super().load(names)  # simple_evaluate loads them again
                return self.loaded

        if options.include_path is not None and not Path(options.include_path).is_dir():
            fix = "name the folder that holds the tasks' YAML files"
            raise DataError(Problem(key="--include-path", found=options.include_path, expected="a folder", fix=fix))
        manager = LoadedOnce(include_path=options.include_path, include_defaults=options.include_path is None)
        names = check_task_names(manager.all_tasks, options.tasks)
        try:
            manager.load(names)
        except (OSError, ValueError, KeyError, ImportError) as error:  # what datasets and YAML raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            fix = (
                "check its YAML and data; HF_HUB_OFFLINE=0 lets several processes download; --include-path needs "
                "no network"
            )
            problem = Problem(
                key="--lm-eval", found=",".join(names), expected=f"tasks that can be loaded ({reason})", fix=fix
            )
            raise DataError(problem) from error
    return Tasks(names, manager)


def run_harness(passes: Passes, tasks: Tasks, limit: int | None, run: Path) -> dict[str, Any]:
    """Run the tasks and return lm_eval's results; {} on all ranks but the first, which writes them into the run's
    folder. `limit` is the number of examples per task. Collective over the world."""
    from lm_eval import simple_evaluate

    with _quiet(passes.mesh.rank):
        results: dict[str, Any] = simple_evaluate(
            harness_model(passes),
            tasks=tasks.names,
            task_manager=tasks.manager,
            limit=limit,
            bootstrap_iters=DRAWS,
            log_samples=False,
        )
    if passes.mesh.rank:
        return {}
    _write(results, run / RESULTS_FILE)
    return results


def check_task_names(available: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The wanted names without duplicates. Raises DataError for one that is not available."""
    for name in wanted:
        if name not in available:
            near = get_close_matches(name, available, n=3)
            few = near or (list(available) if len(available) <= 8 else [])
            fix = (
                f"choose from {', '.join(few)}"
                if few
                else "see `lm-eval ls tasks`, or give your own with --include-path"
            )
            raise DataError(Problem(key="--lm-eval", found=name, expected="the name of a task", fix=fix))
    return list(dict.fromkeys(wanted))


@contextmanager
def _quiet(rank: int) -> Iterator[None]:
    """Show lm_eval's warnings on one rank only, and its progress bars only on a terminal: elsewhere a line now and
    then."""
    log, before = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").handlers[:]
    log.setLevel(logging.WARNING)
    with ExitStack() as stack:
        if rank or not sys.stderr.isatty():
            handler = logging.NullHandler() if rank else logging.StreamHandler(sys.stderr)
            log.handlers, log.propagate = [handler], False
            if rank == 0:
                stderr = sys.stderr
                stack.enter_context(still_busy("lm-eval", lambda text: stderr.write(f"{text}\n")))
            stack.enter_context(redirect_stderr(StringIO()))
            stack.enter_context(redirect_stdout(StringIO()))
        try:
            yield
        finally:
            log.handlers, log.propagate = before, True


def _write(results: dict[str, Any], path: Path) -> None:
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(results, indent=1, default=handle_non_serializable, ensure_ascii=False)
    write_atomically(path, text + "\n")
