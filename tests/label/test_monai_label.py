"""The bundles behind MONAI Label: a real server, asked over HTTP (`make test-label`, in an environment of its own)."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pytest
import requests
from monai.bundle import ConfigParser
from tiny_networks import randomised

from common.bundle import save_weights
from common.labels import BODY
from common.phantom import phantom

MONAI_LABEL = (sys.executable, "-m", "monailabel.main")
MASK_GUIDED = "abdominal_ct_mask_guided_ddpm"
PATIENCE = 120
"""Seconds for the server to start."""


def save(path: Path, label: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(label, affine), path)
    return path


def voxels(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


@pytest.fixture(scope="module")
def made():
    """A tilted abdomen of few slices that aren't square."""
    return phantom((28, 22, 5), seed=3, oblique=True)


@pytest.fixture(scope="module")
def mask(made, tmp_path_factory) -> Path:
    """Its label map, alone in a folder."""
    return save(tmp_path_factory.mktemp("studies") / "abdomen.nii.gz", made.label, made.affine)


@pytest.fixture(scope="module")
def options(bundles, tiny_inference) -> Callable[[str], tuple[list[str], dict]]:
    """Overlays and overrides of a bundle: the shipped small network of one, tiny ones for the others."""
    return lambda name: (["small"], {}) if name == MASK_GUIDED else ([], tiny_inference(bundles[name]))


@pytest.fixture(scope="module")
def app(bundles, options, on_path, tmp_path_factory) -> Path:
    """MONAI Label's app with the seven bundles; one has two files of weights.

    MONAI Label reads one config and `models/*.pt`, so overlays and overrides are written into the copies.
    """
    folder = tmp_path_factory.mktemp("app")
    subprocess.run([*MONAI_LABEL, "apps", "--download", "--name", "monaibundle", "--output", folder], check=True)
    for name, bundle in bundles.items():
        copy = folder / "monaibundle" / "model" / name
        shutil.copytree(bundle, copy)
        overlays, overrides = options(name)
        config = ConfigParser()
        config.read_config([copy / "configs" / f"{part}.yaml" for part in ("inference", *overlays)])
        for key, value in overrides.items():
            config[key] = value
        with on_path(copy):
            network = randomised(config.get_parsed_content("network_def"))
        save_weights(copy / "models" / "model.pt", network.state_dict(), {"bundle": name})
        ConfigParser.export_config_file(config.get(), copy / "configs" / "inference.yaml", fmt="yaml")
    models = folder / "monaibundle" / "model" / MASK_GUIDED / "models"
    (models / "model.pt").rename(models / "model_random.pt")
    (models / "model_small.pt").rename(models / "model.pt")
    return folder / "monaibundle"


@pytest.fixture(scope="module")
def server(app, mask, bundles, tmp_path_factory) -> Iterator[str]:
    """Address of a server whose studies are the one label map."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    conf = {"models": ",".join(bundles), "zoo_source": "local", "sam2": "false", "skip_trainers": "true"}
    arguments = [argument for pair in conf.items() for argument in ("--conf", *pair)]
    arguments += ["--host", "127.0.0.1", "--port", str(port), "--uvicorn_app", "common.monai_label:app"]
    folder = tmp_path_factory.mktemp("server")
    log = folder / "log.txt"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*MONAI_LABEL, "start_server", "--app", app, "--studies", mask.parent, *arguments],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | {"MONAI_LABEL_SESSION_PATH": str(folder)},
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(PATIENCE):
            assert process.poll() is None, log.read_text()
            try:
                requests.get(f"{address}/info/", timeout=PATIENCE).raise_for_status()
                break
            except requests.ConnectionError:
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(PATIENCE)


@pytest.fixture
def ask(server, tmp_path) -> Callable[..., requests.Response]:
    """`ask(name, file, **params)`: the server's answer to a label map."""

    def post(name: str, file: Path, **params) -> requests.Response:
        with file.open("rb") as stream:
            return requests.post(
                f"{server}/infer/{name}?output=image",
                files={"file": (file.name, stream)},
                data={"params": json.dumps(params)},
                timeout=PATIENCE,
            )

    return post


@pytest.fixture
def infer(ask, tmp_path) -> Callable[..., Path]:
    """`infer(name, file, **params)`: the CT that came back."""
    asked = 0

    def get(name: str, file: Path, **params) -> Path:
        nonlocal asked
        asked += 1
        answer = ask(name, file, **params)
        assert answer.status_code == 200, answer.text
        path = tmp_path / f"answer{asked}.nii.gz"
        path.write_bytes(answer.content)
        return path

    return get


@pytest.fixture
def run(app, bundles, options, run_bundle, mask, tmp_path) -> Callable[..., np.ndarray]:
    """`run(name, **overrides)`: the CT of `python -m monai.bundle run` for the same label map and weights."""

    def volume(name: str, **overrides) -> np.ndarray:
        overlays, tiny = options(name)
        checkpoint = app / "model" / name / "models" / overrides.pop("model_filename", "model.pt")
        run_bundle(
            bundles[name],
            "inference",
            *overlays,
            **tiny | overrides,
            dataset_dir=mask.parent,
            checkpoint=checkpoint,
            output_dir=tmp_path / "run",
        )
        return voxels(tmp_path / "run" / "abdomen_ct.nii.gz")

    return volume


def assert_same(a: np.ndarray, b: np.ndarray) -> None:
    """Equal but for the rounding of a few voxels: MONAI Label lays weights out in memory in another way."""
    difference = np.abs(a.astype(int) - b)
    assert difference.max() <= 1 and np.count_nonzero(difference) < 0.02 * a.size


def test_every_bundle_gives_the_volume_of_a_run_on_the_grid_of_the_mask(bundle, infer, run, mask):
    path = infer(bundle.name, mask)
    ct, label = nib.load(path), nib.load(mask)
    assert ct.get_data_dtype() == np.int16 and ct.shape == label.shape
    np.testing.assert_allclose(ct.affine, label.affine, atol=1e-4)
    hu = voxels(path)
    assert hu.min() >= -160 and hu.max() <= 240
    assert hu.std() > 10  # what is flat would be equal to anything flat
    assert_same(hu, run(bundle.name))


def test_options_are_offered(server, bundles):
    models = requests.get(f"{server}/info/", timeout=PATIENCE).json()["models"]
    assert models.keys() == bundles.keys()
    for name, model in models.items():
        shown = {key: value for key, value in model["config"].items() if key not in ("device", "model_filename")}
        steps = (
            {} if name.endswith(("spade", "oasis", "pix2pix")) else {"sampling_steps": 20 if name == MASK_GUIDED else 3}
        )
        assert shown == {"seed": 0, "missing_body": "error"} | steps
    assert models[MASK_GUIDED]["config"]["model_filename"] == ["model.pt", "model_random.pt"]


@pytest.mark.parametrize(
    "params", [{"seed": 5}, {"sampling_steps": 7, "seed": 5}, {"model_filename": "model_random.pt"}], ids=str
)
def test_options_hold_for_their_request(params, infer, run, mask):
    plain = voxels(infer(MASK_GUIDED, mask, sampling_steps=3))
    asked = voxels(infer(MASK_GUIDED, mask, **{"sampling_steps": 3} | params))
    assert_same(asked, run(MASK_GUIDED, **{"sampling_steps": 3} | params))
    assert np.mean(asked != plain) > 0.1
    np.testing.assert_array_equal(voxels(infer(MASK_GUIDED, mask, sampling_steps=3)), plain)


def test_a_study_by_its_name_comes_back_in_the_format_asked_for(server, mask, run, tmp_path):
    params = json.dumps({"result_extension": ".nrrd", "sampling_steps": 3})
    answer = requests.post(
        f"{server}/infer/{MASK_GUIDED}?image=abdomen&output=image", data={"params": params}, timeout=PATIENCE
    )
    (tmp_path / "ct.nrrd").write_bytes(answer.content)
    hu, header = nrrd.read(str(tmp_path / "ct.nrrd"))
    assert hu.dtype == np.int16
    assert_same(hu, run(MASK_GUIDED, sampling_steps=3))
    to_ras = np.diag([-1, -1, 1])
    affine = nib.load(mask).affine
    assert header["space"] == "left-posterior-superior"
    np.testing.assert_allclose(to_ras @ header["space directions"].T, affine[:3, :3], atol=1e-4)
    np.testing.assert_allclose(to_ras @ header["space origin"], affine[:3, 3], atol=1e-4)


def test_a_wrong_label_map_is_told_why(ask, infer, made, tmp_path):
    label = made.label.copy()
    label[14, 11, 2] = 42
    answer = ask(MASK_GUIDED, save(tmp_path / "wrong.nii.gz", label, made.affine))
    assert answer.status_code == 422
    assert "ids outside 0...16: 42 (1 voxels)" in answer.json()["detail"]

    bodiless = save(tmp_path / "bodiless.nii.gz", np.where(made.label == BODY, 0, made.label), made.affine)
    answer = ask(MASK_GUIDED, bodiless)
    assert answer.status_code == 422
    assert "no body class (id 16)" in answer.json()["detail"] and "missing_body estimate" in answer.json()["detail"]
    assert voxels(infer(MASK_GUIDED, bodiless, missing_body="estimate", sampling_steps=3)).max() > 0


def test_an_impossible_option_is_told_why(ask, mask):
    answer = ask(MASK_GUIDED, mask, sampling_steps=0)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("cannot sample in 0 steps")
