# SPDX-License-Identifier: Apache-2.0
"""What a checkout adds to :mod:`fpn_fast.bench`, where cases, providers and the harness are.

- test_families.py: the entry for pytest-benchmark; without pytest it is ``python -m fpn_fast bench``.
- report.py: rows to the README, and what the library is held to; gpu_run.py: all that a GPU machine is asked once.
- detectors.py: whole detectors.
- census.py: operations and host waits; ceilings.py: what a GPU can do at best; sanitize.py: calls for a sanitizer.
"""
