# SPDX-License-Identifier: Apache-2.0
"""What tests of the launch scripts share: a shell, and programs for it.

Shell scripts run for real. What stands behind them (gcloud, srun, the verb) is
a small program of the test's, which does what the real one is known to do.
"""

import os
import subprocess

import tiny_runs

LAUNCH = tiny_runs.ROOT / 'launch'
AGAIN = 75


def environment(**variables):
  """Returns the variables of a process that belongs to no cluster yet."""
  inherited = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(('SLURM_', 'TPU_', 'MEGASCALE_', 'L2S_'))
    and not name.lower().endswith('_proxy')
  }
  fixed = {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  return inherited | fixed | {k: str(v) for k, v in variables.items()}


def bash(command, **variables):
  return subprocess.run(
    ['bash', '-c', command],
    cwd=tiny_runs.ROOT,
    env=environment(RESTART_SECS=0, L2S_POLL_SECS=0) | variables,
    capture_output=True,
    text=True,
    timeout=120,
  )


def write_program(path, text):
  """Writes a program for the shell to find, and returns its path."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)
  return str(path)
