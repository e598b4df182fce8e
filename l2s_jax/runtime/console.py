# SPDX-License-Identifier: Apache-2.0
"""The console command `l2s_jax`, equal to `python -m l2s_jax`."""

import runpy

_name = 'python -m l2s_jax'


def name() -> str:
  """Returns the command of this process, for usage lines and hints."""
  return _name


def run() -> None:
  """Runs the command line `l2s_jax` and exits the process."""
  global _name
  _name = 'l2s_jax'
  runpy.run_module('l2s_jax', run_name='__main__', alter_sys=True)
