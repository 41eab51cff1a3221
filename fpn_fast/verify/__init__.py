# SPDX-License-Identifier: Apache-2.0
"""``python -m fpn_fast verify`` checks every op and module of this installation on this machine.

- :mod:`~fpn_fast.verify.draw` makes random cases from a seed, and :mod:`~fpn_fast.verify.checks` says what to draw for
  each op and what the right result is.
- :mod:`~fpn_fast.verify.trial` judges a result by the rules of :mod:`fpn_fast.testing.tolerances`.
- :mod:`~fpn_fast.verify.run` runs the cases of all ops, backends, devices and dtypes.
- :mod:`~fpn_fast.verify.report` and :mod:`~fpn_fast.verify.command` print and write the results and parse arguments.

It needs only torch. Modules that subclass torchvision's are checked where torchvision is installed.
"""
