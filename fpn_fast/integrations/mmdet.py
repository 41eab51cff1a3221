# SPDX-License-Identifier: Apache-2.0
"""The classes that accelerate() swaps in an mmdetection model, and names for its configurations. Imports mmdetection.

They are subclasses of mmdetection's own. :mod:`fpn_fast.nn.mmdet` has the modules that do not need mmdetection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from mmcv.ops import RoIAlign
from mmdet.models.backbones import resnet, resnext
from mmdet.models.dense_heads import rpn_head
from mmdet.models.necks import fpn, pafpn
from mmdet.models.roi_heads.roi_extractors import generic_roi_extractor, single_level_roi_extractor
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from mmdet.models.task_modules.prior_generators import AnchorGenerator
from mmdet.registry import MODELS
from mmengine.structures import InstanceData
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fpn_fast import backends
from fpn_fast._torch_private import has_forward_hooks
from fpn_fast.integrations import replacing
from fpn_fast.nn import mmdet
from fpn_fast.nn._own import Part, Steps
from fpn_fast.nn.mmdet import predict_proposals, proposals_of_images
from fpn_fast.nn.mmdet.necks import FPNForward, PAFPNForward, merge_options
from fpn_fast.nn.mmdet.proposals import check_config
from fpn_fast.nn.mmdet.roi_extractors import LAYER_KEYS, GenericForward, SingleForward
from fpn_fast.nn.resnet import ResidualBlock, know_norm, steps_of

_PROPOSALS = Steps(rpn_head.RPNHead, "_predict_by_feat_single", "_bbox_post_process", replaced="predict_by_feat")
_PRIORS = Part(AnchorGenerator, fused=mmdet.AnchorGenerator)
_CODER = Part(DeltaXYWHBBoxCoder, fused=mmdet.DeltaXYWHBBoxCoder)


class _Checked:
    """A module that raises ValueError when it is built with unsupported settings; accelerate() asks before it swaps."""

    # Why a module of the class that this one replaces has to stay unchanged; None where it can be swapped.
    problem: Callable[[Any], str | None]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if reason := self.problem(self):
            raise ValueError(reason)


class _Neck(_Checked):
    @staticmethod
    def problem(module: Any) -> str | None:
        try:
            merge_options(module.upsample_cfg)
        except ValueError as error:
            return str(error)
        return None


class FPN(_Neck, FPNForward, fpn.FPN):
    """mmdetection's FPN with the merge by :func:`fpn_fast.ops.top_down`."""


class PAFPN(_Neck, PAFPNForward, pafpn.PAFPN):
    """mmdetection's PAFPN with the merge by :func:`fpn_fast.ops.top_down`."""


class _Extractor(_Checked):
    roi_layers: nn.ModuleList

    @staticmethod
    def problem(module: Any) -> str | None:
        if any(type(layer) is not RoIAlign for layer in module.roi_layers):
            return f"its layers are {type(module.roi_layers[0]).__name__}, which has no fused implementation"
        if any(map(has_forward_hooks, module.roi_layers)):
            return "its layers have forward hooks, which a fused extractor would not call"
        if getattr(module, "with_pre", False) or getattr(module, "with_post", False):
            return "it has a pre_module or post_module, which have no fused implementation"
        return None

    def _layer(self) -> dict[str, Any]:
        return {key: getattr(self.roi_layers[0], key) for key in LAYER_KEYS}


class SingleRoIExtractor(_Extractor, SingleForward, single_level_roi_extractor.SingleRoIExtractor):
    """mmdetection's SingleRoIExtractor by :func:`fpn_fast.ops.multiscale_roi_align`. RoIs stay float32."""

    strict = False


class GenericRoIExtractor(_Extractor, GenericForward, generic_roi_extractor.GenericRoIExtractor):
    """mmdetection's GenericRoIExtractor by :func:`fpn_fast.ops.multiscale_roi_align`. RoIs stay float32."""


class RPNHead(rpn_head.RPNHead):
    """mmdetection's RPNHead with proposals by :func:`fpn_fast.ops.generate_proposals`, without anchors in memory.

    It runs mmdetection's own code with a step of your own, with an anchor generator, coder or configuration that the op
    does not support, and on a device without a kernel. Proposals of half precision maps are float32.
    """

    def predict_by_feat(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        score_factors: list[Tensor] | None = None,
        batch_img_metas: list[dict[str, Any]] | None = None,
        cfg: Mapping[str, Any] | None = None,
        rescale: bool = False,
        with_nms: bool = True,
    ) -> Sequence[InstanceData]:
        """Maps [N, A, H_l, W_l] and [N, 4A, H_l, W_l] -> bboxes [K, 4], scores [K] and labels [K] per image."""
        config = self.test_cfg if cfg is None else cfg
        known = not rescale and with_nms and self._knows_anchors(config)
        if backends.falls_back(self, cls_scores[0], "generate_proposals", known=known):
            return super().predict_by_feat(
                cls_scores, bbox_preds, score_factors, batch_img_metas, cfg, rescale=rescale, with_nms=with_nms
            )
        sizes = [meta["img_shape"][:2] for meta in batch_img_metas or ()]
        found = predict_proposals(cls_scores, bbox_preds, self.prior_generator, self.bbox_coder, sizes, config)
        return [
            InstanceData(bboxes=boxes, scores=scores, labels=torch.zeros_like(scores, dtype=torch.long))
            for boxes, scores in proposals_of_images(*found)
        ]

    def _knows_anchors(self, config: Mapping[str, Any]) -> bool:
        """Whether the op knows how anchors are made and coded, and every setting of the configuration."""
        priors, coder = self.prior_generator, self.bbox_coder
        if not _PROPOSALS.are_own(self) or not _PRIORS.are_own(priors) or not _CODER.are_own(coder):
            return False
        if priors.use_box_type or coder.use_box_type or not coder.clip_border or self.cls_out_channels != 1:
            return False
        try:
            check_config(config)
        except ValueError:
            return False
        return len(set(priors.num_base_priors)) == 1


know_norm(SyncBatchNorm)


class _Block(ResidualBlock):
    with_cp: bool

    @staticmethod
    def problem(module: Any) -> str | None:
        """Why `module`, of the class that this one replaces, has to stay unchanged; None where it can be swapped."""
        return "it has plugins, which have no fused implementation" if _has_plugins(module) else None

    def _is_plain(self) -> bool:
        return super()._is_plain() and not _has_plugins(self)

    def _run(self, x: Tensor, norms: list[Any]) -> Tensor:
        if not self.with_cp or not x.requires_grad:
            return super()._run(x, norms)
        y: Tensor = checkpoint(super()._run, x, norms, use_reentrant=False)
        return y


def _has_plugins(block: Any) -> bool:
    # A BasicBlock has none.
    return getattr(block, "with_plugins", False)


class BasicBlock(_Block, resnet.BasicBlock):
    """mmdetection's BasicBlock with its norms fused; with live batch norm it runs mmdetection's code."""

    _convs, _norms = ("conv1", "conv2"), ("norm1", "norm2")
    _steps = steps_of(resnet.BasicBlock, _norms)


class Bottleneck(_Block, resnet.Bottleneck):
    """mmdetection's Bottleneck with its norms fused; with live batch norm it runs mmdetection's code."""

    _convs, _norms = ("conv1", "conv2", "conv3"), ("norm1", "norm2", "norm3")
    _steps = steps_of(resnet.Bottleneck, _norms)


class ResNeXtBottleneck(_Block, resnext.Bottleneck):
    """The Bottleneck of mmdetection's ResNeXt and RegNet with its norms fused, as in :class:`Bottleneck`."""

    _convs, _norms = Bottleneck._convs, Bottleneck._norms
    _steps = Steps(resnext.Bottleneck, replaced="forward")


_REGISTERED = replacing(FPN, PAFPN, SingleRoIExtractor, GenericRoIExtractor, RPNHead)
FUSED = _REGISTERED | replacing(BasicBlock, Bottleneck) | {resnext.Bottleneck: ResNeXtBottleneck}


def register() -> list[str]:
    """Registers the modules in mmdetection as FastFPN, FastPAFPN and so on, for its configurations.

    A second call changes nothing. Building a module with unsupported settings raises ValueError.

    Returns:
        The registered names.
    """
    names = []
    for fused in _REGISTERED.values():
        names.append(f"Fast{fused.__name__}")
        MODELS.register_module(name=names[-1], module=fused, force=True)
    return names
