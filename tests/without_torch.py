# SPDX-License-Identifier: Apache-2.0
"""Imports tensorboardX as runs do, for the server of `forked.py`."""

from l2s_jax.runtime import extras

with extras.hidden('torch'):
  import tensorboardX  # noqa: F401
