# SPDX-License-Identifier: Apache-2.0
"""Builds modules from mmdetection's configuration dicts, without its registries."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from fpn_fast.nn.mmdet.bfp import BFP
from fpn_fast.nn.mmdet.bifpn import BiFPN
from fpn_fast.nn.mmdet.fpn_carafe import FPN_CARAFE
from fpn_fast.nn.mmdet.nas_fpn import NASFPN
from fpn_fast.nn.mmdet.necks import FPN, PAFPN
from fpn_fast.nn.mmdet.roi_extractors import GenericRoIExtractor, SingleRoIExtractor
from fpn_fast.nn.mmdet.yolox_pafpn import YOLOXPAFPN

__all__ = ["build_neck", "build_roi_extractor"]


def build_neck(cfg: Mapping[str, Any]) -> nn.Module:
    """Builds a neck from the dict of an mmdetection configuration.

    Args:
        cfg: ``type``, "FPN", "PAFPN", "NASFPN", "BFP", "YOLOXPAFPN", "FPN_CARAFE" or "BiFPN", and the arguments of that
            class.

    Raises:
        ValueError: the type is unknown, a key is unknown or missing; others: the module's.

    >>> neck = build_neck(dict(type="FPN", in_channels=[8, 16], out_channels=4, num_outs=3))
    >>> neck.num_outs
    3
    """
    return _build(cfg, FPN, PAFPN, NASFPN, BFP, YOLOXPAFPN, FPN_CARAFE, BiFPN)


def build_roi_extractor(cfg: Mapping[str, Any]) -> nn.Module:
    """:func:`build_neck` for RoI extractors; the types are "SingleRoIExtractor" and "GenericRoIExtractor"."""
    return _build(cfg, GenericRoIExtractor, SingleRoIExtractor)


def _build(cfg: Mapping[str, Any], *classes: type[nn.Module]) -> nn.Module:
    kinds, arguments = {each.__name__: each for each in classes}, dict(cfg)
    # A configuration may prefix the type with its library.
    name = str(arguments.pop("type", None)).removeprefix("mmdet.")
    if name not in kinds:
        raise ValueError(f"type must be one of {', '.join(kinds)}, got {cfg.get('type')!r}")
    known = dict(inspect.signature(kinds[name]).parameters)
    unknown = [str(key) for key in arguments if key not in known]
    if unknown:
        raise ValueError(f"{name} has no argument {', '.join(unknown)}; it has {', '.join(known)}")
    needed = [key for key, each in known.items() if each.default is each.empty and key not in arguments]
    if needed:
        raise ValueError(f"{name} needs {', '.join(needed)}, got {', '.join(map(str, arguments)) or 'nothing'}")
    return kinds[name](**arguments)
