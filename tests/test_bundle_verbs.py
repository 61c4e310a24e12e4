"""What `python -m monai.bundle` does with a bundle beside `run`: in this process, small, without network."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import monai.bundle
import pytest
import torch
from conftest import BUNDLES, GENERATORS
from monai.bundle import ConfigParser, ckpt_export, create_workflow, load, verify_metadata, verify_net_in_out
from torch import nn

PROJECT = Path(__file__).absolute().parents[1]
SCHEMA = PROJECT / "tests" / "data" / "meta_schema_20240725.json"
INPUT = {"_meta_#network_data_format#inputs#image#spatial_shape": [32, 32], "device": "cpu"}
TWO_CHANNELS = {"_meta_#network_data_format#outputs#pred#num_channels": 2}


def only(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("bundle", paths, ids=lambda path: path.name, indirect=True)


of_generators = only([path for path in BUNDLES if path.name in GENERATORS])
of_denoisers = only([path for path in BUNDLES if path.name not in GENERATORS])

# Tracing warns of Python's ifs and of random numbers in what it traces, MONAI of what configs and schemas might do.
pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:parsing config_file", "ignore:No hash value"
)


class Home(NamedTuple):
    """A folder of bundles that holds one bundle's weights alone, and the network they are of."""

    folder: Path
    network: nn.Module
    weights: Path


@pytest.fixture
def files(bundle) -> dict[str, str]:
    """The options that most verbs want."""
    configs = bundle / "configs"
    return {"config_file": str(configs / "inference.yaml"), "meta_file": str(configs / "metadata.json")}


@pytest.fixture
def sizes(bundle, tiny_inference, on_path) -> Iterator[dict]:
    """Options that make the network small; the bundle's root is where a command finds it."""
    with on_path(bundle):
        yield {name: value for name, value in tiny_inference(bundle).items() if name.startswith("network_def#")}


@pytest.fixture
def build(files, sizes) -> Callable[[], nn.Module]:
    """The network as the bundle's config has it, with other weights and statistics at each call."""

    def made() -> nn.Module:
        parser = ConfigParser()
        parser.read_config(files["config_file"])
        parser.update(sizes)
        network = parser.get_parsed_content("network_def").eval()
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
        return network

    return made


@pytest.fixture
def home(bundle, build, tmp_path) -> Home:
    torch.manual_seed(0)
    weights = tmp_path / bundle.name / "models" / "model.pt"
    weights.parent.mkdir(parents=True)
    made = Home(tmp_path, build(), weights)
    torch.save({"model": made.network.state_dict(), "facts": {"bundle": bundle.name}}, weights)
    return made


def label_maps(*shape: int) -> torch.Tensor:
    return torch.randint(17, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def seeded(network: nn.Module, image: torch.Tensor, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return network(image)


def export(home: Home, options: dict) -> None:
    """As the documentation's command, to where `load` looks for it."""
    paths = {"filepath": str(home.weights.with_suffix(".ts")), "ckpt_file": str(home.weights)}
    ckpt_export("network_def", key_in_ckpt="model", use_trace=True, input_shape=[1, 1, 32, 32], **paths, **options)


def test_verify_metadata(files, tmp_path):
    """MONAI would download the schema that the metadata names, were it not there."""
    assert ConfigParser.load_config_file(files["meta_file"])["schema"].endswith(f"/{SCHEMA.name}")
    verify_metadata(meta_file=files["meta_file"], filepath=shutil.copy(SCHEMA, tmp_path))


@of_generators
def test_verify_net_in_out_of_a_generator(files, sizes):
    options = files | sizes | INPUT
    verify_net_in_out("network_def", **options)
    with pytest.raises(ValueError, match="channel number `1` doesn't match: `2`"):
        verify_net_in_out("network_def", **options | TWO_CHANNELS)


@of_denoisers
def test_verify_net_in_out_of_a_denoiser_wants_more_than_one_tensor(files, sizes):
    options = files | sizes | INPUT
    with pytest.raises(TypeError, match="'timesteps'"):
        verify_net_in_out("network_def", **options)
    options |= {"extra_forward_args": {"timesteps": torch.tensor([500]), "image": label_maps(1, 1, 32, 32)}}
    verify_net_in_out("network_def", **options | TWO_CHANNELS)
    with pytest.raises(ValueError, match="channel number `2` doesn't match: `1`"):
        verify_net_in_out("network_def", **options)


@of_generators
def test_an_exported_generator_is_the_generator(bundle, files, sizes, home):
    """Exported with one slice of 32x32, it takes any batch, size and dtype, and draws noise of its own."""
    export(home, files | sizes)
    module, metadata, configs = load(
        bundle.name, bundle_dir=home.folder, load_ts_module=True, device="cpu", config_files=("inference.json",)
    )
    for image in (label_maps(1, 1, 32, 32).float(), label_maps(3, 1, 48, 64)):
        expected = seeded(home.network, image, seed=0)
        assert expected.std() > 0.1
        torch.testing.assert_close(seeded(module, image, seed=0), expected, rtol=0, atol=1e-6)
    differs = not torch.allclose(seeded(module, image, seed=1), expected, atol=1e-2)
    assert differs == (bundle.name != "abdominal_ct_spade")
    assert metadata == json.loads(Path(files["meta_file"]).read_text(encoding="utf-8"))
    assert json.loads(configs["inference.json"]) == ConfigParser.load_config_file(files["config_file"])


@of_denoisers
def test_a_denoiser_is_not_exported_but_can_be_traced(files, sizes, home):
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'timesteps'"):
        export(home, files | sizes)

    def inputs(batch: int, *size: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(batch, 1, *size), torch.randint(1000, (batch,)), label_maps(batch, 1, *size)

    other = inputs(3, 48, 64)
    with torch.no_grad():
        traced, expected = torch.jit.trace(home.network, inputs(1, 32, 32))(*other), home.network(*other)
    assert expected.std() > 0.1
    torch.testing.assert_close(traced, expected, rtol=1e-5, atol=1e-5)


def test_load_fills_a_network(bundle, home, build):
    other = build()
    name = next(name for name, _ in other.named_parameters())
    assert not torch.equal(other.state_dict()[name], home.network.state_dict()[name])
    loaded = load(bundle.name, model=other, bundle_dir=home.folder, key_in_ckpt="model", device="cpu")
    expected, weights = home.network.state_dict(), loaded.state_dict()
    assert loaded is other and all(torch.equal(weights[name], expected[name]) for name in expected)


def test_load_without_a_network_gives_the_file(bundle, home):
    """MONAI looks for a config in JSON alone."""
    shutil.copytree(bundle / "configs", home.folder / bundle.name / "configs")
    with pytest.warns(UserWarning, match=r"Cannot find the config file: .*train\.json, return state dict"):
        content = load(bundle.name, bundle_dir=home.folder, device="cpu")
    assert content["facts"] == {"bundle": bundle.name} and content["model"].keys() == home.network.state_dict().keys()


def test_create_workflow_knows_the_bundle(bundle, files, sizes, home, amos):
    """All that MONAI's applications ask of an inference workflow is there, and what the metadata say."""
    workflow = create_workflow(
        config_file=files["config_file"],
        workflow_type="inference",
        logging_file=False,
        dataset_dir=str(amos / "labelsVa"),
        checkpoint=str(home.weights),
        device="$torch.device('cpu')",
        missing_body="estimate",
        **sizes,
    )
    assert workflow.check_properties() == [] and workflow.bundle_root == str(bundle)
    metadata = json.loads(Path(files["meta_file"]).read_text(encoding="utf-8"))
    for name in ("version", "monai_version", "pytorch_version", "numpy_version", "description"):
        assert getattr(workflow, name) == metadata[name]
    assert workflow.spatial_shape == [256, 256] and workflow.channel_def == {"0": "CT"}
    expected, weights = home.network.state_dict(), workflow.evaluator.network.state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_commands_of_the_document_are_monais():
    """Verbs exist in MONAI, and take the options; those with a # belong to the configs."""
    text = (PROJECT / "docs" / "model_zoo.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^python -m monai\.bundle (\w+)(.*)$", text, re.MULTILINE)
    assert {"verify_metadata", "verify_net_in_out", "ckpt_export"} <= {verb for verb, _ in commands}
    for verb, options in commands:
        known = inspect.signature(getattr(monai.bundle, verb)).parameters.keys()
        assert set(re.findall(r"--(\w+)(?=\s|$)", options)) <= known, verb
