# SPDX-License-Identifier: Apache-2.0
"""Batch norm with fixed statistics as part of the convolution before it, for inference."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fpn_fast import _torch_private
from fpn_fast._log import LOGGER

__all__ = ["fold_frozen_batch_norm"]

#: Packages whose FrozenBatchNorm2d has the buffers and the formula of torchvision's.
_PACKAGES = ("torchvision", "fpn_fast", "detectron2")
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def fold_frozen_batch_norm(model: nn.Module) -> nn.Module:
    """A copy of `model` whose batch norms are folded into their convolutions, for inference with images of any size.

    A norm with fixed statistics scales and shifts what its convolution gives. The copy's convolution has the scale in
    its weights and the shift in its bias, and an :class:`torch.nn.Identity` stands for the norm. Folded are the
    FrozenBatchNorm2d of torchvision, detectron2 and fpn_fast, and BatchNorm2d and SyncBatchNorm, directly after a
    Conv2d of one module: in the blocks and the stem of a ResNet, in ConvNormActivation, in mmcv's ConvModule, in
    detectron2's Conv2d, and in any module whose forward :mod:`torch.fx` can trace.

    Args:
        model: any module, in evaluation mode. It may be accelerated before, and the copy afterwards. Each module must
            be called by its forward, with the default values of its optional arguments.

    Returns:
        The copy, in evaluation mode. **Its keys are others**: those of the norms are gone, and every folded
        convolution has a bias. Load checkpoints into `model` before you fold it. Outputs differ by the rounding of
        the folded weights.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `model` is in training mode.

    A norm stays, and the logger ``fpn_fast`` warns with the reason, where something else uses the convolution or its
    output, where the convolution is of a subclass, where either has forward hooks, where dtypes differ, where the norm
    is in training mode, or where folded weights are not finite.

    Source: :func:`torch.nn.utils.fusion.fuse_conv_bn_eval`.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> list(fold_frozen_batch_norm(model).state_dict())
    ['0.weight', '0.bias']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError("the model must be in evaluation mode, call .eval()")
    folded = copy.deepcopy(model)
    holders = Counter(part for owner in folded.modules() for part in owner.children())
    left: dict[str, str] = {}
    for path, owner in list(folded.named_modules()):
        norms = {name: part for name, part in owner.named_children() if _is_batch_norm(part)}
        if not norms:
            continue
        convolutions = _convolutions_before(owner, list(norms.values()))
        for name, norm in norms.items():
            convolution = convolutions if isinstance(convolutions, str) else convolutions[norm]
            if not isinstance(convolution, str):
                convolution = _fold(convolution, norm, holders[convolution])
            if isinstance(convolution, str):
                left[f"{path}.{name}".lstrip(".")] = convolution
            else:
                # detectron2's convolution calls its norm if it has one.
                setattr(owner, name, None if owner is convolution else nn.Identity().eval())
    for name, reason in left.items():
        LOGGER.warning("fold_frozen_batch_norm left %s: %s", name, reason)
    return folded


def _is_batch_norm(module: nn.Module) -> bool:
    kind = type(module)
    frozen = kind.__name__ == "FrozenBatchNorm2d" and kind.__module__.partition(".")[0] in _PACKAGES
    return frozen or kind in _BATCH_NORMS


class _Calls(fx.Tracer):
    """Records on what a module calls its parts, and enters none of them."""

    def is_leaf_module(self, _module: nn.Module, _name: str) -> bool:
        return True


def _convolutions_before(owner: nn.Module, norms: list[nn.Module]) -> dict[nn.Module, nn.Conv2d | str] | str:
    """The convolution whose output each norm alone gets, or the reason why there is none."""
    kind = type(owner)
    if "forward" in vars(owner):
        return "the forward of its module is patched"
    if isinstance(owner, nn.Conv2d) and kind.__name__ == "Conv2d" and kind.__module__.startswith("detectron2."):
        return dict.fromkeys(norms, owner)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(kind.forward).parameters.items()
        if parameter.default is not parameter.empty
    }
    try:
        graph = _Calls().trace(owner, concrete_args=defaults)
    # Its forward may be any code, which may fail in any way on what stands for a tensor.
    except Exception as error:
        return f"torch.fx cannot trace the forward of its module, a {kind.__name__}: {error}"
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(owner.get_submodule(str(node.target)), []).append(node)
    modules = {node: part for part, nodes in calls.items() for node in nodes}
    found: dict[nn.Module, nn.Conv2d | str] = {}
    for norm in norms:
        nodes = calls.get(norm, [])
        before = nodes[0].args[0] if len(nodes) == 1 and len(nodes[0].args) == 1 else None
        convolution = modules.get(before) if isinstance(before, fx.Node) else None
        if len(nodes) != 1:
            found[norm] = f"its module calls it {len(nodes)} times"
        elif not isinstance(before, fx.Node) or not isinstance(convolution, nn.Conv2d):
            found[norm] = "it is not directly after a Conv2d"
        elif len(before.users) > 1 or len(calls[convolution]) > 1:
            found[norm] = "something else uses its convolution's output, or calls it"
        else:
            found[norm] = convolution
    return found


def _fold(convolution: nn.Conv2d, norm: Any, holders: int) -> nn.Conv2d | str:
    """Changes the convolution and returns it, or returns the reason why not."""
    if norm.training:
        return "it is in training mode"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    # A subclass may compute something else; that of detectron2 has the norm as a part.
    if type(convolution) is not nn.Conv2d and norm not in convolution.children():
        return f"its convolution is a {type(convolution).__name__}"
    if any("forward" in vars(each) or _torch_private.has_forward_hooks(each) for each in (convolution, norm)):
        return "it or its convolution has forward hooks or a patched forward"
    if holders > 1:
        return f"{holders} modules have its convolution"
    shape, dtype = (convolution.out_channels,), convolution.weight.dtype
    vectors = norm.running_mean, norm.running_var, norm.weight, norm.bias
    if any(each is not None and (tuple(each.shape) != shape or each.dtype != dtype) for each in vectors):
        return "its dtype or number of channels is not its convolution's"
    mean, variance, scale, shift = vectors
    with torch.no_grad():
        weight, bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, mean, variance, norm.eps, scale, shift
        )
    if not (weight.isfinite().all() and bias.isfinite().all()):
        return "folded weights would not be finite"
    convolution.weight, convolution.bias = weight, bias
    return convolution
