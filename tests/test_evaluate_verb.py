# SPDX-License-Identifier: Apache-2.0
"""The evaluation of systems: losses, controls, leaving, checkpoints, curves."""

import copy
import json
import shutil

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboardX.proto import event_pb2

from l2s_jax.data import cldr, tasks
from l2s_jax.data.features import seqio, tf
from l2s_jax.evaluation import evaluate, report, scoring
from l2s_jax.inference import sampling
from l2s_jax.metrics import metric_fns
from l2s_jax.runtime import partitioning
from l2s_jax.systems import builders, run_folder, session
from l2s_jax.systems import system as system_lib
from l2s_jax.training import checkpoint
from l2s_jax.training import state as state_lib
from l2s_jax.vocabularies import sentencepiece
from l2s_jax.weights import saved_steps

LENGTHS = {'inputs': 16, 'targets': 8}
NUM_EXAMPLES = 21


@pytest.fixture(scope='module', autouse=True)
def task(tmp_path_factory):
  """Registers a task of a few short prompts and answers."""
  path = tmp_path_factory.mktemp('task') / 'test.jsonl'
  path.write_text(
    ''.join(
      json.dumps({'source': f'number {n}', 'target': f'{n} ' * (n % 5 + 1)})
      + '\n'
      for n in range(NUM_EXAMPLES)
    )
  )
  seqio.TaskRegistry.add_provider(
    'numbers',
    tasks.local_task(
      {'test': str(path)}, name='numbers', metrics=('rouge', 'exact_match')
    ),
  )
  yield
  seqio.TaskRegistry.remove('numbers')


@pytest.fixture(scope='module')
def mesh():
  with (
    partitioning.use_mesh(
      mesh := partitioning.make_mesh(partitioning.MeshConfig())
    ),
    partitioning.axis_rules(partitioning.DEFAULT_RULES),
  ):
    yield mesh


def make_evaluator(system, mesh, **options):
  return scoring.Evaluator(
    system,
    mesh,
    session.bind_task(system, 'numbers'),
    LENGTHS,
    split='test',
    **{'batch_size': 8} | options,
  )


@pytest.fixture(scope='module')
def llm_to_slm():
  """Returns a system and parameters of which all are random."""
  module = helpers.MODULES['llm_to_t5_1_1-add-shared']
  return helpers.system(module), helpers.random_params(module)


def test_loss_is_that_of_all_tokens(mesh, llm_to_slm):
  system, params = llm_to_slm
  scores = make_evaluator(system, mesh).evaluate(params, step=0)
  loss, num_correct, num_tokens = 0.0, 0.0, 0.0
  vocabularies = system.prompt_vocabulary, system.answer_vocabulary
  for batch in helpers.eval_batches(
    tasks.bind('numbers', *vocabularies),
    task_feature_lengths=LENGTHS,
    batch_size=8,
    split='test',
  ):
    weights = batch['decoder_loss_weights']
    logits = helpers.logits(system.module, params, batch)
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    targets = batch['decoder_target_tokens']
    chosen = np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    loss -= (chosen * weights).sum()
    num_correct += ((log_probs.argmax(-1) == targets) * weights).sum()
    num_tokens += weights.sum()
  assert scores['num_examples'] == NUM_EXAMPLES
  np.testing.assert_allclose(scores['loss'], loss / num_tokens, rtol=1e-4)
  assert scores['token_accuracy'] == pytest.approx(num_correct / num_tokens)


def test_a_model_that_does_not_use_the_llm_is_found_out(mesh, llm_to_slm):
  system, params = llm_to_slm
  deaf = copy.copy(params)
  deaf['projector'] = jax.tree.map(jnp.zeros_like, params['projector'])
  scorer = make_evaluator(system, mesh)
  by_control = {
    control: scorer.evaluate(deaf, step=0, control=control)
    for control in scoring.CONTROLS
  }
  for control in scoring.CONTROLS:
    assert by_control[control] == by_control['none'], control
  verdict = report.describe_controls(by_control)
  assert verdict.startswith('The SLM does not use the LLM: ROUGE-Lsum')

  def losses(params, controls):
    return {
      control: scorer.evaluate(params, step=0, control=control)['loss']
      for control in controls
    }

  found = losses(params, scoring.CONTROLS)
  assert len(set(found.values())) == len(scoring.CONTROLS)
  # The LLM's layers are heard through the right prompt's states alone, its
  # embeddings through those of layer 0, too.
  for name, hearing in (
    ('encoder', {'none'}),
    ('token_embedder', {'none', 'layer_0'}),
  ):
    llm = params['llm'] | {
      name: jax.tree.map(lambda x: 1.5 * x, params['llm'][name])
    }
    changed = losses({**params, 'llm': llm}, ('none', 'untrained', 'layer_0'))
    assert {c for c in changed if changed[c] != found[c]} == hearing, name


def test_samples_do_not_depend_on_batches(mesh, llm_to_slm, tmp_path):
  system, params = llm_to_slm
  found = []
  for batch_size in (8, 16):
    scorer = make_evaluator(
      system,
      mesh,
      batch_size=batch_size,
      decoding=sampling.Decoding(temperature=1.0),
    )
    scorer.evaluate(params, step=batch_size, output_dir=tmp_path)
    path = tmp_path / 'eval' / f'numbers-test-{batch_size}.jsonl'
    found.append([json.loads(line)['prediction'] for line in path.open()])
  assert found[0] == found[1]
  assert len(set(found[0])) == NUM_EXAMPLES


@pytest.mark.parametrize('num_batches', [0, 2, 3, 5])
def test_stop_leaves_between_batches(mesh, llm_to_slm, tmp_path, num_batches):
  # Three batches are decoded, and the same three have their loss measured.
  system, params = llm_to_slm
  scorer = make_evaluator(system, mesh)
  calls: list[None] = []

  def stop():
    if len(calls) == num_batches:
      raise InterruptedError
    calls.append(None)

  with pytest.raises(InterruptedError):
    scorer.evaluate(params, step=7, output_dir=tmp_path, stop=stop)
  assert len(calls) == num_batches
  found = list(tmp_path.rglob('*.jsonl'))
  assert [path.name for path in found] == ['numbers-test-7.jsonl'] * (
    num_batches >= 3
  )
  for path in found:
    assert len(path.read_text().splitlines()) == NUM_EXAMPLES


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run of a language model with two checkpoints."""
  folder = tmp_path_factory.mktemp('evaluate')
  texts = (e['prompt'] for e in cldr.examples('train', num_examples=300))
  path = folder / 'tiny.model'
  sentencepiece.train(texts, path, vocab_size=200, hard_vocab_limit=False)
  system = builders.language_model_system(
    system_lib.Tower(config=helpers.T5_1_1, vocabulary=str(path))
  )
  run_folder.save(system, folder / 'run')
  checkpointer = checkpoint.Checkpointer(folder / 'run')
  for step in (5, 10):
    params = helpers.random_params(system.module, seed=step)
    state = state_lib.create(params, optax.identity(), seed=0)
    checkpointer.save(state.replace(step=jnp.asarray(step)), {})
  checkpointer.close()
  return folder / 'run'


def evaluate_run(run, **options):
  return evaluate.evaluate(
    **{
      'checkpoint_path': str(run),
      'mixture_or_task_name': 'numbers',
      'task_feature_lengths': LENGTHS,
      'batch_size': 8,
      'split': 'test',
      'num_bootstrap_samples': 30,
      **options,
    }
  )


def test_all_checkpoints_give_a_curve(run, tmp_path, capsys):
  results = evaluate_run(
    run, steps='all', length_bins=(1, 3), output_dir=str(tmp_path)
  )
  assert list(results) == [5, 10]
  found = evaluate.read_scores(tmp_path / 'eval/metrics-numbers-test.json')
  by_bin = found['5']['none'].pop('by_length')['numbers']
  # Answers are of 1 to 5 words in turn.
  sizes = {name: scores['num_examples'] for name, scores in by_bin.items()}
  assert sizes == {'0-1': 5, '2-3': 8, '4+': 8}
  assert by_bin.keys() == found['10']['none'].pop('by_length')['numbers'].keys()
  settings = [found[step]['none'].pop('settings') for step in ('5', '10')]
  _, signatures = (found[step]['none'].pop('signatures') for step in found)
  assert signatures['rougeLsum'].startswith('nrefs:1|tok:latin|stem:yes|')
  assert settings[0] == settings[1] and 'max_decode_len' in settings[0]
  assert found == {str(step): scores for step, scores in results.items()}
  scores = results[10]['none']
  assert {'rouge2', 'exact_match', 'loss', 'rouge1_low'} <= scores.keys()
  assert scores['rouge1_low'] <= scores['rouge1'] <= scores['rouge1_high']
  printed = capsys.readouterr().out
  assert f'step 10: {scoring.format_scores(scores, signatures)}\n' in printed
  by_step = {step: found[str(step)]['none'] for step in (5, 10)}
  assert report.steps_table(by_step) in printed
  assert '\n| numbers: words | examples |' in printed
  plot = tmp_path / 'eval' / 'curves-numbers-test.png'
  assert plot.read_bytes().startswith(b'\x89PNG') and str(plot) in printed
  assert (tmp_path / 'eval' / 'config-numbers-test.gin').is_file()


def test_what_was_evaluated_before_stays_in_the_curve(run, tmp_path, capsys):
  output_dir = str(tmp_path)
  first = evaluate_run(run, steps=(5,), output_dir=output_dir)
  assert '| step |' not in capsys.readouterr().out
  assert not (tmp_path / 'eval' / 'curves-numbers-test.png').exists()
  second = evaluate_run(run, output_dir=output_dir)  # the newest
  again = evaluate_run(run, steps=(10, 5), output_dir=output_dir)
  assert again == first | second
  assert '|    5 |' in capsys.readouterr().out

  folder = tmp_path / 'eval' / 'tensorboard' / 'numbers-test'
  (event_file,) = folder.iterdir()
  events = [
    event_pb2.Event.FromString(record)
    for record in tf.data.TFRecordDataset(str(event_file)).as_numpy_iterator()
  ]
  scalars = [
    (value.tag, event.step, value.simple_value)
    for event in events
    for value in event.summary.value
  ]
  losses = [scalar for scalar in scalars if scalar[0] == 'eval/loss']
  assert losses == [
    ('eval/loss', step, pytest.approx(again[step]['none']['loss']))
    for step in (5, 10)
  ]
  assert not any(tag.endswith('_low') for tag, _, _ in scalars)


def test_evaluations_with_other_settings_are_not_compared(
  run, tmp_path, capsys
):
  evaluate_run(run, steps='all', output_dir=str(tmp_path))
  assert '|    5 |' in capsys.readouterr().out
  evaluate_run(run, steps=10, output_dir=str(tmp_path), num_examples=2)
  assert '|    5 |' not in capsys.readouterr().out
  found = json.loads((tmp_path / 'eval/metrics-numbers-test.json').read_text())
  assert [found[step]['none']['num_examples'] for step in ('5', '10')] != [2, 2]
  assert found['10']['none']['settings']['num_examples'] == 2


@pytest.mark.parametrize(
  'steps, message',
  [
    (7, r'does not have the checkpoint 7; it has steps \[5, 10\]'),
    ((5, 6), r'the checkpoint 6; it has steps \[5, 10\]'),
    ('best', 'no best checkpoint'),
  ],
)
def test_steps_that_are_not_there_are_refused(run, steps, message):
  with pytest.raises(FileNotFoundError, match=message):
    evaluate_run(run, steps=steps)


def test_a_word_that_is_no_step_is_refused(run):
  with pytest.raises(ValueError, match="EVAL_STEPS='newest': expected a step"):
    evaluate_run(run, steps='newest')


def test_decoding_that_no_evaluation_scores_is_refused(run):
  for options, message in (
    ({'stop': ('x',)}, r"Decoding.stop=\('x',\): stop texts are for infer"),
    ({'draft_len': 2}, 'Decoding.draft_len=2: .* Evaluate the LLM'),
  ):
    with pytest.raises(ValueError, match=message):
      evaluate_run(run, decoding=sampling.Decoding(**options))


def test_a_run_without_checkpoints_is_refused(run, tmp_path):
  checkpoints = shutil.ignore_patterns(saved_steps.FOLDER)
  shutil.copytree(run, tmp_path / 'run', ignore=checkpoints)
  with pytest.raises(FileNotFoundError, match=r'it has steps \[\]'):
    evaluate_run(tmp_path / 'run', steps='all')


def test_bins_of_lengths_that_do_not_rise_are_refused(run):
  with pytest.raises(ValueError, match=r'EVAL_LENGTH_BINS=\(3, 1\): expected'):
    evaluate_run(run, length_bins=(3, 1))


def test_controls_of_a_language_model_are_refused(run):
  with pytest.raises(ValueError, match=r"\('none',\) for a language model"):
    evaluate_run(run, controls=('none', 'zero'))


def test_scores_in_one_line():
  line = scoring.format_scores(
    {
      'one/bleu': 23.4567,
      'one/bleu_low': 22.1,
      'one/bleu_high': 24.8,
      'one/min_references': 1,
      'one/max_references': 3,
      'one/num_examples': 11490,
      'two/loss': 1.25,
    },
    {'one/bleu': metric_fns.bleu_signature(None)},
  )
  start, end = line.split(' (nrefs:var|')
  assert start == 'one/bleu 23.46 [22.1, 24.8]'
  assert end.endswith(
    '), one/min_references 1, one/max_references 3, one/num_examples 11490, '
    'two/loss 1.25'
  )
