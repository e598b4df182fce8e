# SPDX-License-Identifier: Apache-2.0
"""The console command `l2s_jax`: `python -m l2s_jax` by another name."""

import runpy


def run() -> None:
  """Runs the command line of this process, and ends it."""
  runpy.run_module('l2s_jax', run_name='__main__', alter_sys=True)
