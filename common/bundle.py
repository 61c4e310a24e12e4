"""Where a running bundle lies, and its weights.

`python -m common.bundle model.pt model_half.pt` halves a file of weights, for shipping: float16 instead of float32.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from monai.bundle import ConfigWorkflow
from monai.networks.nets import DiffusionModelUNet
from torch import nn

from .files import replacing
from .networks.convert import convert


def bundle_root() -> str:
    """Folder of the bundle whose config asks, as an absolute path, from any working directory.

    Bundles in one process share this package, which Python imports once: neither its place nor what MONAI has put on
    `sys.path` last says which of them asks. The workflow that evaluates the config does. Without a workflow it is the
    bundle on `sys.path` (`sys.path[0]` belongs to the user's working directory and doesn't count), and without that the
    folder above this package.
    """
    roots = [workflow.config_root_path.parent for workflow in _asking_workflows()]
    for root in (*roots, *sys.path[1:]):
        if (Path(root) / "configs" / "metadata.json").is_file():
            return str(Path(root).absolute())
    return str(Path(__file__).absolute().parents[1])


def _asking_workflows() -> Iterator[ConfigWorkflow]:
    """The workflows among our callers, innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, ConfigWorkflow):
            yield caller
        frame = frame.f_back


def save_weights(path: str | os.PathLike, weights: dict[str, torch.Tensor], facts: dict[str, str | int]) -> None:
    """Write a network's state dict with facts about its origin, as `load_weights` and MONAI Label read it."""
    save_checkpoint(path, {"model": weights, "facts": facts})


def load_weights(
    network: nn.Module,
    path: str | os.PathLike | None,
    device: torch.device | str = "cpu",
    image_size: int | None = None,
) -> nn.Module:
    """Load weights into a network and bring it to the device, with channels last in memory: convolutions like that.

    Files that training wrote fit, plain state dicts, and the public layouts that `convert` knows. Without a path the
    network stays as it is: training that begins with random weights.

    Args:
        network: to load into.
        path: the file.
        device: where to bring the network.
        image_size: side of the slices that it is to make; weights that know to be of other slices are refused, which a
            convolutional network would take without a word.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such device here, not a weights file, or weights that don't fit; the message says whose they are
            if the file does.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("no GPU that PyTorch can use: leave out --device, or install a CUDA build of PyTorch")
    network.to(device, memory_format=torch.channels_last)
    if path is None:
        return network
    if not Path(path).is_file():
        others = ", ".join(map(str, sorted(Path(path).parent.glob("model*.pt"))))
        raise FileNotFoundError(
            f"no weights at {path}: train them (python -m monai.bundle run training --config_file configs/train.yaml "
            f"--dataset_dir ...) or name a file with --checkpoint{others and f'; there is {others}'}"
        )
    content = load_checkpoint(path)
    weights, facts, expected = content.get("model", content), content.get("facts"), network.state_dict()
    misfits = [name for name in expected if name not in weights or weights[name].shape != expected[name].shape]
    misfits += [name for name in weights if name not in expected]
    if misfits and facts is None and isinstance(network, DiffusionModelUNet):
        try:
            weights = convert(weights, network)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    elif misfits:
        origin = facts["bundle"] if facts else "another network"
        raise ValueError(
            f"{path} holds weights of {origin} that don't fit: {len(misfits)} tensors differ from this network's, such "
            f"as {misfits[0]}; name this bundle's own with --checkpoint, with the overlay (configs/small.yaml) and the "
            "options of their training, if any"
        )
    trained_size = (facts or {}).get("image_size", image_size)
    if image_size is not None and trained_size != image_size:
        raise ValueError(
            f"{path} was trained on slices of {trained_size}x{trained_size}: give --image_size {trained_size}, not "
            f"{image_size}"
        )
    network.load_state_dict(weights)
    return network


def save_checkpoint(path: str | os.PathLike, content: dict) -> None:
    """`torch.save` that leaves a whole file or none."""
    with replacing(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # what PyTorch's writer makes of a full disk
            raise OSError(str(error).splitlines()[0]) from error


def load_checkpoint(path: str | os.PathLike) -> dict:
    """Read a file of tensors and plain values onto the CPU; nothing in it is executed.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # whatever PyTorch's readers stumble on: truncated files give OSError, text KeyError
        raise ValueError(f"{path} is damaged or no checkpoint of tensors and plain values: replace it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict: replace it")
    return content


def main() -> None:
    """Write weights again in half precision; networks take them as they are."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("source", type=Path, help="model.pt of a training")
    parser.add_argument("target", type=Path, help="file to write")
    options = parser.parse_args()
    content = load_checkpoint(options.source)
    if "facts" not in content:
        parser.error(f"{options.source} is no model.pt of a training")
    weights = {name: v.half() if v.is_floating_point() else v for name, v in content["model"].items()}
    beyond = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if beyond:
        parser.error(f"{beyond[0]} holds values that float16 can't: ship the file as it is")
    save_weights(options.target, weights, content["facts"])


if __name__ == "__main__":
    main()
