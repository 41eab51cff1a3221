# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of every op against the eager sequence it replaces and against ``torch.compile``.

The path of a figure: case -> provider -> measurement -> row -> report. A case (cases.py: shapes and least bytes) is
computed by providers (providers.py, from the op's statement in torchvision_ops.py or libraries.py, on inputs of rois.py
and scenes.py), checked and sampled in rounds (harness.py, with timing.py and counting.py), kept as a row (rows.py, with
the facts of machine.py), and shown (report.py, svg.py). command.py is ``python -m fpn_fast bench``.

Needs torchvision.
"""
