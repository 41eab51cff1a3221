# SPDX-License-Identifier: Apache-2.0
"""What a checkout adds to :mod:`fpn_fast.bench`.

- ``python -m benchmarks``: ``fpn-fast bench`` with NVIDIA's RoIAlign mapping as one more rival on a GPU.
- detectors.py: whole detectors. step_budget.py: operators, bytes and host synchronisations by part.
- ceilings.py: a GPU's limits, and the constants of the cycle model. kernels.py: the time of each kernel.
- gpu_model.py: what each kernel costs on an H200 by a model, beside per_level_merge.py and nvidia_mapping.py.
- gpu_run.py: what to run on a GPU machine. sanitizer_shapes.json: what `verify` calls under a sanitizer there.
- report.py: committed results into README.md, docs/ and the plots.
"""
