"""Every bundle as the MONAI Model Zoo wants it: metadata, documentation, licence, sizes of files and lines.

`data/meta_schema_20240725.json` has the rules of the Model Zoo's schema without its descriptions; see its `$comment`.
"""

from __future__ import annotations

import ast
import configparser
import inspect
import json
import os
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import monai.bundle
import pytest
import yaml
from conftest import GENERATORS
from jsonschema import Draft201909Validator, ValidationError
from monai.bundle import ConfigParser

from common.labels import CLASSES
from common.transforms import AIR_HU, HU_WINDOW

PROJECT = Path(__file__).absolute().parents[1]
BUNDLES = sorted(path for path in (PROJECT / "bundles").iterdir() if path.is_dir())
SCHEMA = json.loads((Path(__file__).parent / "data" / "meta_schema_20240725.json").read_text(encoding="utf-8"))
PINS = dict(
    line.split("==") for line in (PROJECT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
)
OPTIONAL = {"TotalSegmentator", "pydicom", "monailabel", "fastapi"}
"""For Dice, for DICOM, and what MONAI Label's server brings along."""

LARGEST_FILE = 25 * 1024**2
LONGEST_LINE = 120

HEADINGS = [
    "# Model Overview",
    "## Data",
    "## Training configuration",
    "## Input",
    "## Output",
    "## Performance",
    "## MONAI Bundle Commands",
    "# References",
    "# License",
]
"""The Model Zoo's template, in its order."""

FILES = ["LICENSE", "configs/metadata.json", "configs/inference.yaml", "docs/README.md", "docs/data_license.txt"]
FILES += ["configs/train.yaml", "configs/logging.conf"]
"""What the Model Zoo requires, and what it and MONAI's documentation prefer; weights are for the package."""

EVERYWHERE = ("bundle_root", "device", "dataset_dir", "output_dir")
KEYS = {
    "train": [*EVERYWHERE, *(f"train#{key}" for key in ("trainer", "trainer#max_epochs", "dataset", "handlers"))],
    "inference": [*EVERYWHERE, "network_def", "inferer"],
}
"""What the Model Zoo's rules for contributions name."""

SLICES = (("inputs", "image"), ("outputs", "pred"))

pytestmark = pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)


def metadata(bundle: Path) -> dict:
    return json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))


def readme(bundle: Path) -> str:
    return (bundle / "docs" / "README.md").read_text(encoding="utf-8")


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """The command lines in a document, continued lines joined."""
    lines = "\n".join(code_blocks(text)).replace("\\\n", " ").splitlines()
    return [line for line in lines if "monai.bundle" in line]


def files(bundle: Path) -> list[Path]:
    """What a zip of the bundle would hold, links followed; of its own weights only those that are committed."""
    found = (Path(folder) / name for folder, _, names in os.walk(bundle, followlinks=True) for name in names)
    return [
        path
        for path in found
        if "__pycache__" not in path.parts and (path.parent.name != "models" or path.name == "model_small.pt")
    ]


def test_metadata_follows_the_schema(bundle):
    Draft201909Validator.check_schema(SCHEMA)
    Draft201909Validator(SCHEMA).validate(metadata(bundle))


@pytest.mark.parametrize("key", SCHEMA["required"])
def test_the_schema_notices_what_is_missing(bundle, key):
    incomplete = {k: v for k, v in metadata(bundle).items() if k != key}
    with pytest.raises(ValidationError, match=f"'{key}' is a required property"):
        Draft201909Validator(SCHEMA).validate(incomplete)


def test_files_of_the_model_zoo_are_there(bundle):
    assert [name for name in FILES if not (bundle / name).is_file()] == []


@pytest.mark.parametrize("name", KEYS)
def test_configs_have_the_keys_of_the_model_zoo(bundle, name):
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / f"{name}.yaml")
    assert [key for key in KEYS[name] if key not in parser] == []


def test_the_name_says_nothing_wrong(bundle):
    """MONAI Label takes bundles for what their names say; the Model Zoo wants words joined by underscores."""
    assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", bundle.name)
    assert not re.search("segmentation|detection|classification|deepedit|deepgrow", bundle.name)


def test_no_paths_of_somebody_are_in_the_configs(bundle):
    texts = {path: path.read_text(encoding="utf-8") for path in (bundle / "configs").iterdir()}
    paths = {found for text in texts.values() for found in re.findall(r"(?<![\w./'\"])/\w+/\w+", text)}
    assert paths <= {"/data/amos22"}


def test_metadata_is_indented_by_four(bundle):
    text = (bundle / "configs" / "metadata.json").read_text(encoding="utf-8")
    assert text == json.dumps(metadata(bundle), indent=4, ensure_ascii=False) + "\n"


def test_changelog_knows_the_version_and_the_package_has_the_same(bundle):
    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg", encoding="utf-8")
    assert metadata(bundle)["version"] in metadata(bundle)["changelog"]
    assert metadata(bundle)["version"] == setup["metadata"]["version"]


def test_versions_are_those_that_the_tests_run_with(bundle):
    meta = metadata(bundle)
    versions = meta["required_packages_version"] | {
        "monai": meta["monai_version"],
        "torch": meta["pytorch_version"],
        "numpy": meta["numpy_version"],
    }
    assert versions == {name: PINS.get(name) for name in versions}


def test_required_packages_are_what_the_scripts_import(bundle):
    modules = set()
    for path in (bundle / "scripts").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module.split(".")[0])
    installed = packages_distributions()
    named = metadata(bundle)["required_packages_version"].keys() | OPTIONAL | {"monai", "torch", "numpy"}
    imported = {module: {module, *installed.get(module, ())} for module in modules - sys.stdlib_module_names}
    assert [module for module, names in imported.items() if not names & named] == []


def test_metadata_says_what_goes_in_and_comes_out(bundle):
    formats = metadata(bundle)["network_data_format"]
    for name in ("train", "inference"):
        side = yaml.safe_load((bundle / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))["image_size"]
        assert all(formats[kind][key]["spatial_shape"] == [side, side] for kind, key in SLICES)
    # MONAI Label takes the first entries for the keys of the input and the output.
    assert next(iter(formats["inputs"])) == "image" and next(iter(formats["outputs"])) == "pred"
    assert formats["inputs"]["image"]["value_range"] == [CLASSES[0].id, CLASSES[-1].id]
    assert formats["outputs"]["pred"]["value_range"] == [0, 1]
    assert formats["post_processed_outputs"]["pred"]["value_range"] == [AIR_HU, HU_WINDOW[1]]


def test_readme_has_the_headings_of_the_template(bundle):
    outside_code = re.sub(r"^```.*?^```", "", readme(bundle), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#{1,2} .*$", outside_code, re.MULTILINE)
    assert headings == HEADINGS


def test_commands_in_the_readme_fit_the_bundle(bundle):
    """The configs and the run ids exist, and every option is one that the named configs have."""
    lines = commands(readme(bundle))
    for kind in ("train", "inference", "evaluate"):
        assert any(f"configs/{kind}.yaml" in line for line in lines), f"no command for {kind}"
    for line in lines:
        names = re.findall(r"configs/[\w.]+", line)
        assert names, line
        ids: set[str] = set()
        for name in names:
            assert (bundle / name).is_file(), f"{name} in: {line}"
            ids |= yaml.safe_load((bundle / name).read_text(encoding="utf-8")).keys()
        verb, _, arguments = line.partition("monai.bundle ")[2].partition(" ")
        if verb != "run":
            known = inspect.signature(getattr(monai.bundle, verb)).parameters.keys()
            assert set(re.findall(r"--(\w+)", arguments)) <= known, line
            continue
        run_id = re.match(r"\w+", arguments)
        options = {option.split("#")[0] for option in re.findall(r"--([\w#]+)", arguments)}
        assert {run_id[0] if run_id else "run"} | options - {"config_file"} <= ids, line


def test_readme_says_what_can_be_exported(bundle):
    """The Model Zoo wants to know of TorchScript and of TensorRT; what is said of the first, the verbs' tests try."""
    text = readme(bundle)
    assert "TorchScript" in text and "TensorRT" in text
    assert any("ckpt_export" in line for line in commands(text)) == (bundle.name in GENERATORS)


def test_configs_in_the_readme_exist(bundle):
    for name in re.findall(r"configs/[\w.]+\.(?:yaml|json|conf)", readme(bundle)):
        assert (bundle / name).is_file(), name


def test_licences_are_there(bundle):
    assert (bundle / "LICENSE").read_text(encoding="utf-8") == (PROJECT / "LICENSE").read_text(encoding="utf-8")
    assert "https://amos22.grand-challenge.org" in (bundle / "docs" / "data_license.txt").read_text(encoding="utf-8")


def test_no_file_is_too_large_for_the_model_zoo(bundle):
    assert [path for path in files(bundle) if path.stat().st_size > LARGEST_FILE] == []


def test_lines_are_short_enough(bundle):
    overlong = [
        f"{path.relative_to(bundle)}:{number}"
        for path in files(bundle)
        if path.suffix in (".yaml", ".py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > LONGEST_LINE
    ]
    assert overlong == []
