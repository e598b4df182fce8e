# SPDX-License-Identifier: Apache-2.0
"""Laws of the Python API: it answers, trains and scores as the verbs do."""

import json
import logging
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import gin
import helpers
import jax
import pytest
import saved_runs

import l2s_jax
from l2s_jax import __main__ as command_line
from l2s_jax.evaluation import metric_writer
from l2s_jax.inference import infer, predictions
from l2s_jax.interop import to_huggingface
from l2s_jax.models import l2s

ROOT = pathlib.Path(__file__).parent.parent
PROMPTS = ['a red box', 'x', 'ab' * 9, 'the cat']
LENGTHS: dict[str, Any] = {
  'prompt_length': 10,
  'max_decode_len': 6,
  'batch_size': 16,
}
EXAMPLES = [(f'number {n}', f'{n} cats') for n in range(40)]
VALIDATION = [(f'number {n}', f'{n} dogs') for n in range(40, 46)]
TASK_FEATURE_LENGTHS = {'inputs': 12, 'targets': 10}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Two checkpoints of a run in `runs/`, an LLM and an SLM in `weights/`."""
  path = tmp_path_factory.mktemp('api')
  system = helpers.system(helpers.MODULES['t5_1_1'])
  params = helpers.random_params(system.module)
  saved_runs.save(path / 'runs/multi30k', system, params, steps=(1, 2))
  for name, config in (('llm', helpers.LLM), ('slm', helpers.T5_1_1)):
    weights = helpers.random_params(l2s.build(config))
    source = helpers.Arrays(config, weights)
    to_huggingface.save(source, path / 'weights' / name, helpers.vocabulary())
    helpers.vocabulary().save(path / 'weights' / name)
  return path


@pytest.fixture(scope='module')
def model(folder):
  return l2s_jax.load(folder / 'runs/multi30k', **LENGTHS)


def of_infer(location, tmp_path, decoding=None):
  """Returns the bytes that `infer` writes for PROMPTS."""
  source = tmp_path / 'prompts.txt'
  source.write_text(''.join(f'{prompt}\n' for prompt in PROMPTS))
  output_dir = tmp_path / 'answers'
  infer.infer(
    str(location), str(source), str(output_dir), decoding=decoding, **LENGTHS
  )
  return (output_dir / 'predictions.jsonl').read_bytes()


@pytest.mark.parametrize(
  'decoding',
  [
    l2s_jax.Decoding(),
    l2s_jax.Decoding(num_beams=3, num_answers=2, log_probs=True),
    l2s_jax.Decoding(temperature=1.0, top_k=20, seed=7),
  ],
  ids=['greedy', 'beams', 'sampling'],
)
def test_answers_are_those_of_infer(folder, model, decoding, tmp_path):
  expected = of_infer(folder / 'runs/multi30k', tmp_path, decoding)
  with pytest.warns(UserWarning, match='1 prompts were longer than 10 tokens'):
    records = model.predict(PROMPTS, decoding=decoding)
  assert predictions.dump(records).encode() == expected
  with pytest.warns(UserWarning):
    answers = model.answer(PROMPTS, decoding=decoding)
  assert answers == [record['prediction'] for record in records]


def test_seeds_share_compiled_programs(model, caplog):
  def sample(seed):
    return model.answer(
      PROMPTS[-2:],
      decoding=l2s_jax.Decoding(temperature=2.0, seed=seed),
      prompt_length=24,
    )

  first = sample(1)
  stream = model.stream(
    PROMPTS[-2],
    decoding=l2s_jax.Decoding(temperature=2.0, seed=1),
    prompt_length=24,
  )
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    others = [sample(seed) for seed in (2, 3)]
  assert not [r for r in caplog.records if 'ompil' in r.getMessage()]
  assert first not in others and others[0] != others[1]
  assert sample(1) == first
  # A stream keeps its seed while others are drawn.
  assert ''.join(stream) == first[0]


def test_a_model_model_paths_answers_as_in_infer(folder, tmp_path):
  model = l2s_jax.load(folder / 'weights/slm', **LENGTHS)
  assert model.step == 0
  with pytest.warns(UserWarning):
    records = model.predict(PROMPTS)
  expected = of_infer(folder / 'weights/slm', tmp_path)
  assert predictions.dump(records).encode() == expected


def test_streamed_pieces_are_the_answer(model):
  sampled = l2s_jax.Decoding(temperature=1.0, seed=3)
  most = 0
  for decoding in (None, sampled):
    for prompt in PROMPTS[-2:]:
      pieces = list(model.stream(prompt, decoding=decoding, prompt_length=24))
      (answer,) = model.answer([prompt], decoding=decoding, prompt_length=24)
      assert ''.join(pieces) == answer
      most = max(most, len(pieces))
  assert most > 1
  stop = answer[1:3]
  stopped = l2s_jax.Decoding(stop=(stop,), temperature=1.0, seed=3)
  pieces = list(model.stream(prompt, decoding=stopped, prompt_length=24))
  assert ''.join(pieces) == answer[: answer.index(stop)]
  with pytest.raises(ValueError, match='the best is known at the end alone'):
    model.stream(PROMPTS[0], decoding=l2s_jax.Decoding(num_beams=2))


def train(system, run, *, train_steps, examples=EXAMPLES, validation=None):
  return l2s_jax.train(
    system,
    examples,
    run,
    train_steps=train_steps,
    validation=validation,
    batch_size=8,
    task_feature_lengths=TASK_FEATURE_LENGTHS,
    learning_rate=0.01,
    seed=3,
  )


def test_a_pair_answers_as_a_run_before_its_first_step(folder, tmp_path):
  pair = l2s_jax.llm_to_slm(folder / 'weights/llm', folder / 'weights/slm')
  assert train(pair, tmp_path / 'run', train_steps=0) == {}
  assert not metric_writer.by_step(tmp_path / 'run', prefix='eval/')
  with pytest.warns(UserWarning):
    now = l2s_jax.load(pair, seed=3, **LENGTHS).answer(PROMPTS)
    then = l2s_jax.load(tmp_path / 'run', **LENGTHS).answer(PROMPTS)
  assert now == then


def test_training_and_scores_are_those_of_the_verbs(folder, tmp_path):
  for split, examples in (('train', EXAMPLES), ('validation', VALIDATION)):
    (tmp_path / f'{split}.jsonl').write_text(
      ''.join(
        json.dumps({'source': prompt, 'target': answer}) + '\n'
        for prompt, answer in examples
      )
    )
  files = {split: f'{split}.jsonl' for split in ('train', 'validation')}
  try:
    assert not command_line.main(
      [
        'train',
        '--gin_file=gin_configs/models/slm_baseline.gin',
        '--gin_file=gin_configs/tasks/jsonl.gin',
        '--gin_file=gin_configs/runs/train.gin',
        f'--gin.SLM_PATH={folder / "weights/slm"}',
        f'--gin.DATA_DIR={tmp_path}',
        f'--gin.DATA_FILES={files}',
        f'--gin.TASK_FEATURE_LENGTHS={TASK_FEATURE_LENGTHS}',
        f'--gin.MODEL_DIR={tmp_path / "verb"}',
        '--gin.TRAIN_STEPS=3',
        '--gin.BATCH_SIZE=8',
        '--gin.SEED=3',
        '--gin.LEARNING_RATE=0.01',
        '--gin.LEARNING_RATE_FACTORS=constant',
      ]
    )
  finally:
    gin.clear_config()
  run, system = tmp_path / 'api', l2s_jax.language_model(folder / 'weights/slm')
  train(system, run, train_steps=1)
  scores = train(system, run, train_steps=3, validation=VALIDATION)  # Goes on.
  assert scores == metric_writer.by_step(tmp_path / 'verb', prefix='eval/')[3]
  with pytest.warns(UserWarning):
    records = l2s_jax.load(run, **LENGTHS).predict(PROMPTS)
  expected = of_infer(tmp_path / 'verb', tmp_path)
  assert predictions.dump(records).encode() == expected

  config = (run / 'config.gin').read_text()
  assert 'train.train_steps = 3' in config and 'train.seed = 3' in config
  again = l2s_jax.evaluate(
    run,
    {
      'inputs': [prompt for prompt, _ in VALIDATION],
      'targets': [answer for _, answer in VALIDATION],
    },
    task_feature_lengths=TASK_FEATURE_LENGTHS,
    batch_size=8,
    num_bootstrap_samples=0,
  )
  assert again == scores
  with pytest.raises(ValueError, match='was trained with other settings'):
    train(system, run, train_steps=4, examples=EXAMPLES[1:])


FRESH = """
import sys, time
start = time.process_time()
import l2s_jax
assert time.process_time() - start < 0.2
assert not {'jax', 'numpy', 'gin'} & sys.modules.keys()
assert {'load', 'train', 'Decoding'} <= set(dir(l2s_jax))

run, llm = sys.argv[1:]
model = l2s_jax.load(run, prompt_length=10, max_decode_len=4, batch_size=8)
answers = model.answer(['a red box', 'x'])
assert ''.join(model.stream('a red box')) == answers[0]
found = {'babel', 'num2words', 'sacrebleu', 'regex', 'tensorflow', 'seqio'}
assert not found & sys.modules.keys(), found & sys.modules.keys()

system = l2s_jax.language_model(llm)
beams, drafts = l2s_jax.Decoding(num_beams=2), l2s_jax.Decoding(draft_len=2)
train = lambda examples, **more: l2s_jax.train(
    system, examples, 'absent', train_steps=1, **more)
for call, kind, words in (
    (lambda: l2s_jax.load('absent'), FileNotFoundError, 'absent is neither'),
    (lambda: l2s_jax.load(run, step=7), FileNotFoundError, '7'),
    (lambda: l2s_jax.load(system, step=7), ValueError, 'a system has its own'),
    (lambda: l2s_jax.load(run, max_decode_len=0), ValueError, 'MAX_DECODE_LEN'),
    (lambda: model.answer('a box'), ValueError, "are one text, 'a box'"),
    (lambda: model.answer(['a', ' ']), ValueError, 'prompt 1 is empty'),
    (lambda: model.answer([7]), ValueError, 'prompt 0 is of type int'),
    (lambda: model.answer(['\\udcff']), ValueError, 'a lone surrogate'),
    (lambda: model.answer(['a'], decoding=drafts), ValueError, 'draft_len=2'),
    (lambda: model.answer(['a'], batch_size=0), ValueError, 'BATCH_SIZE=0'),
    (lambda: model.stream(['a']), ValueError, 'expected one text'),
    (lambda: train('cldr', validation=[('a', 'b')]), ValueError, "task 'cldr'"),
    (lambda: train([]), ValueError, "'train' are none"),
    (lambda: train(['ab']), ValueError, "0 of 'train' is 'ab'"),
    (lambda: train([('a', 'b', 'c')]), ValueError, 'expected a pair'),
    (lambda: train([('a', 'b'), ('c', 7)]), ValueError,
     "example 1 of 'train' has an answer that is of type int"),
    (lambda: train([('', 'b')]), ValueError, 'a prompt that is empty'),
    (lambda: train({'inputs': ['a']}), ValueError, 'targets must be added'),
    (lambda: train({'inputs': ['a'], 'targets': []}), ValueError,
     '1 inputs and 0 targets'),
    (lambda: train([('a', 'b')], steps=1), TypeError, "'steps'"),
    (lambda: train([('a', 'b')], batch_size=-1), ValueError, 'BATCH_SIZE=-1'),
    (lambda: train([('a', 'b')], best_metric='bleu'), ValueError,
     'nothing is evaluated'),
    (lambda: l2s_jax.train(run, [('a', 'b')], 'x', train_steps=1), ValueError,
     'expected a system'),
    (lambda: l2s_jax.evaluate(llm, [('a', 'b')]), ValueError,
     'a pretrained model'),
    (lambda: l2s_jax.language_model('absent'), FileNotFoundError, 'absent'),
    (lambda: l2s_jax.loading, AttributeError, 'loading'),
):
  try:
    call()
  except kind as error:
    assert type(error) is kind and words in str(error), repr(error)
    assert '\\n' not in str(error), error
  else:
    raise AssertionError(words)
assert 'tensorflow' not in sys.modules
"""


def test_a_fresh_process_imports_little_and_refuses_in_a_sentence(
  folder, tmp_path
):
  script = ('-c', FRESH, folder / 'runs/multi30k', folder / 'weights/slm')
  result = subprocess.run(
    [sys.executable, *map(str, script)],
    cwd=tmp_path,
    env=os.environ
    | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  assert not (tmp_path / 'absent').exists()


def test_the_examples_of_the_page_run(folder, tmp_path, monkeypatch):
  page = (ROOT / 'docs/python_api.md').read_text(encoding='utf-8')
  blocks = re.findall(r'```python\n(.*?)```', page, flags=re.DOTALL)
  assert len(blocks) > 5
  for name in ('runs', 'weights'):
    (tmp_path / name).symlink_to(folder / name)
  monkeypatch.chdir(tmp_path)
  names: dict[str, object] = {}
  for block in blocks:
    exec(block, names)
