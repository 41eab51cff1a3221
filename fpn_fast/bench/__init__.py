# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of every op against the eager sequence it replaces and against ``torch.compile``.

- cases.py: what is measured, as data; providers.py and selection.py: who computes it, and the check that each computes
  the same; rois.py and scenes.py: of what.
- harness.py: how it is measured; cpu_timing.py and gpu_timing.py: what is measured there; machine.py: on what.

Needs torchvision, whose code is the rival.
"""
