"""Nothing that a user, a config or a hostfile says is ever run by a shell: it is refused in one line, or arrives byte
for byte.

Every value goes through every launcher, whose programs are fakes that note what they get (fakes.py); bash, YAML and
DeepSpeed's runner are real.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from fakes import NAMES, furnish, notes, options_of, put

from roots_dist.cli.launch import command_for
from roots_dist.errors import UserError
from roots_dist.runs.launch import hosts as hostfiles
from roots_dist.runs.launch.job import Job, LaunchPlan, make
from roots_dist.runs.launch.launchers import LAUNCHERS
from roots_dist.runs.launch.quoting import CONTROL, PLAIN
from roots_dist.runs.launch.submit import shown, write

VALUES = (
    "plain", "two words", " edges ", "  ", "a'b", 'a"b', "'", '"', "''", "a\\b", "\\", "\\n", "a\\'b\\\"c", "$HOME", "${HOME}", "$$",
    "$(touch PWNED)", "`touch PWNED`", "; touch PWNED", "&& touch PWNED", "| touch PWNED", "> PWNED", "'; touch PWNED; '",
    '"; touch PWNED; "', '"$(touch PWNED)"', "$((1+1))", "<(touch PWNED)", "a & b", "(a)", "[a]", "{a,b}", "*", "?", "~", "~root", "!!",
    "#", "a#b", "%n %h %u", "%j", "%", "%%", "=", "a=b", ",", "@", ":", "-", "--help", "-oProxyCommand=touch PWNED", "-rf /",
    "{{ 7 * 7 }}", "{% raw %}", "{# no #}", "$(HOME)", "$$(HOME)", "null", "true", "1e3", "0x10", "yes", "- a", "? a", "&a", "*a", "!!str a",
    "é", "雪", "🌱", "a\u00a0b", "a\u2028b", "\u202egnirts", "\ufeff", "x" * 4000,
    "a\nb", "a\n#SBATCH --uid=0", "a\rb", "a\tb", "a\x00b", "\x1b[31m", "\x7f", "\udcff",
)  # fmt: skip
"""Most say in a shell, in Slurm's or pdsh's patterns, in YAML or in a template something else than they are."""
LINES = (
    "node1", "node1 slots", "node1 slots=", "node1 slots=x", "node1 slots=-1", "node1 slots=0", "node1 slots=2 slots=3", "node1 2",
    "node1 slots=99999", "node1 slots=2; touch PWNED", "-oProxyCommand=sh slots=2", "--help slots=2", "$(touch PWNED) slots=2",
    "`id` slots=2", "node1;id slots=2", "node1|id slots=2", "node1&id slots=2", "a,b slots=2", "n[1-3] slots=2", "n* slots=2",
    "user@node1 slots=2", "node1:22 slots=2", "'node1' slots=2", '"node1" slots=2', "node1\\ slots=2", "node1\x0bslots=2",
    "node1\u00a0slots=2", "nöde slots=2", "n\u2028m slots=2", ".node slots=2", "node. slots=2", "%n slots=2", "node1 slots=２",
    "node1 slots=2\x00", "node1 slots=1_0", f"{'n' * 300} slots=2", "../node slots=2", "node0 slots=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = furnish(tmp_path_factory.mktemp("hostile"))
    (place / "hosts").write_text("node0 slots=2 # the first\n\n  node1\tslots=2\r\n")
    put(place, python=True)
    return place


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("PATH", f"{place / 'bin'}:/usr/bin:/bin")  # a site without an mpirun, or with another one
    (place / "notes").unlink(missing_ok=True)
    yield
    assert not [*place.rglob("PWNED"), *Path("/").glob("PWNED")]


OPTIONS = {
    "torchrun": {},
    "slurm": {"nodes": 2, "time": "1:00:00"},
    "mpi": {"hostfile": Path("hosts")},
    "deepspeed": {"hostfile": Path("hosts")},
    "kubernetes": {"nodes": 2, "image": "registry/roots:1", "pvc": "work"},
}


def planned(
    place: Path, on: str, subject: str, overrides: Sequence[str] = (), env: Sequence[str] = ()
) -> tuple[Job, LaunchPlan]:
    job = make(
        command_for,
        subject,
        overrides,
        options_of(on, env=tuple(env), python=str(place / "bin" / "python"), **OPTIONS[on]),
        place,
    )
    plan = LAUNCHERS[on](job, {})
    list(shown(job, plan, whole=True))
    write(plan)
    return job, plan


def arrived(place: Path, on: str, job: Job, plan: LaunchPlan) -> tuple[list[str], dict[str, str]]:
    """What each rank is told after `python`, and the variables, when the plan is carried out."""
    environ = {"PATH": f"{place}/bin:/usr/bin:/bin", "HOME": str(place / "home")}
    if on != "kubernetes":
        subprocess.run(plan.command, cwd=place, env=environ, check=True, timeout=250)
    called = {note["name"]: note for note in notes(place)}
    if on == "kubernetes":
        documents = list(yaml.safe_load_all((job.files / "kubernetes.yaml").read_text(encoding="utf-8")))
        container = documents[-1]["spec"]["template"]["spec"]["containers"][0]
        words = [word.replace("$$", "$") for word in container["args"]]
        return words[words.index("-m") :], {
            e["name"]: e["value"].replace("$$", "$") for e in container["env"] if "value" in e
        }
    last = called[{"torchrun": "python", "deepspeed": "python", "slurm": "srun", "mpi": "mpirun"}[on]]
    words, variables = last["words"], last["variables"]
    if on == "deepspeed":
        variables = dict(line.split("=", 1) for line in (job.files / "deepspeed_env").read_text().splitlines())
    return ["-m", *words[words.index("roots_dist") :]], variables


def refused_in_one_line(error: UserError) -> None:
    said = error.cli_message()
    assert "\n" not in said and "Fix: " in said and "expected" in said


@pytest.mark.parametrize("on", LAUNCHERS)
def test_overrides_and_variables_are_refused_or_arrive_byte_for_byte(place, on):
    """All that are let through at once, in one command."""
    overrides, variables = [], []
    for i, value in enumerate(VALUES):
        override, variable = f"track.group={json.dumps(value, ensure_ascii=False)}", f"ROOTS_TEST_{i}={value}"
        if not CONTROL.search(value) and on != "deepspeed":
            overrides.append(override)
            variables.append(variable)
            continue
        if on == "deepspeed" and not PLAIN.fullmatch(value) and "PWNED" not in value:
            continue  # one rule refuses them all, and each try takes a tenth of a second
        for word, kept, given in (
            (f"track.group={value}", overrides, {"overrides": [f"track.group={value}"]}),
            (variable, variables, {"env": [variable]}),
        ):
            try:
                planned(place, on, "small.yaml", **given)
            except UserError as error:
                refused_in_one_line(error)
            else:
                assert PLAIN.fullmatch(value), f"{value!r} would be read by a shell"
                kept.append(word)
    assert min(len(overrides), len(variables)) >= (4 if on == "deepspeed" else 60)
    words, found = arrived(place, on, *planned(place, on, "small.yaml", overrides, variables))
    assert words == ["-m", "roots_dist", "train", "small.yaml", *overrides]
    assert {f"{name}={value}" for name, value in found.items() if name.startswith("ROOTS_TEST_")} == {*variables}


@pytest.mark.parametrize("on", ["slurm", "deepspeed", "kubernetes"])
def test_a_config_and_a_folder_of_any_name_are_refused_or_arrive_byte_for_byte(place, on):
    passed = 0
    for name in VALUES:
        if "/" in name or "\x00" in name or len(name.encode(errors="replace")) > 200 or "\udcff" in name:
            continue  # no file has such a name, or no YAML can say it
        config = (
            (place / "small.yaml").read_text().replace("folder: runs/small", f"folder: {json.dumps(f'runs/{name}')}")
        )
        (place / f"{name}.yaml").write_text(config)
        try:
            job, plan = planned(place, on, f"{name}.yaml")
        except UserError as error:
            refused_in_one_line(error)
            unsafe = (
                CONTROL.search(name)
                or (on == "slurm" and "\\" in name)
                or (on == "deepspeed" and not PLAIN.fullmatch(name))
            )
            assert unsafe, f"{name!r} could have been passed"
            continue
        passed += 1
        said = ["-m", "roots_dist", "train", f"./{name}.yaml" if name.startswith("-") else f"{name}.yaml"]
        if on in ("slurm", "kubernetes") and (
            "PWNED" in name or name in ("a'b", 'a"b', "*", "$HOME", "!!")
        ):  # the rest reads alike
            words, _ = arrived(place, on, job, plan)
        elif on in ("slurm", "kubernetes"):
            continue
        else:
            words, _ = arrived(place, on, job, plan)
        assert words == said
        assert job.folder == Path("runs") / name and all(
            path.is_relative_to(job.directory / job.folder) or path.is_relative_to(job.folder) for path in plan.files
        )
    assert passed >= (6 if on == "deepspeed" else 40)


def test_a_name_is_refused_or_arrives_byte_for_byte(place):
    job = make(command_for, "small.yaml", (), options_of("slurm", name="plain", **OPTIONS["slurm"]), place)
    for value in VALUES:
        if CONTROL.search(value):
            with pytest.raises(UserError, match="--name"):
                make(command_for, "small.yaml", (), options_of("slurm", name=value, **OPTIONS["slurm"]), place)
            continue
        named = replace(job, name=value)
        assert f"--job-name={value}" in LAUNCHERS["slurm"](named, {}).command
        inside = replace(named, options=options_of("kubernetes", **OPTIONS["kubernetes"]))
        if value in ("plain", "null", "true", "yes"):
            (text,) = LAUNCHERS["kubernetes"](inside, {}).files.values()
            assert [document["metadata"]["name"] for document in yaml.safe_load_all(text)] == [value] * 3
        else:
            with pytest.raises(UserError, match="--name"):
                LAUNCHERS["kubernetes"](inside, {})


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_a_hostfile_that_is_no_host_is_refused_with_its_number(tmp_path, line):
    path = tmp_path / "hosts"
    path.write_text(f"# ours\nnode0 slots=2\n{line}\n", encoding="utf-8", newline="")
    with pytest.raises(UserError) as refused:
        hostfiles.read(path)
    assert str(refused.value).startswith(f"{path}:3 = ") and "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "\n# nobody\n", b"\xff\xfe slots=2\n", None])
def test_a_hostfile_without_hosts_is_refused(tmp_path, text):
    path = tmp_path / "hosts"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match="--hostfile"):
        hostfiles.read(path)


@pytest.mark.parametrize(
    "filters, left",
    [
        ({"include": "b"}, {"b": (0, 1, 2)}),
        ({"include": "b:2,0@a"}, {"a": (0, 1, 2), "b": (0, 2)}),
        ({"exclude": "a"}, {"b": (0, 1, 2), "c": (0, 1, 2)}),
        ({"exclude": "a:0@b:1,2"}, {"a": (1, 2), "b": (0,), "c": (0, 1, 2)}),
        ({"exclude": "a:0,1,2@b"}, {"c": (0, 1, 2)}),
    ],
)
def test_hosts_are_chosen_as_deepspeed_chooses(filters, left):
    from collections import OrderedDict

    hosts = tuple(hostfiles.Host(name, (0, 1, 2), 3) for name in "abc")
    assert {
        host.name: host.slots for host in hostfiles.choose(hosts, filters.get("include"), filters.get("exclude"))
    } == left
    from deepspeed.launcher.runner import parse_resource_filter

    theirs = parse_resource_filter(
        OrderedDict((h.name, list(h.slots)) for h in hosts), filters.get("include", ""), filters.get("exclude", "")
    )
    assert {name: tuple(slots) for name, slots in theirs.items()} == left


@pytest.mark.parametrize(
    "include", ["d", "a:3", "a:x", "a:", "a@a", "", "a@", "a:0-1", "a;b", "a:-1", "$(touch PWNED)", "a:0,", "a b"]
)
def test_a_choice_of_what_is_not_there_is_refused(include):
    hosts = tuple(hostfiles.Host(name, (0, 1, 2), 3) for name in "abc")
    if include == "":
        assert hostfiles.choose(hosts, include, None) == hosts
        return
    with pytest.raises(UserError, match="--include"):
        hostfiles.choose(hosts, include, None)


def test_deepspeeds_own_runner_hands_on_what_was_asked_and_runs_nothing_else(place, monkeypatch):
    """The real runner, and a real shell in the fake pdsh; the python that the shell is to start is a fake."""
    for folder in (place, Path(place / "home")):
        folder.mkdir(exist_ok=True)
        (folder / ".deepspeed_env").write_text("EVIL=$(touch PWNED)\n")
    job = make(
        command_for,
        "small.yaml",
        ("track.group=a,b:c@d+e^f=g", "track.name=-x"),
        options_of(
            "deepspeed",
            env=("ROOTS_TEST_VALUE=a/b:c,d@e+f^g=h-i",),
            hostfile=Path("hosts"),
            include="node0@node1:0,1",
        ),
        place,
    )
    surroundings = {"PYTHONSTARTUP": "$(touch PWNED)", "PYTHONUTF8": "1"}
    plan = LAUNCHERS["deepspeed"](job, surroundings)
    assert plan.unset == ("PYTHONSTARTUP",) and any("PYTHONSTARTUP" in note for note in plan.notes)
    write(plan)
    programs = place / "bin" / "pdsh"
    programs.write_text(
        programs.read_text().replace(
            '.replace("%n", "0")', f'.replace("%n", "0").replace({sys.executable!r}, "python")'
        )
    )
    environ = {
        "PATH": f"{place}/bin:/usr/bin:/bin",
        "HOME": str(place / "home"),
        "PYTHONUTF8": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(plan.command, cwd=place, env=environ, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    (pdsh,) = [note for note in notes(place) if note["name"] == "pdsh"]
    assert pdsh["words"][pdsh["words"].index("-w") + 1] == "node0,node1"
    (agent,) = [note for note in notes(place) if note["name"] == "python"]
    assert agent["words"][-5:] == ["roots_dist", *job.command[2:]] and "--node_rank=0" in agent["words"]
    assert agent["variables"]["ROOTS_TEST_VALUE"] == "a/b:c,d@e+f^g=h-i" and "PYTHONSTARTUP" not in agent["variables"]
    assert agent["folder"] == str(place)
    assert set(NAMES) >= {note["name"] for note in notes(place)} - {"python"}


def test_a_secret_is_not_taken_as_a_variable():
    with pytest.raises(UserError, match=r"WANDB_API_KEY=\*\*\*") as refused:
        make(command_for, "small.yaml", (), options_of("torchrun", env=("WANDB_API_KEY=0123456789",)), Path.cwd())
    assert "0123456789" not in str(refused.value)
