"""The rules of the house, read from the syntax tree: floors, no globals, one reader of the environment, small files."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "roots_dist"
FLOORS = (
    (
        "facts",
        (
            "errors",
            "slurm",
            "files",
            "idx_format",
            "failures",
            "environment",
            "scrub",
            "layout",
            "logs",
            "cluster_profile",
        ),
    ),
    ("facts of a run", ("schedule", "config", "accounting", "checks")),
    ("the live world", ("world",)),
    ("the parallelisms", ("parallel.optim", "parallel.tensor", "parallel.pipeline", "parallel.zero")),
    ("what is learned, from what", ("learning.models", "learning.data", "learning.objectives")),
    ("one rank's model", ("assembly",)),
    ("what is kept", ("storage.checkpoint", "storage.exchange")),
    (
        "runs",
        (
            "runs.ranks",
            "runs.track",
            "runs.generate",
            "runs.evaluate",
            "runs.plan",
            "runs.train",
            "runs.launch",
            "runs.doctor",
            "runs.report",
        ),
    ),
    ("the proof", ("testing", "verify")),
    ("the command line", ("cli", "__main__")),
    ("in Python", ("api",)),
)
"""Every room of the package, lowest first: a room imports itself and what stands before it. No exceptions."""
ORDER = tuple(room for _, rooms in FLOORS for room in rooms)
LIGHT = {"facts", "facts of a run", "the command line"}
"""Floors on which nothing heavy is imported when a file is: a login node checks a run in 0.2 s."""
HEAVY = {"torch", "deepspeed", "transformers", "datasets", "wandb", "matplotlib", "numpy", "tokenizers", "safetensors"}
ENVIRON = {
    "environment.py",  # the one reader
    "testing/world.py",  # gives each test rank the variables that a launcher would
}
ENVIRON_NAMES = {"environ", "environb", "getenv", "putenv"}
PRINTS = {"runs/track", "failures.py", "runs/ranks/local.py"}
"""Who speaks to a terminal: commands, progress, and the last words of a rank that fails."""
LONGEST = 350
IMPORTS = (ast.Import, ast.ImportFrom)

FILES = sorted(PACKAGE.rglob("*.py"))


def of_every_file(rule: Callable[[Path], None]) -> Callable[[], None]:
    """A test that says of each file in which way it breaks the rule."""

    def test() -> None:
        broken = [told for path in FILES if (told := how_broken(rule, path))]
        assert not broken, "\n".join(broken)

    test.__doc__ = rule.__doc__
    return test


def how_broken(rule: Callable[[Path], None], path: Path) -> str:
    try:
        rule(path)
    except AssertionError as error:
        return f"{path.relative_to(PACKAGE)}: {error}"
    return ""


def name_of(path: Path) -> str:
    """`schedule.check` for schedule/check.py, `parallel.pipeline` for parallel/pipeline/__init__.py."""
    return (
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".") or "roots_dist"
    )


def room_of(name: str) -> str:
    fits = [room for room in ORDER if f"{name}.".startswith(f"{room}.")]
    assert len(fits) == 1, f"roots_dist.{name} is in no room: add it to FLOORS"
    return fits[0]


def is_room(name: str) -> bool:
    """Not so the package itself and the folders around rooms, which are empty."""
    return any(f"{name}.".startswith(f"{room}.") for room in ORDER)


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Every imported module with its full name, and whether it is imported when the file is."""
    late = [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    ]
    inside = {id(inner) for node in late for inner in ast.walk(node) if isinstance(inner, IMPORTS)}
    for node in (node for node in ast.walk(tree) if isinstance(node, IMPORTS)):
        at_import = id(node) not in inside
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the full name"
            module = node.module or ""
            for alias in node.names:
                inner = PACKAGE.joinpath(*module.split(".")[1:], alias.name)
                is_module = module.startswith("roots_dist") and (inner.with_suffix(".py").exists() or inner.is_dir())
                yield (f"{module}.{alias.name}" if is_module else module), at_import


@functools.cache
def own_imports(path: Path) -> set[str]:
    """Late imports and those for type checkers are counted too: they are dependencies all the same."""
    return {n.removeprefix("roots_dist.") for n, _ in imports(tree_of(path)) if n.startswith("roots_dist.")}


@of_every_file
def test_a_module_imports_only_from_its_own_room_or_a_lower_one(path):
    name = name_of(path)
    if name == "roots_dist":
        early = [there for there, at_import in imports(tree_of(path)) if at_import]
        assert set(early) <= {"__future__", "importlib", "typing"}, f"{early}: `import roots_dist` takes no time"
        return
    if not is_room(name):
        assert not list(imports(tree_of(path))), f"{path} is the folder around rooms: keep it empty"
        return
    mine = ORDER.index(room_of(name))
    upward = sorted(there for there in own_imports(path) if ORDER.index(room_of(there)) > mine)
    assert not upward, f"{name} (in {room_of(name)}) imports {upward} from above: move the shared part down"


@of_every_file
def test_no_module_imports_a_name_of_the_package_itself(path):
    """`from roots_dist import load` leads to the highest room, out of sight of the floors: __init__.py imports late."""
    for module, name in ((module, name) for node in ast.walk(tree_of(path)) for module, name in names_of_package(node)):
        assert name == "__version__", f"{module} {name}: import it from the module that defines it"


def names_of_package(node: ast.AST) -> Iterator[tuple[str, str]]:
    """What an import takes from `roots_dist` that is no module of it."""
    if isinstance(node, ast.Import):
        yield from (("import", a.name) for a in node.names if a.name.partition(".")[0] == "roots_dist")
    elif isinstance(node, ast.ImportFrom) and node.module == "roots_dist":
        modules = {file.relative_to(PACKAGE).with_suffix("").parts[0] for file in FILES}
        yield from (("from roots_dist import", a.name) for a in node.names if a.name not in modules)


@pytest.mark.parametrize("of", ["files", "rooms", "folders"])
def test_the_package_graph_has_no_cycle(of):
    """Whatever FLOORS says, late imports included. A cycle is told with the files that make its arrows."""

    def part(name: str) -> str:
        return name if of == "files" else room_of(name) if of == "rooms" else name.partition(".")[0]

    arrows: dict[str, dict[str, str]] = {}
    for name, path in ((name_of(path), path) for path in FILES if is_room(name_of(path))):
        for there in own_imports(path):
            if part(there) != part(name):
                arrows.setdefault(part(name), {}).setdefault(part(there), name)
    cycle = cycle_in(arrows)
    assert not cycle, "imports go round: " + ", ".join(
        f"{arrows[a][b]} imports {b}" for a, b in zip(cycle, cycle[1:] + cycle[:1])
    )


def cycle_in(arrows: Mapping[str, Mapping[str, object]]) -> list[str]:
    """The nodes of a cycle in order, or none."""
    over: set[str] = set()

    def walk(node: str, way: list[str]) -> list[str]:
        if node in way:
            return way[way.index(node) :]
        if node in over:
            return []
        found = next((cycle for there in sorted(arrows.get(node, ())) if (cycle := walk(there, [*way, node]))), [])
        over.add(node)
        return found

    return next((cycle for node in sorted(arrows) if (cycle := walk(node, []))), [])


def test_a_cycle_is_found_and_told():
    assert cycle_in({"a": {"b": 0}, "b": {"c": 0}, "c": {}}) == []
    assert cycle_in({"a": {"b": 0}, "b": {"c": 0}, "c": {"d": 0, "b": 0}}) == ["b", "c"]


@of_every_file
def test_facts_and_commands_start_without_heavy_packages(path):
    name = name_of(path)
    floor = {room: title for title, rooms in FLOORS for room in rooms}
    if not is_room(name) or floor[room_of(name)] not in LIGHT:
        return
    heavy = {name for name, at_import in imports(tree_of(path)) if at_import and name.split(".")[0] in HEAVY}
    assert not heavy, f"{path.name} imports {sorted(heavy)} when it is imported: a login node checks a run in 0.2 s"


@of_every_file
def test_only_one_file_reads_the_environment(path):
    if str(path.relative_to(PACKAGE)) in ENVIRON:
        return
    readers = [
        node.lineno
        for node in ast.walk(tree_of(path))
        if (isinstance(node, ast.Attribute) and node.attr in ENVIRON_NAMES)
        or (isinstance(node, ast.ImportFrom) and {alias.name for alias in node.names} & ENVIRON_NAMES)
    ]
    assert not readers, f"{path.name}:{readers[0]} touches os.environ: ask environment.py"


@of_every_file
def test_no_global_that_can_change(path):
    tree = tree_of(path)
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"{path.name}:{node.lineno} declares a global: pass the value"
    for node in tree.body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [t.id for t in targets if isinstance(t, ast.Name)]
        if names == ["app"]:
            continue
        constant = names == ["log"] or all(name.startswith("_") or name[:1].isupper() for name in names)
        assert constant, f"{path.name}:{node.lineno} {names} is neither a constant nor a type: pass it"


@of_every_file
def test_nobody_changes_a_constant(path):
    """A dict or list in capitals is a table: it is read, never written."""
    tree = tree_of(path)
    tables = {
        t.id
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for t in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(t, ast.Name) and t.id.strip("_").isupper()
    }
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.Delete)):
            targets = [node.target] if isinstance(node, ast.AugAssign) else node.targets
            written = [t.value.id for t in targets if isinstance(t, ast.Subscript) and isinstance(t.value, ast.Name)]
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            changing = node.func.attr in ("append", "extend", "update", "setdefault", "pop", "clear", "add", "insert")
            written = [node.func.value.id] if changing else []
        else:
            continue
        assert not tables & set(written), f"{path.name}:{node.lineno} changes the table {written}"


@of_every_file
def test_only_those_who_speak_to_a_terminal_print(path):
    where = str(path.relative_to(PACKAGE))
    if where in PRINTS or where.rpartition("/")[0] in PRINTS:
        return
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    prints = [call.lineno for call in calls if getattr(call.func, "id", "") == "print"]
    assert not prints, f"{path.name}:{prints[0]} prints: use logging, or hand the text back"


@of_every_file
def test_no_pickle_no_object_collectives_no_swallowed_error(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and node.attr.endswith(("_object", "_object_list")):
            raise AssertionError(f"{path.name}:{node.lineno} {node.attr} pickles")
        if isinstance(node, ast.Import):
            pickles = {alias.name for alias in node.names} & {"pickle", "dill", "cloudpickle"}
            assert not pickles, f"{path.name}:{node.lineno} imports {pickles}"
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and ast.unparse(node.func) == "torch.load"
        ):
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            assert safe, f"{path.name}:{node.lineno} torch.load without weights_only=True unpickles code"
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            silent = all(isinstance(s, ast.Pass) for s in node.body)
            assert not (broad and silent), f"{path.name}:{node.lineno} swallows every error"


@of_every_file
def test_a_file_is_short_and_says_what_it_is_for(path):
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    assert len(lines) <= LONGEST, f"{path.name} has {len(lines)} lines: it has more than one reason to be opened"
    assert not lines or ast.get_docstring(tree_of(path)), f"{path.name} does not say where it stands"
    words = ("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error")
    left = [number for number, line in enumerate(lines, 1) if any(word in line for word in words)]
    assert not left, f"{path.name}:{left[0]} is unfinished"


def test_a_class_has_a_name_of_its_own():
    """Two classes of one name in two files make a reader look both up."""
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    twice = {name: places for name, places in homes.items() if len(places) > 1}
    assert not twice, f"{twice}: name each of them for what it is"


NO_SUBJECT = {
    *("What", "Whatever", "Whether", "How", "Where", "Which", "When", "Who", "Whose", "Why", "That", "Those"),
    *("As", "At", "Also", "Between", "By", "For", "From", "If", "In", "Inside", "Like", "Of", "On", "So"),
    *("To", "Under", "Unless", "With", "Within", "Without"),
}
"""Words that a docstring does not begin with: its subject, or a verb, comes first."""


@of_every_file
def test_a_docstring_begins_with_its_subject_or_a_verb(path):
    """This holds for modules, classes, functions and methods, and for names and fields with a docstring below them."""
    for line, said in docstrings(tree_of(path)):
        first = said.split()[0].rstrip(",:;.") if said.split() else ""
        assert first not in NO_SUBJECT, f"{path.name}:{line}: a docstring begins with {first!r}"


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every string that stands as a statement of its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


@of_every_file
def test_an_arrow_of_a_docstring_is_a_name_of_the_code(path):
    """In `x --name--> y` of a module's first lines; an arrow of several words is prose."""
    arrows = re.findall(r"--([\w./]+)-->", ast.get_docstring(tree_of(path)) or "")
    ends = {arrow: arrow.rpartition("/")[2] for arrow in arrows}  # a file may stand with its folder
    unknown = [arrow for arrow, end in ends.items() if end not in all_names() and set(end.split(".")) - all_names()]
    assert not unknown, f"--{'-->, --'.join(unknown)}-->: nothing in the package has this name now"


@functools.cache
def all_names() -> set[str]:
    """Files, functions, classes, fields and tables; also whole texts, as names of pieces and files are."""
    names = {name for path in FILES for name in (path.name, path.stem)}
    for node in (node for path in FILES for node in ast.walk(tree_of(path))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, (ast.Module, ast.ClassDef)):
            targets = [
                target for inner in node.body for target in getattr(inner, "targets", [getattr(inner, "target", 0)])
            ]
            names.update(target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return names


def test_no_test_is_skipped_for_want_of_what_the_tests_install():
    """A package of the extra `test` that is missing is a failure: a skipped comparison looks like one that passes."""
    word = "importor" + "skip"
    found = [path.name for path in Path(__file__).parent.rglob("*.py") if word in path.read_text(encoding="utf-8")]
    assert not found, f"{found}: import it, and name it in the extra `test` of pyproject.toml"


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
