"""What the tests share: phantoms in AMOS22's layout, the bundles, and how one runs in this process."""

from __future__ import annotations

import os

# Before torch and MONAI come in. Networks as small as the tests' are fastest in one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MONAI_FAIL_ON_DUPLICATE_CONFIG"] = "1"

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from monai.bundle import ConfigWorkflow

from common.phantom import write_dataset

PROJECT = Path(__file__).absolute().parents[1]
BUNDLES = sorted(path.parents[1] for path in PROJECT.glob("bundles/*/configs/metadata.json"))

DENOISER = {
    "network_def#channels": [8, 16],
    "network_def#num_res_blocks": 1,
    "network_def#attention_levels": [False, True],
    "network_def#num_head_channels": 16,
    "network_def#norm_num_groups": 4,
}
GENERATORS = {
    "abdominal_ct_spade": {"network_def#channels": [4, 8, 8]},
    "abdominal_ct_oasis": {"network_def#channels": [4, 8, 8]},
    "abdominal_ct_pix2pix": {"network_def#channels": [4, 8, 8, 8]},
}
DISCRIMINATORS = {
    "abdominal_ct_spade": {"discriminator_channels": 4},
    "abdominal_ct_oasis": {"discriminator_channels": [4, 8, 8]},
    # Pix2Pix begins with weights so small that its dropout is hardly seen.
    "abdominal_ct_pix2pix": {"discriminator_channels": 4, "learning_rate": 0.03},
}
TINY = {"device": "$torch.device('cpu')", "image_size": 32}
TINY_TRAINING = TINY | {
    "batch_size": 4,
    "iterations": 4,
    "learning_rate": 1e-2,
    "ema_momentum": 0.9,
    "num_workers": 0,
    "log_interval": 2,
    "picture_interval": 3,
    "save_interval": 2,
}
TINY_INFERENCE = TINY | {"sampling_steps": 3}


@pytest.fixture(scope="session")
def tiny_training() -> Callable[[Path], dict]:
    """Overrides that make a training of a bundle a matter of a second: 4 iterations of 4 slices of 32x32."""
    return lambda bundle: TINY_TRAINING | GENERATORS.get(bundle.name, DENOISER) | DISCRIMINATORS.get(bundle.name, {})


@pytest.fixture(scope="session")
def tiny_inference() -> Callable[[Path], dict]:
    """Overrides for inference with what `tiny_training` trains."""
    return lambda bundle: TINY_INFERENCE | GENERATORS.get(bundle.name, DENOISER)


@pytest.fixture(scope="session", params=BUNDLES, ids=lambda path: path.name)
def bundle(request) -> Path:
    """Every bundle in turn."""
    return request.param


@pytest.fixture(scope="session")
def bundles() -> dict[str, Path]:
    """All bundles by name."""
    return {path.name: path for path in BUNDLES}


@pytest.fixture(scope="session")
def amos(tmp_path_factory) -> Path:
    """A data set in AMOS22's layout, without body class as there: 2 training and 2 validation CTs of 32x32x6."""
    folder = tmp_path_factory.mktemp("amos22")
    write_dataset(folder, train=2, validation=2, shape=(32, 32, 6), body=False)
    return folder


@pytest.fixture(scope="session")
def workflow() -> Callable[..., ConfigWorkflow]:
    """`workflow(bundle, "inference", "evaluate", run_id="run", **overrides)`: the workflow, initialised."""

    def make(bundle: Path, *configs: str, run_id: str = "run", **overrides) -> ConfigWorkflow:
        made = ConfigWorkflow(
            config_file=[str(bundle / "configs" / f"{name}.yaml") for name in configs],
            workflow_type="train" if configs[0] == "train" else "infer",
            logging_file=False,
            run_id=run_id,
            **{name: str(value) if isinstance(value, Path) else value for name, value in overrides.items()},
        )
        made.initialize()
        return made

    return make


@contextmanager
def bundle_on_path(bundle: Path) -> Iterator[None]:
    """The bundle's root where MONAI puts it in a run; afterwards `sys.path` is as it was."""
    before = list(sys.path)
    sys.path.insert(1, str(bundle))
    try:
        yield
    finally:
        sys.path[:] = before


@pytest.fixture(scope="session")
def on_path() -> Callable[[Path], AbstractContextManager[None]]:
    """`with on_path(bundle):` for what looks into a workflow without running it."""
    return bundle_on_path


@pytest.fixture(scope="session")
def run_bundle(workflow) -> Callable[..., ConfigWorkflow]:
    """`workflow` and its run, as `python -m monai.bundle run` does both."""

    def run(bundle: Path, *configs: str, **options) -> ConfigWorkflow:
        with bundle_on_path(bundle):
            made = workflow(bundle, *configs, **options)
            made.run()
            made.finalize()
        return made

    return run


@pytest.fixture(scope="session")
def trained(bundle, amos, run_bundle, tiny_training, tmp_path_factory) -> Path:
    """Folder that the tiny training of a bundle left."""
    folder = tmp_path_factory.mktemp(bundle.name)
    run_bundle(
        bundle,
        "train",
        run_id="training",
        **tiny_training(bundle),
        dataset_dir=amos,
        output_dir=folder,
    )
    return folder


@pytest.fixture(autouse=True)
def _own_excepthook(monkeypatch):
    """A run installs its own."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.fixture
def error_line(capsys) -> Callable[[], AbstractContextManager[list[str]]]:
    """`with error_line() as lines:` around a run that fails; `lines[0]` is what its user reads at the end, alone."""

    @contextmanager
    def catch() -> Iterator[list[str]]:
        lines: list[str] = []
        with pytest.raises(Exception) as caught:
            yield lines
        capsys.readouterr()
        sys.excepthook(caught.type, caught.value, caught.tb)
        lines += capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), "\n".join(lines)

    return catch
