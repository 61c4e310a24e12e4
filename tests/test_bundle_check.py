"""What would keep a bundle from running is refused in one line, and a bundle that runs isn't."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft201909Validator

from common import bundle_check
from common.bundle import save_weights
from common.bundle_check import MODEL, check_bundle, check_metadata
from common.networks.unet import ConditionalUNet
from common.package import bundle_files

NAME = "abdominal_ct_conditional_ddpm"
SCHEMA = json.loads((Path(__file__).parent / "data" / "meta_schema_20240725.json").read_text(encoding="utf-8"))
SIZES = {
    "channels": (8, 16),
    "num_res_blocks": 1,
    "attention_levels": (False, True),
    "num_head_channels": 16,
    "norm_num_groups": 4,
}


@pytest.fixture
def tiny(bundles, tmp_path) -> Path:
    """A bundle, links followed, whose network is tiny and whose weights are there."""
    folder = tmp_path / NAME
    shutil.copytree(bundles[NAME], folder, ignore=shutil.ignore_patterns("__pycache__", "*.pt", "output"))
    edit(folder, lambda config: config["network_def"].update(SIZES))
    save_weights(folder / MODEL, ConditionalUNet(**SIZES).state_dict(), {"bundle": NAME, "image_size": 256})
    return folder


def edit(bundle: Path, change: Callable[[dict], object], name: str = "inference.yaml") -> None:
    path = bundle / "configs" / name
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML


def check(bundle: Path, weights: bool = True) -> None:
    check_bundle(bundle, bundle_files(bundle), weights)


def refused(bundle: Path, weights: bool = True) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        check(bundle, weights)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_bundle_of_the_repository_passes(bundle):
    check(bundle, weights=False)


def test_a_bundle_with_its_weights_passes(tiny):
    check(tiny)


@pytest.mark.parametrize(
    "name", ["LICENSE", "configs/metadata.json", "configs/inference.yaml", "docs/README.md", "scripts/__init__.py"]
)
def test_a_missing_file_is_named(tiny, name):
    (tiny / name).unlink()
    assert f"{tiny / name} is missing" in refused(tiny)


def test_small_weights_want_their_overlay(tiny):
    shutil.copy(tiny / MODEL, tiny / "models" / "model_small.pt")
    (tiny / "configs" / "small.yaml").unlink()
    assert f"{tiny / 'configs' / 'small.yaml'} is missing" in refused(tiny)


def test_small_weights_are_checked_against_the_small_network(tiny):
    shutil.copy(tiny / MODEL, tiny / "models" / "model_small.pt")  # fit the bundle's network, but not the small one
    assert re.search(r"model_small\.pt holds weights of \w+ that don't fit", refused(tiny))


def test_a_large_file_is_refused_unless_it_holds_weights(tiny, monkeypatch):
    assert bundle_check.LARGEST_FILE == 26_214_400
    monkeypatch.setattr(bundle_check, "LARGEST_FILE", 100_000)
    assert (tiny / MODEL).stat().st_size > 100_000
    check(tiny)
    (tiny / "docs" / "picture.png").write_bytes(bytes(100_001))
    assert re.search(r"picture\.png has more than 25 MB", refused(tiny))


def schema_faults() -> list[tuple[str, ...]]:
    """Where the schema requires something, as paths into the metadata."""
    tensor = [("network_data_format", "inputs", "image", key) for key in SCHEMA["$defs"]["tensor"]["required"]]
    formats = [("network_data_format", key) for key in SCHEMA["$defs"]["network_io"]["required"]]
    return [*((key,) for key in SCHEMA["required"]), *formats, *tensor]


@pytest.mark.parametrize("missing", [True, False])
@pytest.mark.parametrize("place", schema_faults(), ids="#".join)
def test_metadata_are_refused_where_the_schema_refuses_them(tiny, place, missing):
    path = tiny / "configs" / "metadata.json"
    content = json.loads(path.read_text())
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    if missing:
        del inner[place[-1]]
    else:
        inner[place[-1]] = None
    assert not Draft201909Validator(SCHEMA).is_valid(content)
    path.write_text(json.dumps(content))
    assert f"{path}: the Model Zoo wants" in (message := refused(tiny)) and f" as {'#'.join(place)}" in message


def test_metadata_are_refused_for_nothing_else_but_the_changelog(tiny):
    path = tiny / "configs" / "metadata.json"
    content = json.loads(path.read_text())
    tensor = {
        key: content["network_data_format"]["inputs"]["image"][key] for key in SCHEMA["$defs"]["tensor"]["required"]
    }
    least = {key: content[key] for key in SCHEMA["required"]}
    least["network_data_format"] = {"inputs": {"image": tensor}, "outputs": {"pred": tensor}}
    Draft201909Validator(SCHEMA).validate(least)
    path.write_text(json.dumps(least | {"changelog": content["changelog"]}))
    check_metadata(path)
    path.write_text(json.dumps(least | {"changelog": {"0.0.9": "before"}}))
    assert "nothing in the changelog about version 0.1.0" in refused(tiny)
    path.write_text(json.dumps(least))
    assert "a dict as changelog" in refused(tiny)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.json", '{"version": '),
        ("inference.yaml", "device: [cpu\n"),
        ("small.yaml", "a: b: c\n"),
        ("extra.json", "{'a': 1}"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(tiny, name, text):
    (tiny / "configs" / name).write_text(text)
    assert f"{tiny / 'configs' / name} can't be read" in refused(tiny)


@pytest.mark.parametrize("text", ["", "- a\n", "a\n"])
def test_a_config_that_is_none_is_named(tiny, text):
    (tiny / "configs" / "evaluate.yaml").write_text(text)
    assert f"{tiny / 'configs' / 'evaluate.yaml'} holds no names" in refused(tiny)


@pytest.mark.parametrize("target", ["scripts.transforms.NoTransform", "scripts.nothing.X", "NoSuchd", "nopackage.X"])
@pytest.mark.parametrize("name", ["inference.yaml", "train.yaml", "evaluate.yaml"])
def test_a_target_that_is_not_there_is_named(tiny, name, target):
    edit(tiny, lambda config: config.update(some={"deep": [{"_target_": target}]}), name)
    message = refused(tiny)
    assert message.startswith(f"{tiny / 'configs' / name}: there is no {target}, ")


def test_a_target_that_cannot_be_imported_says_why(tiny, tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.syspath_prepend(tmp_path)
    edit(tiny, lambda config: config.update(some={"_target_": "broken_module.X"}))
    assert re.search(r"broken_module\.X.* can't be imported .*nowhere_to_be_found", refused(tiny))


def test_a_target_that_is_computed_is_left_to_the_run(tiny):
    edit(tiny, lambda config: config.update(some={"_target_": "$@network_def.encode"}))
    check(tiny)


@pytest.mark.parametrize("reference", ["@nowhere", "$@nowhere + 1", "$len(@dataset) + len(@nowhere#deeper)"])
@pytest.mark.parametrize("name", ["inference.yaml", "train.yaml"])
def test_a_reference_to_nothing_is_named(tiny, name, reference):
    edit(tiny, lambda config: config.update(dataset="$[]", some={"deep": [reference]}), name)
    assert f"{tiny / 'configs' / name} has no nowhere" in refused(tiny)


@pytest.mark.parametrize(("name", "key"), [("inference.yaml", "evaluator"), ("train.yaml", "dataset_dir")])
def test_what_monai_asks_of_a_config_is_named(tiny, name, key):
    edit(tiny, lambda config: config.pop(key), name)
    assert f"{tiny / 'configs' / name} has no {key}" in refused(tiny)


def test_a_network_that_cannot_be_built_says_why(tiny):
    edit(tiny, lambda config: config["network_def"].update(colour="red"))
    assert re.search(r"inference\.yaml: the network can't be built .*'colour'", refused(tiny))


def test_missing_weights_name_the_ways_out(tiny):
    (tiny / MODEL).unlink()
    message = refused(tiny)
    assert str(tiny / MODEL) in message and "large_files.yml" in message and "--without-weights" in message
    check(tiny, weights=False)


@pytest.mark.parametrize(
    ("sizes", "image_size", "said"),
    [({"channels": (8, 32)}, 256, "that don't fit"), ({}, 64, "trained on slices of 64x64")],
)
def test_weights_of_another_size_are_refused(tiny, sizes, image_size, said):
    network = ConditionalUNet(**SIZES | sizes)
    save_weights(tiny / MODEL, network.state_dict(), {"bundle": NAME, "image_size": image_size})
    message = refused(tiny)
    assert str(tiny / MODEL) in message and said in message and "packaged weights" in message


def test_weights_with_one_tensor_less_are_refused(tiny):
    weights = ConditionalUNet(**SIZES).state_dict()
    del weights["out.2.conv.bias"]
    save_weights(tiny / MODEL, weights, {"bundle": NAME})
    assert "1 tensors differ from this network's, such as out.2.conv.bias" in refused(tiny)


def test_damaged_weights_are_refused(tiny):
    (tiny / MODEL).write_bytes((tiny / MODEL).read_bytes()[:-100])
    assert f"{tiny / MODEL} is damaged" in refused(tiny)


def large_files(bundle: Path, **entry) -> None:
    told = {"path": MODEL, "url": "https://example.org/model.pt"} | entry
    (bundle / "large_files.yml").write_text(yaml.safe_dump({"large_files": [told]}))


def test_large_files_stand_for_weights(tiny):
    (tiny / MODEL).unlink()
    large_files(tiny, path="models/other.pt")
    assert "no weights" in refused(tiny)
    large_files(tiny)
    check(tiny)


@pytest.mark.parametrize("hash_type", ["", "md5", "sha1", "sha256", "sha512"])
def test_weights_are_those_that_large_files_name(tiny, hash_type):
    digest = hashlib.new(hash_type or "sha256", (tiny / MODEL).read_bytes()).hexdigest()
    large_files(tiny, hash_type=hash_type, hash_val=digest)
    check(tiny)
    large_files(tiny, hash_type=hash_type, hash_val="")
    check(tiny)
    large_files(tiny, hash_type=hash_type, hash_val="0" + digest[:-1])
    assert f"{tiny / MODEL} isn't the file that large_files.yml names" in refused(tiny)


@pytest.mark.parametrize(
    "content",
    [
        {"files": []},
        {"large_files": None},
        {"large_files": [MODEL]},
        {"large_files": [{"path": MODEL}]},
        {"large_files": [{"path": MODEL, "url": "https://example.org", "hash_type": "crc32"}]},
    ],
)
def test_large_files_without_what_is_needed_are_refused(tiny, content):
    (tiny / "large_files.yml").write_text(yaml.safe_dump(content))
    assert "large_files must be a list" in refused(tiny)
