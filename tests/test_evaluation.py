# SPDX-License-Identifier: Apache-2.0
"""Laws of evaluation: raw references, input order, exact batches, controls."""

import json
import math

import numpy as np
import pytest

from l2s_jax import data, evaluation, metrics, tasks, vocabularies
from l2s_jax.features import seqio

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
  return evaluation.TaskEvaluator(
    task,
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
  assert scores['bleu'] == metrics.bleu(ANSWERS, predictions)['bleu']
  assert scores['chrf'] == metrics.chrf(ANSWERS, predictions)['chrf']
  hits = sum(a == b for a, b in zip(ANSWERS, predictions, strict=True))
  assert 0 < hits < len(ANSWERS)
  assert scores['exact_match'] == 100 * hits / len(ANSWERS)
  assert scores['num_truncated_targets'] >= 1
  return predictions


def test_references_are_raw_with_a_tiny_vocabulary(bind, vocabulary, tmp_path):
  predictions = check_references(bind, vocabulary, tmp_path)
  assert '⁇' in predictions[0]


def test_references_are_raw_with_t5s_vocabulary(bind, shared_data, tmp_path):
  t5 = vocabularies.load(shared_data / 'tokenizers' / 't5')
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
  partners = data.control_partners(
    [
      row[mask > 0].tolist()
      for row, mask in zip(tokens, segment_ids, strict=True)
    ]
  )
  np.testing.assert_array_equal(llm_tokens, tokens[partners])
  np.testing.assert_array_equal(llm_segment_ids, segment_ids[partners])
  assert (llm_tokens != tokens).any(axis=1).all()
  assert [path.name for path in tmp_path.iterdir()] == [
    'romanian-test-5-other.jsonl'
  ]


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
