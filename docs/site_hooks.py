"""What mkdocs cannot do: the pages that are made from the code, and the files beside docs/ that pages link to.

docs/*.md link to ../configs and ../roots_dist, as a reader of the repository wants it. On the site these are copies as
text under source/; a folder is a page with its files.
"""

from __future__ import annotations

import posixpath
import re
import subprocess
from pathlib import Path

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

from roots_dist.cli.main import app

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))|(src=\")([^\"]+)(\")")
PYTHON = """# Python

What `import roots_dist` gives, from its docstrings. [In Python](python.md) has examples, [extensions](extensions.md)
the records of a user's file, [what is public](api.md) the layers, schedules and the proof.

""" + "\n".join(
    f"::: {name}\n"
    for name in (
        "roots_dist.api.model.load",
        "roots_dist.api.model.Model",
        "roots_dist.api.model.TextScore",
        "roots_dist.api.training.read_config",
        "roots_dist.api.training.batches",
        "roots_dist.api.training.training",
        "roots_dist.api.training.Training",
        "roots_dist.runs.train.step.StepReport",
        "roots_dist.api.training.train",
        "roots_dist.api.training.Moment",
        "roots_dist.world.batch.MicroBatch",
        "roots_dist.config.extensions.Extension",
        "roots_dist.config.extensions.NewObjective",
        "roots_dist.config.extensions.NewFamily",
        "roots_dist.errors.UserError",
    )
)


def commands() -> str:
    """Every command with its options, as `--help` says them."""
    command = typer.main.get_command(app)
    with typer.Context(command, info_name="roots") as context:
        text = get_docs_for_click(obj=command, ctx=context, name="roots", title="Commands")
    text = re.sub(r"\x08\n((?:.+\n)+)", lambda m: "```sh\n" + re.sub(r"(?m)^ +", "", m[1]) + "```\n", text)
    return text.replace("\x08", "")


def target(page: str, link: str) -> str | None:
    """Where a page's link to a file beside docs/ leads on the site; None for any other link."""
    if re.match(r"[a-z]+:", link) or link.startswith("#"):
        return None
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    if path.startswith("docs/") and (path.endswith((".md", ".png", ".svg", ".ipynb")) or path == "docs/"):
        return None
    if path == "README.md":
        return "index.md"
    if path == "docs/decisions":
        return "decisions/README.md"
    return f"source/{path}.md" if (ROOT / path).is_dir() else f"source/{path.lstrip('.')}.txt"  # mkdocs hides .files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages made from the code, and every tracked file that a page may link to."""
    files.append(File.generated(config, "reference-cli.md", content=commands()))
    files.append(File.generated(config, "reference-python.md", content=PYTHON))
    wanted: dict[str, str] = {}
    for file in [file for file in files if file.src_uri.endswith(".md") and file.generated_by is None]:
        for match in LINK.finditer(file.content_string):
            link = match[2] or match[5]
            if found := target(file.src_uri, link):
                wanted[found] = posixpath.normpath(posixpath.join("docs", posixpath.dirname(file.src_uri), link))
    for name, path in wanted.items():
        if name.startswith("source/"):
            files.append(File.generated(config, name, content=source(path)))
    return files


def source(path: str) -> str:
    """A file's text, or the list of a folder's files."""
    if not (ROOT / path).is_dir():
        return (ROOT / path).read_text(encoding="utf-8")
    listed = subprocess.run(["git", "ls-files", path], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return f"# {path}\n\n" + "\n".join(f"- `{line}`" for line in listed.splitlines())


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to files beside docs/ to their copies."""

    def led(match: re.Match[str]) -> str:
        before, link, after = (match[1], match[2], match[3]) if match[2] else (match[4], match[5], match[6])
        found = target(page.file.src_uri, link)
        if found is None:
            return match[0]
        relative = posixpath.relpath(found, posixpath.dirname(page.file.src_uri) or ".")
        anchor = "" if found == "index.md" or found.endswith(".txt") else after[:-1]
        return f"{before}{relative}{anchor}{after[-1]}"

    return LINK.sub(led, markdown)
