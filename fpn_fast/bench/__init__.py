# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of every op against the eager sequence it replaces and against ``torch.compile``.

- cases.py: what is measured, as data; providers.py, selection.py and libraries.py: who computes it, and the check that
  each computes the same; nvidia_mapping.py: a rival on a GPU; rois.py and scenes.py: of what.
- harness.py: how it is measured; cpu_timing.py and gpu_timing.py: what is timed there; counting.py: what is counted;
  machine.py: on what.
- command.py: ``python -m fpn_fast bench``; report.py, plots.py and page.py: rows to tables, plots and a page.

Needs torchvision, whose code is the rival; what detectron2 and mmdetection do is stated in libraries.py.
"""
