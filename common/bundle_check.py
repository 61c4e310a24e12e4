"""What would keep a bundle from running where it is unpacked, found before it is packaged."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Any

import torch
import yaml
from monai.apps.utils import SUPPORTED_HASH_TYPES
from monai.bundle import ComponentLocator, ConfigParser, ReferenceResolver
from monai.bundle.properties import InferProperties, TrainProperties
from monai.utils import BundleProperty, BundlePropertyConfig

from .bundle import load_weights

METADATA = "configs/metadata.json"
LARGE_FILES = "large_files.yml"
HASH_TYPE = "sha256"
"""Of a file there that doesn't say."""

MODEL = "models/model.pt"
WEIGHTS = {
    MODEL: ("configs/inference.yaml",),
    "models/model_small.pt": ("configs/inference.yaml", "configs/small.yaml"),
}
"""Weights that a bundle may hold, and the configs of the network they are for."""

REQUIRED = ("LICENSE", METADATA, "configs/inference.yaml", "docs/README.md", "scripts/__init__.py")
LARGEST_FILE = 25 * 1024**2
"""Of the Model Zoo, in bytes; weights may have more."""

TEXTS = ("schema", "version", "monai_version", "pytorch_version", "numpy_version")
TEXTS += ("task", "description", "authors", "copyright")
KEYS = dict.fromkeys(TEXTS, str) | {"changelog": dict, "required_packages_version": dict, "network_data_format": dict}
TENSOR_KEYS = dict.fromkeys(("type", "format", "dtype"), str)
TENSOR_KEYS |= {"num_channels": int, "spatial_shape": list, "value_range": list}
"""What the Model Zoo's schema 20240725 requires, and of which type: of metadata, and of each input and output. It does
without a changelog; the Model Zoo doesn't."""

PROPERTIES = {"configs/train.yaml": TrainProperties, "configs/inference.yaml": InferProperties}


def check_bundle(bundle: Path, files: Mapping[str, Path], weights: bool = True) -> None:
    """Refuse a bundle that wouldn't run.

    Args:
        bundle: its folder, for messages.
        files: what it consists of, by the names within it.
        weights: whether it must have weights, or a `large_files.yml` that says where they are.

    Raises:
        FileNotFoundError: a required file is missing, or the weights are.
        ValueError: metadata, a config, weights or `large_files.yml` aren't what they must be, or a file is too large.
    """
    shipped = {name: configs for name, configs in WEIGHTS.items() if name in files}
    for name in (*REQUIRED, *chain(*shipped.values())):
        if name not in files:
            raise FileNotFoundError(f"{bundle / name} is missing, and a bundle needs it: restore it")
    for name, path in files.items():
        if name not in WEIGHTS and path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"{path} has more than 25 MB, the Model Zoo's limit: make it smaller or take it out")
    check_metadata(files[METADATA])
    locator = ComponentLocator()
    for name, path in files.items():
        if name.startswith("configs/") and path.suffix in (".yaml", ".json") and name != METADATA:
            check_config(path, PROPERTIES.get(name), locator)
    large_files = read_large_files(files[LARGE_FILES]) if LARGE_FILES in files else {}
    if weights and MODEL not in files and MODEL not in large_files:
        raise FileNotFoundError(
            f"no weights at {bundle / MODEL}: train them, say in {LARGE_FILES} where they are, or package without them "
            "(--without-weights)"
        )
    for name in {MODEL, *shipped}:
        check_network([files[config] for config in WEIGHTS[name]], files.get(name))
    for name in large_files.keys() & files.keys():
        check_hash(files[name], large_files[name])


def check_metadata(path: Path) -> None:
    """Refuse metadata that lack what the Model Zoo's schema requires, or whose changelog doesn't know the version."""
    metadata = _read(path)
    _check_keys(path, metadata, KEYS, "")
    formats = metadata["network_data_format"]
    _check_keys(path, formats, {"inputs": dict, "outputs": dict}, "network_data_format#")
    for kind in ("inputs", "outputs"):
        for name, tensor in formats[kind].items():
            _check_keys(path, tensor, TENSOR_KEYS, f"network_data_format#{kind}#{name}#")
    if metadata["version"] not in metadata["changelog"]:
        raise ValueError(f"{path}: nothing in the changelog about version {metadata['version']}: say what is new in it")


def _check_keys(path: Path, content: Any, kinds: dict[str, type], prefix: str) -> None:
    for key, kind in kinds.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise ValueError(f"{path}: the Model Zoo wants a {kind.__name__} as {prefix}{key}: write it there")


def check_config(path: Path, properties: Mapping[str, dict] | None, locator: ComponentLocator) -> None:
    """Refuse a config that can't be read, or that names what there isn't.

    Args:
        path: the file.
        properties: what MONAI wants in it; then it must also have all that it refers to by `@`. None for an overlay,
            which leans on other configs.
        locator: knows MONAI's components by their short names.
    """
    config = _read(path)
    for item in _items(config):
        target = item.get("_target_") if isinstance(item, dict) else None
        if isinstance(target, str) and not target.startswith(("$", "@")) and not _exists(path, target, locator):
            raise ValueError(f"{path}: there is no {target}, a _target_: correct its name or install its package")
    if properties is None:
        return
    wanted = [p[BundlePropertyConfig.ID] for p in properties.values() if p[BundleProperty.REQUIRED]]
    for item in _items(config):
        if isinstance(item, str):
            wanted += ReferenceResolver.match_refs_pattern(item)
    parser = ConfigParser(config)
    for id in wanted:
        if id not in parser:
            raise ValueError(f"{path} has no {id}, which it refers to or MONAI asks for: add it or correct the name")


def _exists(path: Path, target: str, locator: ComponentLocator) -> bool:
    try:
        return locator.get_component_module_name(target) is not None or locate(_own(target)) is not None
    except ErrorDuringImport as error:
        raise ValueError(f"{path}: {target}, a _target_, can't be imported ({error.value}): mend it") from error


def _own(target: str) -> str:
    """The path of what a config calls `scripts.…`."""
    return f"{__package__}.{target.removeprefix('scripts.')}" if target.startswith("scripts.") else target


def check_network(configs: list[Path], weights: Path | None) -> None:
    """Refuse configs whose network can't be built, and weights that aren't its own.

    Nothing takes memory but the weights: the network has shapes and no values.
    """
    config = ConfigParser.load_config_files(configs)
    for item in _items(config):
        if isinstance(item, dict) and isinstance(item.get("_target_"), str):
            item["_target_"] = _own(item["_target_"])
    parser = ConfigParser(config)
    try:
        with torch.device("meta"):
            network = parser.get_parsed_content("network_def")
    except RuntimeError as error:
        cause = error.__cause__ or error
        raise ValueError(f"{configs[-1]}: the network can't be built ({cause}): correct network_def") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one for each tensor: its values go nowhere
        try:
            load_weights(network, weights, "meta", parser.get_parsed_content("image_size"))
        except ValueError as error:
            raise ValueError(f"{error}; packaged weights must fit without options: replace or remove them") from error


def read_large_files(path: Path) -> dict[str, dict]:
    """What `python -m monai.bundle download_large_files` fetches, by the names within the bundle."""
    try:
        entries = {entry["path"]: entry for entry in _read(path)["large_files"] if entry["url"]}
        known = all((entry.get("hash_type") or HASH_TYPE) in SUPPORTED_HASH_TYPES for entry in entries.values())
    except (KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(
            f"{path}: large_files must be a list of entries with path, url and, if there is a hash, hash_val and "
            f"hash_type ({', '.join(SUPPORTED_HASH_TYPES)}): correct it"
        )
    return entries


def check_hash(path: Path, entry: dict) -> None:
    """Refuse a file that isn't the one of its name in `large_files.yml`, if the hash stands there."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, entry.get("hash_type") or HASH_TYPE).hexdigest()
    if entry.get("hash_val") and entry["hash_val"] != digest:
        raise ValueError(f"{path} isn't the file that {LARGE_FILES} names: correct url and hash_val, or the file")


def _read(path: Path) -> dict:
    try:
        content = ConfigParser.load_config_file(path)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} can't be read ({' '.join(str(error).split())}): correct or restore it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no names with values: restore it")
    return content


def _items(config: Any) -> Iterator[Any]:
    """A config and all that is in it."""
    yield config
    for child in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from _items(child)
