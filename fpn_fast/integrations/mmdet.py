# SPDX-License-Identifier: Apache-2.0
"""What accelerate() swaps in a model of mmdetection, and names for its configurations. Imports mmdetection.

Beside :mod:`fpn_fast.nn.mmdet`, whose modules need it not, here are its own classes with what those compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmcv.ops import RoIAlign
from mmdet.models.dense_heads import rpn_head
from mmdet.models.necks import fpn, pafpn
from mmdet.models.roi_heads.roi_extractors import generic_roi_extractor, single_level_roi_extractor
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from mmdet.models.task_modules.prior_generators import AnchorGenerator
from mmdet.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor, nn

from fpn_fast import backends
from fpn_fast.nn.mmdet import predict_proposals, proposals_of_images
from fpn_fast.nn.mmdet.necks import FPNForward, PAFPNForward, merge_options
from fpn_fast.nn.mmdet.proposals import check_config
from fpn_fast.nn.mmdet.roi_extractors import LAYER_KEYS, GenericForward, SingleForward


class _Checked:
    """Refuses what has no fused form when it is built; accelerate() asks beforehand."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if reason := self.problem(self):
            raise ValueError(reason)

    @staticmethod
    def problem(module: Any) -> str | None:
        """Why `module`, which may be of the class that this one replaces, must be left; None: it need not."""
        raise NotImplementedError


class _Neck(_Checked):
    @staticmethod
    def problem(module: Any) -> str | None:
        try:
            merge_options(module.upsample_cfg)
        except ValueError as error:
            return str(error)
        return None


class FPN(_Neck, FPNForward, fpn.FPN):
    """mmdetection's FPN, its merge by :func:`fpn_fast.ops.top_down`."""


class PAFPN(_Neck, PAFPNForward, pafpn.PAFPN):
    """mmdetection's PAFPN, its merge by :func:`fpn_fast.ops.top_down`."""


class _Extractor(_Checked):
    roi_layers: nn.ModuleList

    @staticmethod
    def problem(module: Any) -> str | None:
        if any(type(layer) is not RoIAlign for layer in module.roi_layers):
            return f"its layers are {type(module.roi_layers[0]).__name__}, which has no fused form"
        if getattr(module, "with_pre", False) or getattr(module, "with_post", False):
            return "it has a pre_module or post_module, which have no fused form"
        return None

    def _layer(self) -> dict[str, Any]:
        return {key: getattr(self.roi_layers[0], key) for key in LAYER_KEYS}


class SingleRoIExtractor(_Extractor, SingleForward, single_level_roi_extractor.SingleRoIExtractor):
    """mmdetection's SingleRoIExtractor by :func:`fpn_fast.ops.multiscale_roi_align`; RoIs stay float32."""

    strict = False


class GenericRoIExtractor(_Extractor, GenericForward, generic_roi_extractor.GenericRoIExtractor):
    """mmdetection's GenericRoIExtractor by :func:`fpn_fast.ops.multiscale_roi_align`; RoIs stay float32."""


class RPNHead(rpn_head.RPNHead):
    """mmdetection's RPNHead, its proposals by :func:`fpn_fast.ops.generate_proposals`, without anchors in memory.

    An anchor generator, coder or configuration that the op does not know, and a device for which it has no kernel, are
    served by mmdetection's own steps. Proposals are float32 for half precision.
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
        """Maps [N, A, H_l, W_l] and [N, 4A, H_l, W_l] -> of each image bboxes [K, 4], scores [K] and labels [K]."""
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
        if type(priors) is not AnchorGenerator or type(coder) is not DeltaXYWHBBoxCoder:
            return False
        if priors.use_box_type or coder.use_box_type or not coder.clip_border or self.cls_out_channels != 1:
            return False
        try:
            check_config(config)
        except ValueError:
            return False
        return len(set(priors.num_base_priors)) == 1


FUSED: dict[type, type] = {
    fpn.FPN: FPN,
    pafpn.PAFPN: PAFPN,
    single_level_roi_extractor.SingleRoIExtractor: SingleRoIExtractor,
    generic_roi_extractor.GenericRoIExtractor: GenericRoIExtractor,
    rpn_head.RPNHead: RPNHead,
}


def register() -> list[str]:
    """Puts the modules into mmdetection's registry, for configurations, as FastFPN, FastPAFPN and so on.

    Returns these names. Calling it again changes nothing. What a module has no fused form of is a ValueError when it is
    built.
    """
    names = []
    for fused in FUSED.values():
        names.append(f"Fast{fused.__name__}")
        MODELS.register_module(name=names[-1], module=fused, force=True)
    return names
