# SPDX-License-Identifier: Apache-2.0
"""``python -m fpn_fast verify``: every op and module of this installation, checked where it is installed.

- :mod:`~fpn_fast.verify.draw`: random cases from a seed; :mod:`~fpn_fast.verify.checks`: what is drawn for each op, and
  what its truth is; :mod:`~fpn_fast.verify.trial`: the rules by which results are judged, over
  :mod:`fpn_fast.testing.tolerances`.
- :mod:`~fpn_fast.verify.run`: the cases of all ops, backends, devices and types; :mod:`~fpn_fast.verify.report` and
  :mod:`~fpn_fast.verify.command`: what is printed and written, and the arguments.

Needs torch alone; modules over torchvision's are checked where that is installed.
"""
