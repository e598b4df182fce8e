# SPDX-License-Identifier: Apache-2.0
"""Folders that older versions have written are of use to this one.

Each folder `kept_runs/N` was made by the command line of a version whose format
is N; see `kept_runs/README.md`.
"""

import dataclasses
import json
import pathlib
import shutil

import gin
import jax
import numpy as np
import pytest
from kept_runs import make

from l2s_jax import __main__ as command_line
from l2s_jax.models import config as config_lib
from l2s_jax.runtime import partitioning
from l2s_jax.systems import parameters, run_folder
from l2s_jax.weights import opening, run_format, saved_steps

KEPT = pathlib.Path(__file__).parent / 'kept_runs'
VERSIONS = sorted(path.name for path in KEPT.iterdir() if path.name.isdigit())
NAMES = tuple(make.RUNS)


@pytest.fixture(params=VERSIONS)
def folder(request, tmp_path):
  """A copy, as a user has one who has moved the runs."""
  path = tmp_path / 'moved'
  shutil.copytree(KEPT / request.param, path)
  yield path
  gin.clear_config()


def run(*arguments):
  assert command_line.main(list(arguments)) == 0
  gin.clear_config()


def load(folder, name, llm='llm'):
  llm_path = None if name == 'llm' else str(folder / llm)
  return run_folder.load(folder / name, llm_path=llm_path)


def read_expected(folder, name):
  return json.loads((folder / 'expected.json').read_text())[name]


def check_close(found, expected):
  """Compares numbers in nested dicts; text and whole numbers must be equal."""
  assert found.keys() == expected.keys()
  for key, value in expected.items():
    if isinstance(value, dict):
      check_close(found[key], value)
    else:
      assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


def check_described(run_dir):
  """A run that goes on says what it is in the format of this version."""
  description = json.loads((run_dir / run_folder.DESCRIPTION).read_text())
  assert description.items() >= run_format.stamp().items()


@pytest.mark.parametrize('name', NAMES)
def test_training_goes_on(name, folder):
  before = saved_steps.steps(folder / name)
  run(*make.train_arguments(folder, name), *make.RESUMING)
  assert saved_steps.steps(folder / name)[-1] == make.RESUMED_STEPS
  assert make.LAST_STEP in before
  check_close(make.losses(folder / name), read_expected(folder, name)['losses'])
  check_described(folder / name)
  # Its checkpoints, of the one and of the other format, are of one run.
  load(folder, name)


@pytest.mark.parametrize('name', NAMES)
def test_evaluations_add_up(name, folder, capsys):
  run(
    *make.evaluate_arguments(folder, name),
    f'--gin.EVAL_STEPS={make.LAST_STEP}',
  )
  check_close(make.scores(folder / name), read_expected(folder, name)['scores'])
  # The settings of the kept evaluations count as the same.
  has_curves = (folder / name / 'eval' / 'curves-local-validation.png').exists()
  assert has_curves == (name == 'l2s')


@pytest.mark.parametrize('name', NAMES)
def test_a_broken_inference_goes_on_with_the_same_answers(name, folder):
  path = folder / 'answers' / name / 'predictions.jsonl'
  lines = path.read_text().splitlines(keepends=True)
  path.with_name(f'{path.name}.partial').write_text(''.join(lines[:5]))
  path.unlink()
  # With the digests, what is behind the last of them would be cut off, too.
  path.with_name(f'.{path.name}.digests').unlink()
  run(*make.infer_arguments(folder, name))
  found = make.answers(path.parent)
  expected = read_expected(folder, name)['answers']
  for ours, theirs in zip(found, expected, strict=True):
    for key in ('prompt', 'prediction', 'token_ids'):
      assert ours[key] == theirs[key]
    np.testing.assert_allclose(
      ours['token_log_probs'], theirs['token_log_probs'], atol=1e-3
    )


@pytest.mark.parametrize('name', [*NAMES, 'converted'])
def test_it_is_converted(name, folder):
  source, destination = folder / name, folder / 'hf'
  run(*make.convert_arguments(source, destination, 'hf'))
  theirs = opening.open_source(str(source))
  if name in ('l2s', 'gpt'):
    destination = destination / 'slm'
  ours = opening.open_source(str(destination))
  assert ours.shapes() == theirs.shapes()
  for path in ours.shapes():
    np.testing.assert_array_equal(ours.read(path), theirs.read(path))


def test_they_are_the_llm_and_the_slm_of_a_new_run(folder):
  """Whose SLM is the old one's while the projector is trained alone."""
  run(
    *make.train_arguments(folder, 'l2s'),
    f'--gin.MODEL_DIR={folder / "new"}',
    f'--gin.SLM_PATH={folder / "l2s"}',
    '--gin.SLM=None',
    '--gin.TRAIN_STEPS=2',
    '--gin.CHECKPOINT_PERIOD=1',
    '--gin.PROJECTOR_STEPS=1',
  )
  assert saved_steps.steps(folder / 'new') == [1, 2]
  slm = opening.open_source(str(folder / 'l2s'))
  first, second = (
    opening.open_source(str(folder / 'new'), step) for step in (1, 2)
  )
  for path in slm.shapes():
    np.testing.assert_array_equal(first.read(path), slm.read(path))
  table = ('token_embedder', 'embedding')
  assert not np.array_equal(second.read(table), slm.read(table))
  old = load(folder, 'l2s')
  assert load(folder, 'new').llm_fingerprint == old.llm_fingerprint


@pytest.mark.parametrize('llm', ['llm', 'converted'])
def test_weights_have_the_fingerprint_that_runs_were_trained_with(llm, folder):
  mesh_config = partitioning.MeshConfig(data=1)
  mesh = partitioning.make_mesh(mesh_config, jax.devices()[:1])
  system = load(folder, 'gpt', llm)
  assert system.llm_step is not None
  layout = parameters.layout(system, mesh, mesh_config)
  read, _ = parameters.load_frozen(system, layout)  # Which compares them.
  assert read.llm_fingerprint == system.llm_fingerprint is not None
  assert read.llm_step == system.llm_step


def test_a_version_with_another_field_goes_on(folder, monkeypatch):
  """A TransformerConfig of the future has one field more, at its default."""
  config = config_lib.TransformerConfig
  later = dataclasses.make_dataclass(
    'Later',
    [('later', float, dataclasses.field(default=0.5))],
    bases=(config,),
    frozen=True,
  )
  for name in ('__init__', '__eq__', '__hash__', '__dataclass_fields__'):
    monkeypatch.setattr(config, name, getattr(later, name))
  monkeypatch.setitem(config.__annotations__, 'later', float)
  before = saved_steps.steps(folder / 'l2s')
  run(*make.train_arguments(folder, 'l2s'))  # Restores, and has no step to do.
  assert saved_steps.steps(folder / 'l2s') == before
  content = json.loads((folder / 'l2s' / run_folder.DESCRIPTION).read_text())
  assert content['slm']['later'] == content['llm']['later'] == 0.5
