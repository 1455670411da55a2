"""What README and docs say is so: commands parse and their configs work out, quick ones print what is shown, links
lead somewhere, generated pages are up to date, and help is quick."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer.main

from roots_dist.assembly.run import build_run
from roots_dist.checks.checks import check
from roots_dist.cli.main import app
from roots_dist.config.load import load
from roots_dist.config.schema import Config
from roots_dist.config.sections import ObjectiveConfig
from roots_dist.learning.data.batches import Batches
from roots_dist.learning.data.prepare import prepare
from roots_dist.runs.train.step import train_step
from roots_dist.schedule.schedules import SCHEDULES, expected_bubble
from roots_dist.storage.exchange import ARCHITECTURES
from roots_dist.world.mesh import Mesh

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SUBCOMMANDS = typer.main.get_command(app).commands
COMMAND = re.compile(r"(?:\$ )?((?:roots|make|torchrun|deepspeed|mpirun|srun) .*)")
WORLD = {"--nnodes", "--nproc-per-node", "--num_accelerators", "-n", "--ntasks", "--processes"}


@dataclass(frozen=True)
class Shown:
    """A command line of a page, and the lines below it up to the next command or the block's end."""

    page: Path
    words: tuple[str, ...]
    output: str

    def __str__(self) -> str:
        return f"{self.page.name}: {' '.join(self.words)}"

    @property
    def arguments(self) -> list[str]:
        """The arguments of `roots`, whoever starts it."""
        return list(self.words[1 + (self.words.index("roots_dist") if "roots_dist" in self.words else 0) :])

    @property
    def refused(self) -> bool:
        return self.output.startswith("✗")


def blocks(page: Path) -> Iterator[list[str]]:
    """Code blocks, fenced or indented."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    yield from (body.splitlines() for language, body in fenced if language not in ("python", "yaml"))
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    yield from ([line[4:] for line in body.splitlines()] for body in re.findall(r"(?:^ {4}.+\n)+", rest, re.M))


def shown(page: Path) -> Iterator[Shown]:
    for lines in blocks(page):
        starts = [i for i, line in enumerate(lines) if COMMAND.fullmatch(line)]
        for start, end in zip(starts, [*starts[1:], len(lines)]):
            words = shlex.split(COMMAND.fullmatch(lines[start])[1], comments=True)
            yield Shown(page, tuple(words), "\n".join(lines[start + 1 : end]).strip())


COMMANDS = [command for page in PAGES for command in shown(page)]
ROOTS = [command for command in COMMANDS if command.words[0] != "make"]
RUNS = [c for c in ROOTS if c.arguments[0] in ("train", "verify") and not c.refused]
QUICK = [c for c in ROOTS if c.refused or c.arguments[0] == "schedule" or "--print-config" in c.words]


def parsed(arguments: list[str]) -> dict[str, object]:
    """The values of a command's parameters. Raises click's UsageError for an unknown option or a missing argument."""
    name, *rest = arguments
    return SUBCOMMANDS[name].make_context(name, rest).params


def roots(*arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environ |= {"PYTHONPATH": str(ROOT), "COLUMNS": "120", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "roots_dist", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=250)


def test_the_pages_show_commands_of_every_kind():
    """Else the tests below would pass on pages that they cannot read."""
    assert {c.arguments[0] for c in ROOTS} >= {*SUBCOMMANDS}
    assert {c.words[0] for c in COMMANDS} >= {"roots", "make", "torchrun", "deepspeed", "mpirun", "srun"}
    assert any(c.refused for c in COMMANDS) and QUICK and RUNS


@pytest.mark.parametrize("command", ROOTS, ids=str)
def test_a_command_parses(command):
    assert parsed(command.arguments)


@pytest.mark.parametrize("command", RUNS, ids=str)
def test_the_config_of_a_command_works_out_on_its_world(command):
    given = parsed(command.arguments)
    config = load(ROOT / given["config"], given["overrides"] or ())
    words = list(command.words)
    sizes = [int(words[i + 1]) for i, word in enumerate(words) if word in WORLD]
    world = math.prod(sizes) if sizes else config.parallel.ranks_per_sample()
    assert check(config, world) == []


@pytest.mark.parametrize("command", QUICK, ids=str)
def test_a_quick_command_prints_what_is_shown(command, tmp_path):
    arguments = [str(tmp_path / "picture.png") if word.endswith(".png") else word for word in command.arguments]
    found = roots(*arguments)
    assert found.returncode == (2 if command.refused else 0), found.stderr
    printed = "\n".join(line.rstrip() for line in (found.stderr if command.refused else found.stdout).splitlines())
    assert command.output in printed.replace(str(ROOT), "/home/me/roots")
    assert (tmp_path / "picture.png").exists() == ("--png" in arguments)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.words[0] == "make"], ids=str)
def test_make_knows_the_target_and_reads_the_variables(command):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in command.words[1:]:
        name, is_variable, _ = word.partition("=")
        assert f"$({name}" in makefile or f" {name})" in makefile if is_variable else f"\n{name}:" in makefile, word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_inline_code_names_commands_and_targets_that_exist(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for program, word in re.findall(r"`(roots|make) ([a-z]+)", text):
        assert word in SUBCOMMANDS if program == "roots" else f"\n{word}:" in (ROOT / "Makefile").read_text(), word


def test_the_page_of_config_keys_is_what_the_tree_says():
    made = maker("make_config")
    assert made.PAGE.read_text(encoding="utf-8") == made.page(), "run: python docs/make_config.py"


def test_the_readme_counts_the_model_types_that_are_imported():
    said = re.findall(r"(\d+) model types", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert said == [str(len(ARCHITECTURES))]


def test_the_page_of_trust_says_what_was_counted():
    made = maker("make_trust")
    assert made.PAGE.read_text(encoding="utf-8") == made.page(), "run: python docs/make_trust.py"


def test_the_page_of_exact_runs_says_what_was_measured():
    made = maker("make_exact")
    assert made.PAGE.read_text(encoding="utf-8") == made.page(), "run: python docs/make_exact.py"


def maker(name: str):
    """A program of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_the_house_is_drawn_from_the_architecture_test():
    made = maker("make_house")
    assert made.PICTURE.read_text(encoding="utf-8") == made.picture(), "run: python docs/make_house.py"


def test_the_picture_of_the_axes_is_drawn_by_its_program():
    made = maker("make_axes")
    assert made.PICTURE.read_text(encoding="utf-8") == made.picture(), "run: python docs/make_axes.py"


def test_a_token_goes_through_the_files_of_the_house_in_their_order(tmp_path):
    """One step of one process enters the files of docs/house.md in its order. The first, prepare.py, made the
    corpus."""
    files = [f"{room.replace('.', '/')}/{file}" for room, file in maker("make_house").WAY]
    page = (ROOT / "docs" / "house.md").read_text(encoding="utf-8").split("## The way of a token")[1]
    assert re.findall(r"^\d\. \[`([\w/.]+)`\]", page, re.M) == files and len(files) <= 7
    prepare(["embedded:human-rights"], tmp_path, vocab=400)
    config = Config.model_validate(
        {
            "model": {"layers": 1, "hidden": 8, "heads": 1, "vocab": 400},
            "data": {"train": str(tmp_path / "train_text_document"), "seq_length": 16},
            "train": {"global_batch": 2, "device": "cpu"},
        }
    )
    run = build_run(config, Mesh.single())
    entered: dict[str, None] = {}

    def note(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT / "roots_dist") and frame.f_code.co_name != "<module>":
            entered.setdefault(str(path.relative_to(ROOT / "roots_dist")))

    batches = Batches.open(config, run.objective, config.data.train, 0, 1)
    sys.setprofile(note)
    try:
        train_step(run, batches.at(0), 1e-3)
    finally:
        sys.setprofile(None)
    assert [name for name in entered if name in files] == files[1:]


def test_the_page_of_objectives_shows_a_whole_one_in_under_60_lines():
    page = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    whole = (ROOT / "roots_dist" / "learning" / "objectives" / "prefix.py").read_text(encoding="utf-8")
    assert f"```python\n{whole}```" in page and f"in {len(whole.splitlines())} lines" in page
    assert len(whole.splitlines()) < 60
    names = re.findall(r"`([\w-]+)`", " ".join(re.findall(r"^\| (`.*?) \|", page, re.M)))
    assert {*names} == {*ObjectiveConfig.model_fields["name"].annotation.__args__}


SCHEDULES_PAGE = (ROOT / "docs" / "schedules.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", re.findall(r"^## `(.+?)`", SCHEDULES_PAGE, re.M))
def test_the_page_of_schedules_says_the_bubble_of_its_picture(name):
    page, chunks = SCHEDULES_PAGE, 2 if SCHEDULES[name].virtual_stages else 1
    part = page.split(f"## `{name}`")[1].split("\n## ")[0]
    said = re.findall(r"= ([\d.]+) % here", part) or re.findall(r"= ([\d.]+) % here", page)[:1]  # 1f1b: "the same"
    assert said == [f"{100 * expected_bubble(name, 4, 8, chunks):.1f}"]


def test_help_imports_what_its_library_does_and_little_of_ours():
    """So that it costs what an empty program's would. Its seconds are no measure on a machine that others use as
    well."""
    empty = "import typer; app = typer.Typer(rich_markup_mode=None, add_completion=False); app.command()(lambda: None)"
    imported = []
    for program in (empty, "from roots_dist.cli.main import app"):
        code = (
            f"import sys; {program}; app(['--help'], standalone_mode=False); print(*sys.modules, sep='\\n', "
            "file=sys.stderr)"
        )
        shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert shown.returncode == 0 and "Usage" in shown.stdout
        imported.append(shown.stderr.split())
    theirs, more = {*imported[0]}, {*imported[1]} - {*imported[0]}
    assert {name.split(".")[0] for name in more} - {*sys.stdlib_module_names} == {"roots_dist"}
    ours = {name.split(".")[1] for name in more if name.startswith("roots_dist.")}
    assert ours <= {"cli", "errors", "runs"} and len(more) < len(theirs) / 4, (
        more
    )  # a file for each command, and for its options
