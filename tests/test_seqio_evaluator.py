# SPDX-License-Identifier: Apache-2.0
"""Laws of evaluation: raw references, input order, exact batches, controls."""

import json
import math

import helpers
import numpy as np
import pytest

from l2s_jax.data import batching, tasks
from l2s_jax.data.features import seqio
from l2s_jax.evaluation import scoring, seqio_evaluator
from l2s_jax.inference import length_buckets
from l2s_jax.metrics import metric_fns
from l2s_jax.systems import session
from l2s_jax.training import eval_plan
from l2s_jax.vocabularies import loading

LENGTHS = {'inputs': 16, 'targets': 8}
# Capital and small comma-below letters, and an answer longer than 8 tokens.
ANSWERS = [
  'Șase școli și țări.',
  'Școala „Țepeș”',
  'unu',
  'doi ' * 40 + '!',
  'patru',
  'cinci',
  'șapte',
]
PROMPTS = [f'number {n}' for n in range(6)] + ['number ' * 30]


@pytest.fixture(scope='module')
def bind(tmp_path_factory):
  """Returns a function that binds a Romanian task, or a mixture of two."""
  path = tmp_path_factory.mktemp('jsonl') / 'test.jsonl'
  path.write_text(
    '\n'.join(
      json.dumps({'source': prompt, 'target': answer})
      for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    )
  )
  names = ('romanian', 'more_romanian')
  for name in names:
    seqio.TaskRegistry.add_provider(
      name, tasks.local_task({'test': str(path)}, name=name)
    )
  seqio.MixtureRegistry.add_provider(
    'both', seqio.Mixture('both', [(name, 1) for name in names])
  )
  yield lambda vocabulary, name='romanian': tasks.bind(
    name, vocabulary, vocabulary
  )
  seqio.MixtureRegistry.remove('both')
  for name in names:
    seqio.TaskRegistry.remove(name)


@pytest.fixture(scope='module')
def evaluator(bind, vocabulary):
  return make_evaluator(bind(vocabulary))


def make_evaluator(task, **kwargs):
  return seqio_evaluator.TaskEvaluator(
    helpers.streamed(task),
    **{
      'task_feature_lengths': LENGTHS,
      'split': 'test',
      'batch_size': 4,
      **kwargs,
    },
  )


def perfect(vocabulary, steps=64, answers=ANSWERS, prompts=PROMPTS):
  """Returns a `predict` that knows the answers, as far as `vocabulary` can."""
  length = LENGTHS['inputs']
  known = {}
  for prompt, answer in zip(prompts, answers, strict=True):
    prompt_ids = [*vocabulary.encode(prompt), vocabulary.eos_id][:length]
    ids = [*vocabulary.encode(answer), vocabulary.eos_id][:steps]
    known[tuple(prompt_ids)] = ids + [vocabulary.pad_id] * (steps - len(ids))

  def predict(batch):
    return np.array(
      [
        known[tuple(row[mask > 0].tolist())]
        for row, mask in zip(
          batch['encoder_input_tokens'],
          batch['encoder_segment_ids'],
          strict=True,
        )
      ]
    )

  return predict


def read_lines(path):
  return [json.loads(line) for line in path.read_text('utf-8').splitlines()]


def check_references(bind, vocabulary, folder):
  """Scores what the vocabulary makes of each answer, against the raw one."""
  evaluator = make_evaluator(bind(vocabulary))
  scores = evaluator.evaluate(perfect(vocabulary), step=3, output_dir=folder)[
    'romanian'
  ]
  lines = read_lines(folder / 'romanian-test-3.jsonl')
  written = [vocabulary.decode(vocabulary.encode(text)) for text in ANSWERS]
  assert [line['prediction'] for line in lines][:3] == written[:3]
  assert [line['target'] for line in lines] == ANSWERS
  assert [line['prompt'] for line in lines] == PROMPTS
  predictions = [line['prediction'] for line in lines]
  # The law: scores are those of the raw text, not of its ids read back, whole
  # or cut. An unknown letter and a lost one cost the model, never the target.
  assert scores['bleu'] == metric_fns.bleu(ANSWERS, predictions)['bleu']
  assert scores['chrf'] == metric_fns.chrf(ANSWERS, predictions)['chrf']
  hits = sum(a == b for a, b in zip(ANSWERS, predictions, strict=True))
  assert 0 < hits < len(ANSWERS)
  assert scores['exact_match'] == 100 * hits / len(ANSWERS)
  assert scores['num_truncated_targets'] >= 1
  return predictions


def test_references_are_raw_with_a_tiny_vocabulary(bind, vocabulary, tmp_path):
  predictions = check_references(bind, vocabulary, tmp_path)
  assert '⁇' in predictions[0]


def test_references_are_raw_with_t5s_vocabulary(bind, shared_data, tmp_path):
  t5 = loading.load(shared_data / 'tokenizers' / 't5')
  predictions = check_references(bind, t5, tmp_path)
  assert 'Ș' not in predictions[0] and 'ț' in predictions[0]


def test_predict_gets_full_batches_in_order(evaluator):
  batches = []

  def predict(batch):
    batches.append(batch)
    return np.zeros((4, 2), np.int32)

  scores = evaluator.evaluate(predict, step=0)['romanian']
  assert [len(batch['encoder_input_tokens']) for batch in batches] == [4, 4]
  assert not any('truncated' in key or 'llm' in key for key in batches[0])
  assert batches[1]['decoder_loss_weights'].sum(axis=1)[3] == 0
  assert scores['num_examples'] == len(ANSWERS)
  assert scores['num_truncated_prompts'] == 1
  assert scores['num_without_eos'] == len(ANSWERS)
  assert scores['exact_match'] == 0


@pytest.mark.parametrize('control', ['none', 'other'])
def test_of_many_batches_like_prompts_come_together(
  bind, vocabulary, monkeypatch, control
):
  """Without the padding that longer ones need; nothing else changes."""
  in_order = make_evaluator(bind(vocabulary)).evaluate(
    perfect(vocabulary), step=0
  )
  monkeypatch.setattr(seqio_evaluator, '_FEWEST_BATCHES_TO_SORT', 2)
  monkeypatch.setattr(
    length_buckets, 'lengths', lambda most: range(1, most + 1)
  )
  batches = []

  def predict(batch):
    batches.append(batch)
    return perfect(vocabulary)(batch)

  evaluator = make_evaluator(bind(vocabulary), batch_size=2)
  assert evaluator.evaluate(predict, step=0, control=control) == in_order
  keys = {'encoder_input_tokens', 'llm_input_tokens'} & batches[0].keys()
  lengths = [{batch[key].shape[1] for key in keys} for batch in batches]
  assert all(len(found) == 1 for found in lengths)
  flat = [length for found in lengths for length in found]
  assert flat == sorted(flat, reverse=True) and len(set(flat)) > 1
  places = np.concatenate([batch['row_ids'] for batch in batches])
  assert sorted(places[: len(PROMPTS)]) == list(range(len(PROMPTS)))
  loss_batches = evaluator.batches(evaluator.tasks[0], control)
  weights = [batch['decoder_loss_weights'].sum() for batch in loss_batches]
  whole = make_evaluator(bind(vocabulary)).batches(evaluator.tasks[0])
  assert sum(weights) == sum(b['decoder_loss_weights'].sum() for b in whole)


def test_batch_size_changes_nothing(bind, vocabulary):
  predict = perfect(vocabulary)
  scores = [
    make_evaluator(bind(vocabulary), batch_size=size).evaluate(predict, step=0)
    for size in (1, 3, 7, 16)
  ]
  assert scores[0] == scores[1] == scores[2] == scores[3]
  assert scores[0]['romanian']['num_without_eos'] == 1


def test_an_evaluator_serves_again(evaluator, vocabulary):
  nothing = evaluator.evaluate(lambda batch: np.ones((4, 3), int), step=0)
  first = evaluator.evaluate(perfect(vocabulary), step=1)
  again = evaluator.evaluate(perfect(vocabulary), step=2)
  assert first == again != nothing


def test_control_other_brings_another_prompt(evaluator, vocabulary, tmp_path):
  batches = []

  def predict(batch):
    batches.append(batch)
    return perfect(vocabulary)(batch)

  scores = evaluator.evaluate(
    predict, step=5, control='other', output_dir=tmp_path
  )
  assert scores == evaluator.evaluate(perfect(vocabulary), step=5)
  tokens, llm_tokens, segment_ids, llm_segment_ids = (
    np.concatenate([batch[key] for batch in batches])[: len(PROMPTS)]
    for key in (
      'encoder_input_tokens',
      'llm_input_tokens',
      'encoder_segment_ids',
      'llm_segment_ids',
    )
  )
  partners = batching.control_partners(
    [
      row[mask > 0].tolist()
      for row, mask in zip(tokens, segment_ids, strict=True)
    ]
  )
  np.testing.assert_array_equal(llm_tokens, tokens[partners])
  np.testing.assert_array_equal(llm_segment_ids, segment_ids[partners])
  assert (llm_tokens != tokens).any(axis=1).all()
  assert [path.name for path in tmp_path.glob('*.jsonl')] == [
    'romanian-test-5-other.jsonl'
  ]


@pytest.mark.parametrize('name', ['romanian', 'both'])
def test_batches_are_those_of_the_split(bind, vocabulary, name):
  task = bind(vocabulary, name)
  evaluator = make_evaluator(task)
  found = [
    batch for part in evaluator.tasks for batch in evaluator.batches(part)
  ]
  expected = [
    batch
    for part in seqio.get_subtasks(task)
    for batch in helpers.eval_batches(
      part, task_feature_lengths=LENGTHS, split='test', batch_size=4
    )
  ]
  assert len(found) == len(expected) == 2 * len(evaluator.tasks)
  for one, other in zip(found, expected, strict=True):
    assert one.keys() == other.keys()
    for key, value in one.items():
      np.testing.assert_array_equal(value, other[key], key)


def test_control_other_is_in_the_batches_too(evaluator):
  (task,) = evaluator.tasks
  for batch in evaluator.batches(task, 'other'):
    assert batch['llm_input_tokens'].shape == (4, LENGTHS['inputs'])
    assert (batch['llm_input_tokens'] != batch['encoder_input_tokens']).any()


def test_intervals_come_beside_the_scores(bind, vocabulary):
  def user_metric(targets, predictions):
    return {'agreement': targets == predictions}

  task = bind(vocabulary)
  task = task.replace(metric_fns=[*task.metric_fns, user_metric])
  evaluator = make_evaluator(task, num_bootstrap_samples=50)
  scores = evaluator.evaluate(perfect(vocabulary), step=0)['romanian']
  plain = make_evaluator(task).evaluate(perfect(vocabulary), step=0)['romanian']
  added = scores.keys() - plain.keys()
  assert added == {
    f'{name}_{end}'
    for name in ('bleu', 'chrf', 'exact_match')
    for end in ('low', 'high')
  }
  assert {name: scores[name] for name in plain} == plain
  assert scores['chrf_low'] < scores['chrf'] < scores['chrf_high']
  assert scores == evaluator.evaluate(perfect(vocabulary), step=1)['romanian']


def test_several_references_are_scored_and_written(bind, vocabulary, tmp_path):
  def postprocess(text, example, is_target):
    if not is_target:
      return text
    prompt = example['inputs_pretokenized'].decode()
    return [text, f'not {prompt}'] if prompt.startswith('number 2') else [text]

  task = bind(vocabulary).replace(
    postprocess_fn=postprocess,
    metric_fns=[metric_fns.rouge, metric_fns.bleu, metric_fns.exact_match],
  )
  answers = [*ANSWERS[:2], f'not {PROMPTS[2]}', *ANSWERS[3:]]
  scores = make_evaluator(task, num_bootstrap_samples=20).evaluate(
    perfect(vocabulary, answers=answers), step=3, output_dir=tmp_path
  )['romanian']
  lines = read_lines(tmp_path / 'romanian-test-3.jsonl')
  assert [line['target'] for line in lines] == ANSWERS
  references = [line['references'] for line in lines]
  assert references[2] == [ANSWERS[2], f'not {PROMPTS[2]}']
  assert references[3] == [ANSWERS[3]]
  predictions = [line['prediction'] for line in lines]
  assert predictions[2] == references[2][1]
  for metric in task.metric_fns:
    for name, score in metric(references, predictions).items():
      assert scores[name] == score
  assert scores['rouge1_low'] <= scores['rouge1'] <= scores['rouge1_high']
  assert scores['min_references'] == 1
  assert scores['max_references'] == 2


def test_whoever_predicts_may_leave_and_nothing_is_written(
  evaluator, vocabulary, tmp_path
):
  batches: list[batching.Batch] = []

  def predict(batch):
    if batches:
      raise KeyboardInterrupt
    batches.append(batch)
    return perfect(vocabulary)(batch)

  with pytest.raises(KeyboardInterrupt):
    evaluator.evaluate(predict, step=0, output_dir=tmp_path)
  assert list(tmp_path.iterdir()) == []
  scores = evaluator.evaluate(perfect(vocabulary), step=0)
  assert scores['romanian']['num_examples'] == len(ANSWERS)


def test_num_examples_takes_the_first(bind, vocabulary):
  evaluator = make_evaluator(bind(vocabulary), num_examples=3)
  scores = evaluator.evaluate(perfect(vocabulary), step=0)['romanian']
  assert scores['num_examples'] == 3
  assert math.isclose(scores['exact_match'], 100 / 3)


def test_mixture_is_scored_task_by_task(bind, vocabulary):
  evaluator = make_evaluator(bind(vocabulary, 'both'), num_examples=5)
  scores = evaluator.evaluate(lambda batch: np.ones((4, 3), int), step=0)
  assert {name: score['num_examples'] for name, score in scores.items()} == {
    'more_romanian': 5,
    'romanian': 5,
  }


def test_a_mixture_beside_its_own_task_is_refused(bind, vocabulary):
  """They would write the same file of predictions."""
  del bind  # Has registered them.
  system = helpers.system(helpers.MODULES['t5_1_0'])
  run = eval_plan.Planned('romanian', 'test', None, None, LENGTHS)
  one, both = eval_plan.Evaluation(), eval_plan.Evaluation('both')
  trained = session.bind_task(system, 'romanian')
  for evaluations in ([one, both], [both, one]):
    plan = eval_plan.make(evaluations, run, None)
    with pytest.raises(ValueError, match="predictions of task 'romanian' on"):
      plan.bind(system, trained, 'romanian')
  assert eval_plan.make([both], run, None).bind(system, trained, 'romanian')


def test_nothing_stays_registered(evaluator):
  del evaluator
  names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  assert not any(name.startswith('l2s_jax') for name in names)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'metric_fns': []}, 'romanian has splits test and 0 metrics'),
    ({'metric_fns': [lambda targets, scores: {}]}, 'metrics of SCORE'),
    ({'preprocessors': [lambda dataset: dataset.take(0)]}, 'no examples'),
  ],
)
def test_what_cannot_be_evaluated_is_refused(
  bind, vocabulary, changes, message
):
  task = bind(vocabulary)
  if 'preprocessors' in changes:
    steps = [*task.preprocessors, *changes['preprocessors']]
    changes = {'preprocessors': steps}
  with pytest.raises(ValueError, match=message):
    make_evaluator(task.replace(**changes))


def test_a_task_that_drops_its_raw_answers_is_refused(bind, vocabulary):
  def drop(dataset):
    return dataset.map(
      lambda example: {
        key: value
        for key, value in example.items()
        if key != 'targets_pretokenized'
      }
    )

  task = bind(vocabulary)
  with pytest.raises(ValueError, match='copy_pretokenized=True'):
    make_evaluator(task.replace(preprocessors=[*task.preprocessors, drop]))


def test_wrong_shapes_are_named(evaluator):
  with pytest.raises(ValueError, match=r'shape \(4,\), expected \(4, steps\)'):
    evaluator.evaluate(lambda batch: np.ones(4, int), step=0)


def test_the_names_of_scores_are_known_ahead(bind, vocabulary):
  """So that a misspelt BEST_METRIC is refused before anything is computed."""
  task = bind(vocabulary)
  scores = make_evaluator(task).evaluate(perfect(vocabulary), step=1)
  task = helpers.streamed(task)
  names = scoring.score_names(task, 'test')
  assert names is not None
  assert set(names) - {'loss', 'token_accuracy'} <= scores['romanian'].keys()
  assert 'bleu' in names and 'num_examples' not in names
  both = scoring.score_names(helpers.streamed(bind(vocabulary, 'both')), 'test')
  assert both is not None and sorted(both) == sorted(
    f'{part}/{name}' for part in ('romanian', 'more_romanian') for name in names
  )
  eval_plan.check_score('BEST_METRIC', 'chrf', task, 'test')
  with pytest.raises(ValueError, match="BEST_METRIC='blue'.*bleu, chrf"):
    eval_plan.check_score('BEST_METRIC', 'blue', task, 'test')
