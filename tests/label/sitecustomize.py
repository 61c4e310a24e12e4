"""Lets a torchvision that was built for GPUs be imported beside a torch for CPUs; Python runs this when it starts.

MONAI Label imports torchvision, and the one on PyPI looks for two operators that it has only beside a torch for GPUs.
Nothing here calls them.
"""

from importlib.metadata import version

if version("torch").endswith("+cpu") and not version("torchvision").endswith("+cpu"):
    import torch

    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
