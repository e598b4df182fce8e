# SPDX-License-Identifier: Apache-2.0
"""The verb `report`, on runs that older versions have left."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import gin
import pytest

from l2s_jax import __main__ as command_line
from l2s_jax.evaluation import evaluate
from l2s_jax.inference import predictions
from l2s_jax.metrics import metric_fns
from l2s_jax.models import flops, shapes
from l2s_jax.runtime import files, integrity
from l2s_jax.systems import run_folder

KEPT = pathlib.Path(__file__).parent / 'kept_runs' / '1'
NAMES = ('llm', 'l2s', 'gpt')
METRICS = 'eval/metrics-local-validation.json'
PREDICTIONS = 'eval/local-validation-400.jsonl'


@pytest.fixture
def folder(tmp_path):
  """Copies of three runs, without what a report does not need."""
  for name in NAMES:
    shutil.copytree(
      KEPT / name,
      tmp_path / name,
      ignore=shutil.ignore_patterns('checkpoints'),
    )
  yield tmp_path
  gin.clear_config()


def report(folder, *names, **flags):
  """Returns the exit status."""
  flags = {'output': folder / 'out'} | flags
  return command_line.main(
    [
      'report',
      *(str(folder / name) for name in names),
      *(f'--{flag}={value}' for flag, value in flags.items()),
    ]
  )


def read(folder):
  return json.loads((folder / 'out' / 'report.json').read_text())


def edit(path, change):
  """Rewrites a JSON file by what `change` does to its content."""
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


def write_benchmark(folder):
  """Writes times of an SLM, which is no run here, and of l2s."""
  module = run_folder.load(folder / 'l2s').module
  row: dict[str, Any] = {
    'engine': 'l2s_jax',
    'dtype': 'float32',
    'batch_size': 1,
    'prompt_length': 32,
    'num_tokens': 16,
    'ms_per_token': 2.5,
    'total_ms': 50.0,
    'num_params': flops.num_params(module),
  }
  others: list[dict[str, Any]] = [
    {'system': 'SLM', 'ms_per_token': 1.0},
    {'system': 'LLM-to-SLM', 'dtype': 'int8', 'ms_per_token': 1.5},
    {'system': 'LLM-to-SLM', 'batch_size': 8, 'ms_per_token': 3.5},
    {'system': 'LLM-to-SLM'},
  ]
  path = folder / 'benchmark.json'
  path.write_text(json.dumps({'rows': [row | other for other in others]}))
  return path


def test_of_lora_what_it_has_learned_is_trained(folder):
  system = run_folder.load(folder / 'l2s')
  module = system.module.clone(
    slm_config=dataclasses.replace(system.module.slm_config, lora_rank=2)
  )
  (folder / 'lora').mkdir()
  run_folder.save(dataclasses.replace(system, module=module), folder / 'lora')
  assert report(folder, 'l2s', 'lora') == 0
  whole, learned = read(folder)['runs']
  sizes = {
    '/'.join(path): shape.size
    for path, shape in shapes.of_module(module).items()
  }
  trained = sum(
    size
    for path, size in sizes.items()
    if path.startswith('projector/') or 'lora' in path.split('/')[-1]
  )
  assert learned['trained_params'] == trained < whole['trained_params']
  assert trained + learned['frozen_params'] == sum(sizes.values())


def test_tables_have_what_the_runs_have(folder, capsys):
  bins = {'11+': {'num_examples': 0}, '6-10': {'num_examples': 3, 'bleu': 2.0}}
  bins['0-5'] = {'num_examples': 5, 'bleu': 4.0, 'bleu_low': 3, 'bleu_high': 5}
  edit(
    folder / 'l2s' / METRICS,
    lambda found: found['400']['none'].update(by_length={'local': bins}),
  )
  assert report(folder, *NAMES, speed=write_benchmark(folder)) == 0
  found = read(folder)
  rows = {row['run']: row for row in found['runs']}
  for name in NAMES:
    module = run_folder.load(folder / name).module
    sizes = rows[name]['trained_params'], rows[name]['frozen_params']
    assert sum(sizes) == flops.num_params(module)
    assert bool(sizes[1]) == (name != 'llm')
    assert rows[name]['flops_per_prompt'] == flops.prompt_flops(module, 32)
  times = {name: row.get('ms_per_token') for name, row in rows.items()}
  assert times == {'llm': None, 'l2s': 2.5, 'gpt': None}

  evaluation = found['evaluations']['local-validation']
  kept = json.loads((folder / 'l2s' / METRICS).read_text())['400']
  for control in ('none', 'zero'):
    scores = evaluation['runs']['l2s']['scores'][control]
    assert scores.items() <= kept[control].items()
  pairs = {(row['one'], row['other']): row for row in evaluation['differences']}
  assert len(pairs) == 5  # Three of runs, and two controls.
  row = pairs['l2s', 'l2s, Z = 0']
  expected = kept['none']['bleu'] - kept['zero']['bleu']
  assert row['difference'] == pytest.approx(expected)
  assert row['difference_low'] <= row['difference'] <= row['difference_high']

  text = (folder / 'out' / 'report.md').read_text()
  assert text in capsys.readouterr().out
  assert text.index('| 0-5 ') < text.index('| 6-10 ') < text.index('| 11+ ')
  assert '4.0 [3.0, 5.0]' in text
  assert {path.name for path in (folder / 'out').glob('*.png')} == {
    'training.png',
    'curves-local-validation.png',
    'lengths-local-validation-local.png',
    'speed-local-validation.png',
  }
  assert all(f'({p.name})' in text for p in (folder / 'out').glob('*.png'))


def test_a_difference_is_significant_if_chance_does_not_make_it(folder):
  shutil.copytree(folder / 'llm', folder / 'same')
  shutil.copytree(folder / 'llm', folder / 'right')
  lines = map(json.loads, (folder / 'llm' / PREDICTIONS).open())
  (folder / 'right' / PREDICTIONS).write_text(
    ''.join(
      json.dumps(line | {'prediction': line['target']}) + '\n' for line in lines
    )
  )
  edit(
    folder / 'right' / METRICS,
    lambda found: found['400']['none'].update(bleu=100.0),
  )
  assert report(folder, 'llm', 'same', 'right') == 0
  same, right, _ = read(folder)['evaluations']['local-validation'][
    'differences'
  ]
  ends = ('difference', 'difference_low', 'difference_high')
  assert [same[end] for end in ends] == [0, 0, 0] and not same['significant']
  assert right['difference_high'] < -50 and right['significant']


def test_a_difference_of_error_rates_says_which_is_better(folder):
  shutil.copytree(folder / 'llm', folder / 'right')
  lines = [json.loads(line) for line in (folder / 'llm' / PREDICTIONS).open()]
  (folder / 'right' / PREDICTIONS).write_text(
    ''.join(
      json.dumps(line | {'prediction': line['target']}) + '\n' for line in lines
    )
  )
  ter = metric_fns.ter(
    [line['target'] for line in lines], [line['prediction'] for line in lines]
  )['ter']
  for name, score in (('llm', ter), ('right', 0.0)):
    edit(
      folder / name / METRICS,
      lambda found, score=score: found['400'].update(
        none={
          key: value
          for key, value in found['400']['none'].items()
          if not key.startswith(('bleu', 'chrf', 'exact_match'))
        }
        | {'ter': score}
      ),
    )
  assert report(folder, 'llm', 'right') == 0
  (row,) = read(folder)['evaluations']['local-validation']['differences']
  assert row['score'] == 'ter' and row['difference'] == ter
  assert row['significant'] and row['difference_low'] > 0
  text = (folder / 'out' / 'report.md').read_text()
  assert f'| ter (lower is better) | +{ter:.1f} [' in text


@pytest.mark.parametrize(
  'spoil,note',
  [
    (lambda run: (run / PREDICTIONS).unlink(), 'jsonl is missing: l2s is not'),
    (
      lambda run: (run / PREDICTIONS).write_text(
        (run / PREDICTIONS).read_text().replace('"target": "Ä', '"target": "A')
      ),
      'l2s and llm were scored on different examples and are not comp',
    ),
    (
      lambda run: edit(
        run / METRICS, lambda found: found['400']['none'].update(bleu=50.0)
      ),
      'but 50.00 in the evaluation, with other settings or texts',
    ),
    (
      lambda run: edit(
        run / METRICS,
        lambda found: found['400']['none']['settings'].update(max_decode_len=9),
      ),
      'max_decode_len: l2s has 9, llm has 16',
    ),
  ],
)
def test_what_cannot_be_compared_is_said(spoil, note, folder):
  spoil(folder / 'l2s')
  assert report(folder, 'l2s', 'llm') == 0
  text = (folder / 'out' / 'report.md').read_text()
  assert note in text


def tear(path):
  path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
  'spoil,message',
  [
    (lambda run: shutil.rmtree(run), 'is not a folder. RUN is the MODEL_DIR'),
    (
      lambda run: [path.unlink() for path in run.rglob('m*.json')],
      'has neither the model.json of a run nor the eval/metrics-',
    ),
    (lambda run: tear(run / METRICS), 'metrics-local-validation.json is not J'),
    (
      lambda run: edit(run / METRICS, lambda found: found.update(x={})),
      "key 'x' is not a step",
    ),
    (
      lambda run: edit(
        run / METRICS, lambda found: found['400'].update(x={'loss': 1.0})
      ),
      'step 400, x: unknown control',
    ),
    (
      lambda run: edit(
        run / METRICS,
        lambda found: found['400']['none'].update(by_length={'a': {'x': {}}}),
      ),
      "by_length, a: key 'x' is not a bin",
    ),
    (
      lambda run: edit(
        run / METRICS, lambda found: found['400']['none'].pop('loss')
      ),
      'step 400, none has no loss',
    ),
    (lambda run: tear(run / PREDICTIONS), '400.jsonl, line 8 is not JSON'),
    (
      lambda run: (run / PREDICTIONS).write_text(
        (run / PREDICTIONS).read_text().partition('\n')[2]
      ),
      'has 7 answers, but 8 were scored. Evaluate its step again.',
    ),
    (lambda run: tear(run / 'model.json'), 'model.json is not JSON'),
    (
      lambda run: shutil.rmtree(run / 'vocabularies'),
      'vocabularies/prompt',
    ),
  ],
)
def test_a_broken_folder_is_one_sentence(spoil, message, folder, capsys):
  spoil(folder / 'l2s')
  assert report(folder, 'llm', 'l2s') == 2
  error = capsys.readouterr().err
  assert message in error and error.count('\n') == 1
  assert not (folder / 'out' / 'report.json').exists()


def seal(run):
  """Writes scores and predictions as they are written today."""
  path = run / METRICS
  files.write_json(path, integrity.seal(evaluate.read_scores(path)))
  for path in (run / 'eval').glob('*.jsonl'):
    predictions.write(path, list(predictions.read([path])))


@pytest.mark.parametrize(
  'file, old, new',
  [(METRICS, '"loss": ', '"loss": 1'), (PREDICTIONS, ' ', '  ')],
)
def test_a_changed_digit_or_letter_is_named(file, old, new, folder, capsys):
  seal(folder / 'l2s')
  assert report(folder, 'llm', 'l2s') == 0
  path = folder / 'l2s' / file
  path.write_text(path.read_text().replace(old, new, 1))
  capsys.readouterr()
  assert report(folder, 'llm', 'l2s') == 2
  error = capsys.readouterr().err
  assert f'{path} was changed after it was written' in error
  assert error.count('\n') == 1


def test_predictions_that_have_lost_their_digests_are_said(folder, capsys):
  """But not those of an earlier version."""
  path = folder / 'l2s' / PREDICTIONS
  words = f'{path} is read without verification'
  assert report(folder, 'llm', 'l2s') == 0
  assert words not in capsys.readouterr().err
  seal(folder / 'l2s')
  assert report(folder, 'llm', 'l2s') == 0
  assert words not in capsys.readouterr().err
  predictions.notes_of(path).unlink()
  assert report(folder, 'llm', 'l2s') == 0
  assert words in capsys.readouterr().err


def test_what_is_missing_is_said(folder, capsys):
  run = folder / 'l2s'
  (run / 'checkpoints').mkdir()
  (run / 'metrics.jsonl').unlink()
  (run / 'eval' / 'config-cldr-test.gin').write_text('')
  assert report(folder, 'llm', 'l2s') == 0
  said = capsys.readouterr().err
  assert f'{run / "metrics.jsonl"} is missing' in said
  assert f'{run / "eval" / "metrics-cldr-test.json"} is missing' in said


def test_a_run_that_is_named_twice_is_refused(folder, capsys):
  assert report(folder, 'llm', 'l2s', 'llm') == 2
  assert 'llm is given twice' in capsys.readouterr().err


@pytest.mark.parametrize(
  'text,message',
  [
    ('{"rows": [3]}', 'row 0 is int 3; set --speed to a benchmark.json'),
    ('{"rows": [{}]}', "row 0: key 'system' is missing"),
    ('{"rows": []}', 'has no times of LLM, SLM, LLM-to-SLM'),
  ],
)
def test_what_is_no_benchmark_is_refused(text, message, folder, capsys):
  path = folder / 'speed.json'
  path.write_text(text)
  assert report(folder, 'llm', speed=path) == 2
  assert message in capsys.readouterr().err
