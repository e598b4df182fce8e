# SPDX-License-Identifier: Apache-2.0
"""Experiment trackers beside `metrics.jsonl`: Weights & Biases and Trackio.

TRACKERS names them. A tracker is a hook that sends each logged number once,
also across restarts. `trackers.json` in the run's folder has each tracker's run
id and the last sent step of each number. TensorBoard files are written
by `evaluation/metric_writer.py`.
"""

import os
import pathlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from l2s_jax.evaluation import metric_writer
from l2s_jax.runtime import distributed, extras, files, storage
from l2s_jax.training import hooks as hooks_lib

TENSORBOARD = 'tensorboard'
FILE = 'trackers.json'
# Runs of one project are compared with each other.
PROJECT = 'l2s_jax'
_REMEDY = 'remove it; the trackers then get all of metrics.jsonl again.'

# Starts or resumes a run of a service, by folder and id.
Start = Callable[[pathlib.Path, str], Any]


def _start_wandb(run_dir: pathlib.Path, run_id: str) -> Any:
  """Returns a run of Weights & Biases, offline unless WANDB_MODE says other."""
  import wandb

  mode: Any = os.environ.get('WANDB_MODE', 'offline')
  # Its folders are named by the second. A second run in one would overwrite the
  # first.
  local = pathlib.Path() if storage.is_bucket(run_dir) else run_dir
  while [*local.glob(f'wandb/*run-{time.strftime("%Y%m%d_%H%M%S")}-*')]:
    time.sleep(0.1)
  run = wandb.init(
    project=os.environ.get('WANDB_PROJECT', PROJECT),
    name=run_dir.name,
    id=run_id,
    resume='allow',
    dir=None if storage.is_bucket(run_dir) else str(run_dir),
    mode=mode,
    settings=wandb.Settings(
      console='off', silent=True, disable_git=True, disable_code=True
    ),
  )
  run.define_metric('*', step_metric='step')
  return run


def _start_trackio(run_dir: pathlib.Path, run_id: str) -> Any:
  """Returns a run of Trackio, with its database in TRACKIO_DIR."""
  import trackio

  return trackio.init(
    project=os.environ.get('TRACKIO_PROJECT', PROJECT),
    name=f'{run_dir.name}-{run_id}',
    resume='allow',
    embed=False,
    auto_log_cpu=False,
    auto_log_gpu=False,
  )


_SERVICES: Mapping[str, Start] = {
  'wandb': _start_wandb,
  'trackio': _start_trackio,
}


def check(names: Sequence[str]) -> None:
  """Refuses trackers that are unknown or not installed.

  Raises:
    ValueError: names the first.
  """
  known = (TENSORBOARD, *_SERVICES)
  unknown = [name for name in names if name not in known]
  if isinstance(names, str) or unknown:
    raise ValueError(
      f'TRACKERS={names!r}: expected a tuple of any of {", ".join(known)}, '
      "such as ('tensorboard', 'wandb')."
    )
  for name in names:
    if name != TENSORBOARD:
      extras.require(f'TRACKERS={names!r}', name, instead='Or leave it out.')


def hooks(names: Sequence[str], run_dir: pathlib.Path) -> list['Tracker']:
  """Returns a hook for each tracker but TensorBoard, of the first process.

  Args:
    names: TRACKERS.
    run_dir: the run's folder, whose log is restored.
  """
  if not distributed.is_first():
    return []
  return [
    Tracker(name, run_dir) for name in dict.fromkeys(names) if name in _SERVICES
  ]


class Tracker(hooks_lib.Hook):
  """Sends the numbers of a run to a service."""

  def __init__(self, name: str, run_dir: pathlib.Path):
    """Starts or resumes the run there, and sends logged numbers that it lacks.

    Args:
      name: of the service.
      run_dir: the run's folder.
    """
    self._name = name
    self._path = run_dir / FILE
    found = _read(self._path).get(
      name, {'id': secrets.token_hex(4), 'sent': {}}
    )
    self._id: str = found['id']
    self._sent: dict[str, int] = found['sent']
    self._run = _SERVICES[name](run_dir, self._id)
    for record in metric_writer.read(run_dir):
      self.send(record['step'], metric_writer.scalars(record))

  def __call__(self, loop: hooks_lib.Loop) -> None:
    self.send(loop.step, loop.metrics)

  def close(self) -> None:
    self._run.finish()

  def send(self, step: int, scalars: Mapping[str, float]) -> None:
    """Sends those numbers that were not sent at this step or a later one."""
    new = {
      name: value
      for name, value in scalars.items()
      if step > self._sent.get(name, -1)
    }
    if not new:
      return
    # Before: a kill may lose a number, and never doubles one.
    self._sent |= dict.fromkeys(new, step)
    content = _read(self._path)
    content[self._name] = {'id': self._id, 'sent': self._sent}
    files.write_json(self._path, content)
    if self._name == 'wandb':  # Its own steps can be logged to but once.
      self._run.log({**new, 'step': step})
    else:
      self._run.log(new, step=step)


def _read(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Returns the last sent steps of a run's trackers.

  Raises:
    ValueError: if the file is broken.
  """
  if not path.is_file():
    return {}
  content = files.read_json(path, remedy=_REMEDY)
  for name in content:
    files.check_keys(content, path, keys={name: dict}, remedy=_REMEDY)
    files.check_keys(
      content[name],
      f'{path}, {name}',
      keys={'id': str, 'sent': dict},
      remedy=_REMEDY,
    )
    sent = content[name]['sent']
    files.check_keys(
      sent, f'{path}, {name}', keys=dict.fromkeys(sent, int), remedy=_REMEDY
    )
  return content
