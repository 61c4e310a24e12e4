"""Bundles as zips: the same bytes wherever they are made, nothing of their user's, and each runs unpacked alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile

import nibabel as nib
import numpy as np
import pytest
import torch

from common import package
from common.package import bundle_files, follow, gather, main, write_zip

PROJECT = Path(__file__).absolute().parents[1]
NAME = "abdominal_ct_conditional_ddpm"
NAMES = sorted(path.parents[1].name for path in PROJECT.glob("bundles/*/configs/metadata.json"))


def pack(bundle: Path, out: Path) -> Path:
    return write_zip(gather(bundle, weights=False), bundle.name, out)


def touch(path: Path, content: bytes = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A copy of the repository's bundles with their links, over the same library; `main` packages from it."""
    shutil.copytree(
        PROJECT / "bundles", tmp_path / "bundles", symlinks=True, ignore=shutil.ignore_patterns("model.pt", "output")
    )
    shutil.copy(PROJECT / "LICENSE", tmp_path)
    (tmp_path / "common").symlink_to(PROJECT / "common")
    monkeypatch.setattr(package, "BUNDLES", tmp_path / "bundles")
    return tmp_path


@pytest.fixture
def unpack(tmp_path) -> Callable[[str], Path]:
    """`unpack(name)`: the folder of a bundle, unpacked from its zip, alone."""

    def make(name: str) -> Path:
        with ZipFile(pack(PROJECT / "bundles" / name, tmp_path / "dist")) as archive:
            archive.extractall(tmp_path / f"alone_{name}")
        return tmp_path / f"alone_{name}" / name

    return make


def clone(folder: Path, *settings: str) -> Path:
    options = [option for setting in settings for option in ("-c", setting)]
    subprocess.run(["git", "clone", "--quiet", "--shared", *options, str(PROJECT), str(folder)], check=True)
    return folder


@pytest.mark.skipif(not (PROJECT / ".git").exists(), reason="not a checkout")
def test_a_windows_checkout_makes_the_same_bytes(tmp_path):
    """Git as it is set up there: links as text files, CRLF in text files that don't say otherwise."""
    linux = clone(tmp_path / "linux")
    windows = clone(tmp_path / "windows", "core.symlinks=false", "core.autocrlf=true", "core.filemode=false")
    for path in windows.rglob("*"):
        path.chmod(0o777)
    names = sorted(path.name for path in (linux / "bundles").iterdir())
    assert len(names) == 7
    for name in names:
        assert (linux / "bundles" / name / "scripts").is_symlink()
        assert (windows / "bundles" / name / "scripts").read_text() == "../../common"
        one = write_zip(bundle_files(linux / "bundles" / name), name, linux / "dist")
        other = pack(windows / "bundles" / name, windows / "dist")
        assert one.read_bytes() == other.read_bytes()


def test_the_same_bytes_whenever_and_by_whomever(project, tmp_path):
    """Times, permissions and what lies around are no part of a bundle."""
    first = pack(PROJECT / "bundles" / NAME, tmp_path / "first").read_bytes()
    bundle = project / "bundles" / NAME
    for path in bundle.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o755)
            os.utime(path, (1e9, 1e9))
    for rest in (
        "output/case_ct.nii.gz",
        "masks/patient.nii.gz",
        "models/checkpoint.pt",
        "models/model_50000.pt",
        "models/tensorboard/events.out.tfevents.0",
        "models/small/model.pt",
        "configs/.inference.yaml.swp",
        "configs/__pycache__/x.pyc",
        "docs/.DS_Store",
        "slice_cache_256/labels.npy",
    ):
        touch(bundle / rest, b"mine")
    assert pack(bundle, tmp_path / "second").read_bytes() == first


@pytest.mark.skipif(not (PROJECT / ".git").exists(), reason="not a checkout")
def test_what_git_does_not_know_is_refused(tmp_path):
    repository = clone(tmp_path / "repository")
    bundle = repository / "bundles" / NAME
    gather(bundle, weights=False)
    for stray in ("configs/mine.yaml", "docs/notes.txt", "scripts/networks/unet.py.orig"):
        touch(bundle / stray, b"note: 1")
        with pytest.raises(ValueError, match=rf"{stray} would go into the zip, but isn't in Git: add it there or move"):
            gather(bundle, weights=False)
        subprocess.run(["git", "-C", repository, "add", "--force", (bundle / stray).resolve()], check=True)
        gather(bundle, weights=False)


def test_a_zip_holds_the_bundle_with_its_links_followed(tmp_path):
    bundle = PROJECT / "bundles" / "abdominal_ct_mask_guided_ddpm"
    with ZipFile(pack(bundle, tmp_path)) as archive:
        made = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        for entry in archive.infolist():
            assert entry.date_time == (1980, 1, 1, 0, 0, 0) and entry.compress_type == ZIP_STORED
            assert entry.create_system == 3 and entry.external_attr == 0o100644 << 16
    expected = {}
    for folder, _, names in os.walk(bundle, followlinks=True):
        for path in (Path(folder, name) for name in names):
            name = path.relative_to(bundle.parent).as_posix()
            ours = "/models/" not in name or path.name == "model_small.pt"
            if ours and "__pycache__" not in name and "/output/" not in name:
                expected[name] = path.read_bytes()
    assert made == expected and list(made) == sorted(made)
    root = "abdominal_ct_mask_guided_ddpm"
    assert made[f"{root}/LICENSE"] == (PROJECT / "LICENSE").read_bytes()
    assert made[f"{root}/scripts/networks/unet.py"] == (PROJECT / "common" / "networks" / "unet.py").read_bytes()
    assert {f"{root}/scripts/{p}/__init__.py" for p in ("evaluation", "networks", "phantom")} <= made.keys()


def test_the_command_prints_content_and_hash(project, capsys):
    main([NAME, "--out", str(project / "dist"), "--without-weights"])
    *lines, last = capsys.readouterr().out.splitlines()
    path = project / "dist" / f"{NAME}_v0.1.0.zip"
    assert [path] == list((project / "dist").iterdir())
    with ZipFile(path) as archive:
        entries = archive.infolist()
    assert [line.split() for line in lines] == [[f"{entry.file_size:,}", entry.filename] for entry in entries]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert last == f"{path}: {len(entries)} files, {path.stat().st_size:,} bytes, sha256 {digest}"


def test_all_are_written_or_none(project, capsys):
    (project / "bundles" / "abdominal_ct_spade" / "docs" / "README.md").unlink()
    with pytest.raises(SystemExit):
        main(["--all", "--out", str(project / "dist"), "--without-weights"])
    error = capsys.readouterr().err
    assert "abdominal_ct_spade/docs/README.md is missing" in error and not (project / "dist").exists()
    touch(project / "bundles" / "abdominal_ct_spade" / "docs" / "README.md", b"# Model Overview\n")
    main(["--all", "--out", str(project / "dist"), "--without-weights"])
    names = {path.name for path in (PROJECT / "bundles").iterdir()}
    assert {path.name for path in (project / "dist").iterdir()} == {f"{name}_v0.1.0.zip" for name in names}


def test_an_unknown_name_is_answered_with_the_known_ones(project, capsys):
    with pytest.raises(SystemExit):
        main(["abdominal_ct_gan", "--out", str(project / "dist")])
    assert re.search(r"no bundle abdominal_ct_gan in .*bundles: there are .*abdominal_ct_sdm", capsys.readouterr().err)


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("link", ["LICENSE", "scripts", "configs/logging.conf"])
def test_a_broken_link_is_named(project, capsys, link, as_text):
    path = project / "bundles" / NAME / link
    path.unlink()
    if as_text:
        path.write_text("../../elsewhere")
    else:
        path.symlink_to("../../elsewhere")
    with pytest.raises(SystemExit):
        main([NAME, "--out", str(project / "dist"), "--without-weights"])
    *_, error = capsys.readouterr().err.splitlines()
    assert f"{path} is a link to" in error and "git checkout" in error
    assert not (project / "dist").exists()


def test_only_a_path_is_taken_for_a_link(tmp_path):
    (tmp_path / "there").write_text("content")
    for name, content, target in (
        ("link", "../there", tmp_path / "there"),
        ("short", "there", None),
        ("long", "../there" + 300 * " ", None),
    ):
        path = tmp_path / "folder" / name
        touch(path, content.encode())
        assert follow(path).resolve() == (target or path)


def test_weights_go_in_unless_they_are_to_stay_out(project, tmp_path):
    bundle = project / "bundles" / NAME
    touch(bundle / "models" / "model.pt", b"weights")
    assert bundle_files(bundle)["models/model.pt"] == bundle / "models" / "model.pt"
    with ZipFile(pack(bundle, tmp_path / "dist")) as archive:
        assert not [name for name in archive.namelist() if "models" in name]


@pytest.fixture
def own_scripts() -> Iterator[None]:
    """As in a fresh process: no bundle has been imported, and none is on `sys.path`."""

    def taken_out() -> dict:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "scripts"}

    modules, path = taken_out(), list(sys.path)
    yield
    taken_out()
    sys.modules.update(modules)
    sys.path[:] = path


def test_two_bundles_in_one_process_stay_apart(own_scripts, unpack, workflow, amos, tiny_training, tiny_inference):
    """Each finds its own weights and writes into its own folder, whichever ran last."""
    one, other = unpack(NAME), unpack("abdominal_ct_pix2pix")
    trainings = []
    for bundle in (one, other):
        options = tiny_training(bundle) | {"dataset_dir": amos, "cache_dir": amos / "cache"}
        trainings.append(workflow(bundle, "train", **options))
    for training in reversed(trainings):
        training.run()
    for bundle in (one, other):
        facts = torch.load(bundle / "models" / "model.pt", weights_only=True)["facts"]
        assert facts["bundle"] == bundle.name

    def inference(bundle: Path):
        options = {"dataset_dir": amos / "labelsVa", "missing_body": "estimate"}
        return workflow(bundle, "inference", **tiny_inference(bundle), **options)

    def results(bundle: Path) -> dict[str, bytes]:
        found = {path.name: path.read_bytes() for path in (bundle / "output").glob("*_ct.nii.gz")}
        assert len(found) == 2
        shutil.rmtree(bundle / "output")
        return found

    alone = {}
    for bundle in (one, other):
        inference(bundle).run()
        alone[bundle] = results(bundle)
    workflows = {bundle: inference(bundle) for bundle in (one, other)}
    for bundle, made in workflows.items():  # `other` ran last
        assert made.bundle_root == str(bundle)
    for bundle in (other, one):
        workflows[bundle].run()
    workflows[one].initialize()
    assert workflows[one].bundle_root == str(one)
    workflows[other].initialize()
    assert workflows[other].bundle_root == str(other)  # `one` ran last
    assert {bundle: results(bundle) for bundle in (one, other)} == alone


ALONE = """
import json, sys
from monai.bundle import run
for run_id, options in json.load(open(sys.argv[1])).items():
    run(run_id=run_id, **options)
import scripts
print("scripts from", scripts.__file__)
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_zip_unpacked_alone_trains_and_infers(name, unpack, amos, tiny_training, tiny_inference, tmp_path):
    """In a process that can't import the repository, from a folder of no meaning, into the bundle's own folders."""
    bundle = unpack(name)
    touch(tmp_path / "guard" / "common.py", b"raise ImportError('of the repository')\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    training = tiny_training(bundle) | {"dataset_dir": str(amos), "cache_dir": str(tmp_path / "cache")}
    inference = tiny_inference(bundle) | {"dataset_dir": str(amos / "labelsVa"), "missing_body": "estimate"}
    runs = {
        "training": training | {"config_file": str(bundle / "configs" / "train.yaml")},
        "inference": inference | {"config_file": str(bundle / "configs" / "inference.yaml")},
    }
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    done = subprocess.run(
        [sys.executable, "-P", "-c", ALONE, str(tmp_path / "runs.json")],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "guard")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert f"scripts from {bundle / 'scripts' / '__init__.py'}" in done.stdout
    facts = torch.load(bundle / "models" / "model.pt", weights_only=True)["facts"]
    assert facts["bundle"] == bundle.name and facts["iteration"] == tiny_training(bundle)["iterations"]
    for path in (amos / "labelsVa").iterdir():
        label, ct = nib.load(path), nib.load(bundle / "output" / path.name.replace(".nii", "_ct.nii"))
        assert ct.shape == label.shape and np.asanyarray(ct.dataobj).std() > 5
        np.testing.assert_array_equal(ct.affine, label.affine)
    assert not list(elsewhere.iterdir())
