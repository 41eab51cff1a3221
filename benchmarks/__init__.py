# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of every op against the eager sequence it replaces and against ``torch.compile``.

- cases.py: what is measured, as data; providers.py and selection.py: who computes it, and the check that each computes
  the same; rois.py and scenes.py: of what.
- harness.py: how it is measured, on a CPU; gpu_timing.py: the same on a GPU; machine.py: on what.
- test_families.py: the entry for pytest-benchmark; __main__.py: the same rows without pytest, within a time limit.
- report.py: rows to a table, a plot and the README; gpu_run.py: everything that a GPU machine is asked once.
"""
