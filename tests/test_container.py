"""The Dockerfile without an engine: what it copies, and its shell lines, run with stand-ins for what they call."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

PROJECT = Path(__file__).absolute().parents[1]
PYTHON = {"debian:bookworm": (3, 11), "ubuntu24.04": (3, 12)}
"""The python3 of distributions, in the names of their images."""
STAND_IN = """#!/bin/sh
# Writes down what it is called with, and makes the environment when it is asked to.
echo "$(basename "$0") $*" >> "$CALLS"
[ "$2" != venv ] || { mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; }
"""


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of each instruction, on one line."""
    lines = [line for line in (PROJECT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in whole.splitlines() if line.strip()]


def arguments(name: str) -> list[str]:
    return [text for instruction, text in instructions() if instruction == name]


def defaults() -> dict[str, str]:
    """The build arguments."""
    return dict(text.split("=", 1) for text in arguments("ARG"))


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out: the last pattern that matches it, or a folder above it, decides."""
    out = False
    for line in (PROJECT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = re.escape(line.lstrip("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
            if re.fullmatch(f"{pattern}(/.*)?", path):
                out = not line.startswith("!")
    return out


@pytest.fixture
def shell(tmp_path):
    """`shell(line, folder, **environment)`: run a line as the container would; what it called.

    It sees the build arguments and stand-ins for the programs that change a machine, and nothing else of this one.
    """
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("apt-get", "rm", "python3"):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    for name in ("make", "sh", "basename", "mkdir", "cp", "touch", "getconf"):
        (programs / name).symlink_to(shutil.which(name))

    def run(line: str, folder: Path, **environment: str) -> list[str]:
        calls = tmp_path / "calls"
        calls.write_text("")
        environment = defaults() | environment | {"PATH": str(programs), "CALLS": str(calls)}
        subprocess.run(["/bin/sh", "-c", line], cwd=folder, env=environment, check=True, capture_output=True)
        return calls.read_text().splitlines()

    return run


@pytest.fixture
def context(tmp_path) -> Path:
    """The files beside each other in the project's folder, as a fresh container has them."""
    assert arguments("COPY") == [". ."]
    folder = tmp_path / "context"
    folder.mkdir()
    for path in PROJECT.iterdir():
        if path.is_file() and not ignored(path.name):
            shutil.copy2(path, folder)
    return folder


def test_the_lines_install_the_environment_and_run_the_demo(shell, context):
    system, environment = arguments("RUN")
    update, packages, cleaning = shell(system, context)
    assert update == "apt-get update" and cleaning.startswith("rm -rf /var/lib/apt/lists/")
    assert packages == "apt-get install --yes --no-install-recommends ca-certificates make python3 python3-venv"
    # make has made nothing yet, and needs nothing but what was copied
    install = "-m pip install --quiet --constraint constraints.txt --editable .[test]"
    assert shell(environment, context) == ["python3 -m venv .venv", f"python {install}"]

    command = json.loads(arguments("CMD")[-1])
    phantom, bundle = shell(" ".join(command), context)  # the environment is there
    assert phantom.startswith("python -m common.phantom --output output/demo/phantom ")
    assert bundle.startswith("python -m monai.bundle run --config_file ")
    for path in re.findall(r"bundles/[\w/.]+", bundle):
        assert (PROJECT / path).is_file() and not ignored(path), path


@pytest.mark.parametrize("index", ["https://download.pytorch.org/whl/cpu", ""])
def test_the_index_of_pytorch_reaches_pip(shell, context, index):
    """An empty one, which pip ignores, for the CUDA build."""
    (context / "Makefile").write_text('.venv/installed:\n\tapt-get "$(PIP_EXTRA_INDEX_URL)"\n')
    environment = arguments("RUN")[-1]
    assert defaults()["TORCH_INDEX"] == "https://download.pytorch.org/whl/cpu"
    assert shell(environment, context, TORCH_INDEX=index) == [f"apt-get {index}"]


def test_commands_find_the_environment_whoever_runs_them():
    """MONAI can't be imported by a user without a name, which --user makes."""
    (folder,), (variables,) = arguments("WORKDIR"), arguments("ENV")
    assert {f"PATH={folder}/.venv/bin:$PATH", "HOME=/tmp", "LOGNAME=anybody"} == set(variables.split())


def test_the_base_images_have_a_python_that_fits():
    setup = ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    required = tuple(map(int, setup["options"]["python_requires"].removeprefix(">=").split(".")))
    texts = [(PROJECT / name).read_text() for name in ("Dockerfile", "docs/clusters.md")]
    bases = {base for text in texts for base in re.findall(r"\bBASE=([\w.:/-]+)", text)}
    assert len(bases) == 2 and arguments("FROM") == ["${BASE}"]  # CPU and CUDA
    for base in bases:
        (version,) = (version for name, version in PYTHON.items() if name in base)
        assert version >= required


def test_documented_build_arguments_are_there():
    documented = re.findall(r"--build-arg (\w+)=", (PROJECT / "docs" / "clusters.md").read_text())
    assert set(documented) == defaults().keys()


def test_what_git_ignores_stays_outside():
    for line in (PROJECT / ".gitignore").read_text().splitlines():
        example = line.strip("!/").replace("*", "x")
        anywhere = "/" not in line.strip("!/") and not line.startswith("/")
        for path in [example, f"bundles/x/{example}"] if anywhere else [example]:
            assert ignored(path) is not line.startswith("!"), line
    assert ignored(".git/config")


@pytest.mark.skipif(not (PROJECT / ".git").exists(), reason="no git checkout")
def test_what_git_has_goes_in():
    listed = subprocess.run(["git", "ls-files"], cwd=PROJECT, check=True, capture_output=True, text=True).stdout.split()
    assert "bundles/abdominal_ct_mask_guided_ddpm/models/model_small.pt" in listed
    assert [path for path in listed if ignored(path)] == []
