# SPDX-License-Identifier: Apache-2.0
"""Laws of sampling: what is excluded, what is drawn, and how often."""

import functools
import math
import re
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2s_jax.inference import generate, sampling, strategies

VOCAB_SIZE = 300  # two blocks of `draw`, and a part of a third
NUM_STEPS = 12
EOS_ID = 5


def random_logits(num_rows, seed=0, vocab_size=VOCAB_SIZE):
  generator = np.random.default_rng(seed)
  logits = generator.normal(0, 3, (num_rows, vocab_size))
  return logits.astype(np.float32)


def random_tokens(num_rows, seed=1):
  """Returns tokens of which many come again, EOS among them."""
  generator = np.random.default_rng(seed)
  return generator.integers(3, 7, (num_rows, NUM_STEPS)).astype(np.int32)


def keys(num_rows, seed=0):
  return jax.random.split(jax.random.key(seed), num_rows)


def over_rows(function, **options):
  return jax.jit(jax.vmap(functools.partial(function, **options)))


def restrict(logits, **settings):
  decoding = sampling.Decoding(**{'temperature': 1.0} | settings)
  return over_rows(sampling.restrict, decoding=decoding)(jnp.asarray(logits))


def kept(logits, **settings):
  """Returns the ids of one row that may be drawn."""
  logits = np.asarray(logits, np.float32)[None]
  return np.flatnonzero(restrict(logits, **settings)[0] > -np.inf).tolist()


# --- against transformers ---


PENALTIES = [
  dict(repetition_penalty=1.3),
  dict(repetition_penalty=0.7),
  dict(no_repeat_ngram_size=1),
  dict(no_repeat_ngram_size=2),
  dict(no_repeat_ngram_size=3),
  dict(min_decode_len=4),
  dict(repetition_penalty=2.0, no_repeat_ngram_size=2, min_decode_len=12),
]


@pytest.mark.parametrize('settings', PENALTIES, ids=str)
def test_penalties_are_those_of_transformers(settings):
  torch, transformers = helpers.import_reference()
  processors = transformers.LogitsProcessorList()
  if penalty := settings.get('repetition_penalty'):
    processors.append(transformers.RepetitionPenaltyLogitsProcessor(penalty))
  if size := settings.get('no_repeat_ngram_size'):
    processors.append(transformers.NoRepeatNGramLogitsProcessor(size))
  if length := settings.get('min_decode_len'):
    processors.append(transformers.MinLengthLogitsProcessor(length, EOS_ID))
  logits, tokens = random_logits(8), random_tokens(8)
  penalize = jax.jit(
    jax.vmap(
      lambda logits, tokens, step: sampling.penalize(
        logits,
        tokens,
        step=step,
        decoding=sampling.Decoding(**settings),
        eos_id=EOS_ID,
      )
    )
  )
  changes = 0
  for step in range(NUM_STEPS + 1):
    found = penalize(
      jnp.asarray(logits), jnp.asarray(tokens), jnp.full(8, step)
    )
    written = torch.tensor(tokens[:, :step], dtype=torch.int64)
    expected = processors(written, torch.tensor(logits)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    changes += (expected != logits).sum()
  assert changes


RESTRICTIONS = [
  dict(temperature=0.7),
  dict(top_k=1),
  dict(top_k=40),
  dict(top_k=VOCAB_SIZE),
  dict(top_k=1000),
  dict(top_p=0.1),
  dict(top_p=0.9),
  dict(top_p=0.999),
  dict(min_p=0.05),
  dict(temperature=3.0, top_k=20, top_p=0.8),
  dict(temperature=1.5, top_k=50, top_p=0.95, min_p=0.1),
]


@pytest.mark.parametrize('settings', RESTRICTIONS, ids=str)
def test_what_is_drawn_from_is_that_of_transformers(settings):
  torch, transformers = helpers.import_reference()
  warpers = transformers.LogitsProcessorList()
  if temperature := settings.get('temperature'):
    warpers.append(transformers.TemperatureLogitsWarper(temperature))
  if top_k := settings.get('top_k'):
    warpers.append(transformers.TopKLogitsWarper(top_k))
  if top_p := settings.get('top_p'):
    warpers.append(transformers.TopPLogitsWarper(top_p))
  if min_p := settings.get('min_p'):
    warpers.append(transformers.MinPLogitsWarper(min_p))
  logits = random_logits(64)
  found = restrict(logits, **settings)
  expected = warpers(None, torch.tensor(logits)).numpy()
  np.testing.assert_array_equal(found == -np.inf, expected == -np.inf)
  helpers.assert_close(
    jax.nn.softmax(found), jax.nn.softmax(jnp.asarray(expected))
  )


# --- against a sort ---


def awkward_logits():
  """Returns rows on which a search for a threshold might go astray."""
  generator = np.random.default_rng(0)
  size = 1000
  normal = generator.normal(0, 3, size)
  rows = {
    'normal': normal,
    'narrow': 7 + 1e-6 * normal,
    'wide': 1e4 * normal,
    'near 0': 1e-30 * normal,
    'below 0': -50 - np.abs(normal),
    'in tens': np.round(normal),
    'zeros of both signs': np.where(normal > 0, 0.0, -0.0),
    'constant': np.full(size, -3.0),
    'one high': np.where(np.arange(size) == 77, 30.0, normal),
    'excluded': np.where(normal > 0, -np.inf, normal),
    'one left': np.where(np.arange(size) == 77, 1.0, -np.inf),
    'outliers': np.where(normal > 5, -3e38, normal),
    'huge': np.linspace(-1e38, 1e38, size),
  }
  return {name: row.astype(np.float32) for name, row in rows.items()}


AWKWARD = awkward_logits()


@pytest.mark.parametrize('top_k', [1, 2, 39, 500, 999])
def test_top_k_equals_a_sort(top_k):
  logits = np.stack(list(AWKWARD.values()))
  found = restrict(logits, top_k=top_k) > -np.inf
  threshold = np.sort(logits, axis=1)[:, -top_k, None]
  expected = (logits >= threshold) & (logits > -np.inf)
  for i, name in enumerate(AWKWARD):
    np.testing.assert_array_equal(found[i], expected[i], name)


@pytest.mark.parametrize('top_p', [1e-9, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
def test_top_p_equals_a_sort(top_p, temperature):
  logits = np.stack(list(AWKWARD.values()))
  found = restrict(logits, temperature=temperature, top_p=top_p) > -np.inf
  for i, name in enumerate(AWKWARD):
    # Equal are those that float32 has as equal, below the highest.
    with np.errstate(over='ignore'):
      values = (logits[i] - logits[i].max()) / np.float32(temperature)
    weights = np.exp(values.astype(np.float64))
    distinct, places = np.unique(values, return_inverse=True)
    above = np.cumsum(np.bincount(places, weights)[::-1])[::-1]
    threshold = distinct[above >= top_p * weights.sum()].max()
    np.testing.assert_array_equal(found[i], values >= threshold, name)


def test_a_threshold_takes_few_passes_whatever_the_logits():
  num_passes = {}
  for name, row in AWKWARD.items():
    values: list[jax.Array] = []

    def count_from(value, row=row, values=values):
      values.append(value)
      return np.sum(row >= value)

    with jax.disable_jit():
      sampling._threshold(
        count_from,
        40,
        lambda _: 1,
        low=jnp.float32(-jnp.inf),
        high=jnp.max(row),
      )
    num_passes[name] = len(values)
  assert max(num_passes.values()) <= 50, num_passes
  assert num_passes['normal'] <= 15, num_passes


# --- by hand ---


def test_top_k_and_top_p_keep_ties():
  logits = np.log([0.1, 0.3, 0.2, 0.2, 0.2])
  assert kept(logits, top_k=1) == [1]
  assert kept(logits, top_k=2) == [1, 2, 3, 4]
  assert kept(logits, top_k=4) == [1, 2, 3, 4]
  assert kept(logits, top_k=5) == [0, 1, 2, 3, 4]
  assert kept(logits, top_p=0.29) == [1]
  assert kept(logits, top_p=0.31) == [1, 2, 3, 4]
  assert kept(logits, top_p=0.89) == [1, 2, 3, 4]
  assert kept(logits, top_p=0.91) == [0, 1, 2, 3, 4]


def test_a_probability_that_is_reached_is_enough():
  logits = [math.log(4), math.log(2), 0, 0]  # 1/2, 1/4, 1/8, 1/8
  assert kept(logits, top_p=0.5) == [0]
  assert kept(logits, top_p=0.500001) == [0, 1]
  assert kept(logits, min_p=0.5) == [0, 1]
  assert kept(logits, min_p=0.500001) == [0]
  assert kept(logits, min_p=1.0) == [0]


def test_each_restriction_is_of_what_the_one_before_has_left():
  logits = np.log([0.4, 0.3, 0.2, 0.1])
  # Of 0.4 and 0.3 the first has 4/7, and that is not 0.6.
  assert kept(logits, top_k=2, top_p=0.6) == [0, 1]
  assert kept(logits, top_k=2, top_p=0.55) == [0]
  # Temperature comes first: at 0.5 it squares, and 16/30 is above 0.5.
  assert kept(logits, top_p=0.5) == [0, 1]
  assert kept(logits, top_p=0.5, temperature=0.5) == [0]
  assert kept(logits, min_p=0.5) == [0, 1, 2]
  assert kept(logits, min_p=0.5, temperature=0.5) == [0, 1]


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_where_all_are_excluded_the_token_is_0(temperature):
  choose = over_rows(
    sampling.choose,
    step=jnp.int32(3),
    decoding=sampling.Decoding(
      temperature=temperature,
      top_k=2,
      top_p=0.5,
      min_p=0.1,
      no_repeat_ngram_size=1,
    ),
    eos_id=-1,
  )
  (token,) = choose(jnp.zeros((1, 3)), jnp.array([[2, 0, 1]]), keys(1))
  assert token == 0


def test_what_is_beyond_the_written_counts_for_nothing():
  decoding = sampling.Decoding(repetition_penalty=2.0, no_repeat_ngram_size=2)
  penalize = jax.jit(
    functools.partial(sampling.penalize, decoding=decoding, eos_id=-1)
  )
  logits = jnp.array([4.0, -4.0, 2.0, 0.0])
  # Of the second token on, buffers may hold anything: here 0, and padding.
  for rest in ([0, 0, 0], [3, 3, 3], [7, -1, 9]):
    found = penalize(logits, jnp.array([1, *rest]), step=jnp.int32(1))
    np.testing.assert_array_equal(found, [4.0, -8.0, 2.0, 0.0])
  # 1 2 has been, and 1 comes last.
  found = penalize(logits, jnp.array([1, 2, 1, 0]), step=jnp.int32(3))
  np.testing.assert_array_equal(found, [4.0, -8.0, -jnp.inf, 0.0])


# --- what is drawn ---


DRAWS = [
  dict(temperature=1.0),
  dict(temperature=0.5, top_k=30),
  dict(temperature=2.0, top_p=0.8),
  dict(temperature=1.0, top_k=100, top_p=0.95, min_p=0.02),
]


@pytest.mark.parametrize('settings', DRAWS, ids=str)
def test_tokens_are_drawn_as_often_as_they_are_probable(settings):
  num_draws = 20_000
  decoding = sampling.Decoding(**settings)
  logits = jnp.asarray(random_logits(1)[0])
  probabilities = np.asarray(
    jax.nn.softmax(restrict(logits[None], **settings)[0]), np.float64
  )
  drawn = jax.jit(
    jax.vmap(
      lambda key: sampling.choose(
        logits,
        jnp.zeros(NUM_STEPS, jnp.int32),
        key,
        step=jnp.int32(0),
        decoding=decoding,
        eos_id=EOS_ID,
      )
    )
  )(keys(num_draws))
  assert drawn.dtype == jnp.int32
  counts = np.bincount(drawn, minlength=VOCAB_SIZE)
  assert (counts[probabilities == 0] == 0).all()
  stddev = np.sqrt(num_draws * probabilities * (1 - probabilities))
  # A count of one is no wonder where a fraction is expected.
  excess = np.abs(counts - num_draws * probabilities) - 1
  assert (excess <= 6 * stddev).all()
  # And all together: the sum of squares has mean n - 1, variance 2 (n - 1).
  often = num_draws * probabilities > 5
  squares = (counts - num_draws * probabilities)[often] ** 2
  chi_square = (squares / (num_draws * probabilities[often])).sum()
  assert abs(chi_square - often.sum()) <= 6 * math.sqrt(2 * often.sum())


@pytest.mark.parametrize('vocab_size', [1, 2, 128, 129])
def test_every_token_can_be_drawn_and_no_other(vocab_size):
  draw = over_rows(lambda key: sampling.draw(jnp.zeros(vocab_size), key))
  drawn = np.unique(draw(keys(3000)))
  np.testing.assert_array_equal(drawn, np.arange(vocab_size))


def test_a_token_s_place_is_independent_of_its_block():
  size = sampling.BLOCK_SIZE  # as many blocks, as many tokens in each
  draw = over_rows(lambda key: sampling.draw(jnp.zeros(size * size), key))
  blocks, places = np.divmod(draw(keys(2000)), size)
  expected = 2000 / size
  assert abs((blocks == places).sum() - expected) <= 6 * math.sqrt(expected)


@pytest.mark.parametrize(
  'settings',
  [
    dict(temperature=1e-6),
    dict(temperature=1.0, top_k=1),
    dict(temperature=5.0, top_p=1e-9),
    dict(temperature=5.0, min_p=1.0),
  ],
  ids=str,
)
def test_at_its_limits_sampling_is_greedy(settings):
  logits = jnp.asarray(10 * random_logits(64))
  expected = np.argmax(logits, axis=1)
  for decoding in (sampling.Decoding(), sampling.Decoding(**settings)):
    found = over_rows(
      sampling.choose, step=jnp.int32(3), decoding=decoding, eos_id=EOS_ID
    )(logits, jnp.asarray(random_tokens(64)), keys(64))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('settings', [*DRAWS, dict(temperature=0.0)], ids=str)
def test_a_row_s_choice_is_its_own(settings):
  """Alone, among others, or in another order: the same token."""
  decoding = sampling.Decoding(
    **settings, repetition_penalty=1.2, no_repeat_ngram_size=2
  )
  choose = over_rows(
    sampling.choose, step=jnp.int32(9), decoding=decoding, eos_id=EOS_ID
  )
  rows = jnp.asarray(random_logits(8)), jnp.asarray(random_tokens(8)), keys(8)
  together = choose(*rows)
  alone = [choose(*(x[i : i + 1] for x in rows))[0] for i in range(8)]
  np.testing.assert_array_equal(together, alone)
  np.testing.assert_array_equal(choose(*(x[::-1] for x in rows))[::-1], alone)
  np.testing.assert_array_equal(choose(*rows), together)
  if decoding.temperature:
    assert (choose(rows[0], rows[1], keys(8, seed=1)) != together).any()


# --- in generation ---


START_ID, PAD_ID, MAX_DECODE_LEN = 3, 7, 10


def penalized(logits, written, eos_id, decoding):
  """Returns logits with regard to what is written, token by token."""
  logits = np.array(logits)
  for token in set(written):
    factor = decoding.repetition_penalty
    logits[token] *= factor if logits[token] < 0 else 1 / factor
  size = decoding.no_repeat_ngram_size
  if size:
    ngrams = {
      tuple(written[i : i + size]) for i in range(len(written) - size + 1)
    }
    for token in range(len(logits)):
      if (*written[len(written) - size + 1 :], token) in ngrams:
        logits[token] = -np.inf
  if len(written) < decoding.min_decode_len:
    logits[eos_id] = -np.inf
  return logits


def write_without_cache(module, params, batch, eos_id, decoding):
  """Returns greedy answers; all is read again for each token."""
  rows = batch['encoder_segment_ids'].shape[0]
  answers: list[list[int]] = [[] for _ in range(rows)]
  for step in range(MAX_DECODE_LEN):
    inputs = np.full((rows, MAX_DECODE_LEN), PAD_ID, np.int32)
    for row, answer in enumerate(answers):
      inputs[row, : len(answer) + 1] = [START_ID, *answer][:MAX_DECODE_LEN]
    logits = helpers.logits(
      module,
      params,
      {
        **batch,
        'decoder_input_tokens': jnp.asarray(inputs),
        'decoder_segment_ids': jnp.ones_like(inputs),
      },
    )
    for row, answer in enumerate(answers):
      if len(answer) == step and eos_id not in answer:
        scores = penalized(logits[row, step], answer, eos_id, decoding)
        answer.append(int(np.argmax(scores)))
  tokens = np.full((rows, MAX_DECODE_LEN), PAD_ID, np.int32)
  for row, answer in enumerate(answers):
    tokens[row, : len(answer)] = answer
  return tokens


@pytest.mark.parametrize('name', ['t5_1_0', 'llm_to_gpt2-add-foreign'])
def test_generation_penalizes_as_a_loop_without_a_cache(name):
  module = helpers.MODULES[name]
  params, batch = helpers.random_params(module), helpers.batch_for(module)
  write = functools.partial(write_without_cache, module, params, batch)
  eos_id = int(write(-1, sampling.Decoding())[0, 1])
  settings: dict[str, Any] = dict(
    repetition_penalty=1.2, no_repeat_ngram_size=2, min_decode_len=4
  )
  expected = write(eos_id, sampling.Decoding(**settings))
  for name in settings:
    others = {key: settings[key] for key in settings if key != name}
    without = write(eos_id, sampling.Decoding(**others))
    assert (without != expected).any(), f'{name} changes nothing'
  generator = generate.Generator(
    module,
    max_decode_len=MAX_DECODE_LEN,
    ids=strategies.Ids(START_ID, eos_id, PAD_ID),
    decoding=sampling.Decoding(**settings),
  )
  found = generator(generator.prepare(params), batch)
  np.testing.assert_array_equal(found, expected)


# --- settings ---


def unchecked(**settings):
  """Returns settings as gin binds them, which knows nothing of types."""
  decoding = object.__new__(sampling.Decoding)
  for name, value in settings.items():
    object.__setattr__(decoding, name, value)
  decoding.__post_init__()
  return decoding


def test_settings_of_gin_can_be_hashed_and_compared():
  decoding = sampling.Decoding(stop=['\n', 'Q:'], num_beams=4)
  assert decoding.stop == ('\n', 'Q:')
  same = sampling.Decoding(stop=('\n', 'Q:'), num_beams=4)
  assert decoding == same and hash(decoding) == hash(same)
  # Whole numbers are numbers.
  unchecked(temperature=1, top_p=1, min_p=0, length_penalty=-1)
  unchecked(num_beams=4, num_answers=4, early_stopping='never')


@pytest.mark.parametrize(
  'settings, message',
  [
    (dict(temperature=-1), 'temperature=-1: expected a number, 0 (the most'),
    (dict(temperature=1e-9), 'temperature=1e-09: expected a number, 0 '),
    (dict(temperature=math.inf), 'temperature=inf: expected a number'),
    (dict(temperature='1'), "temperature='1': expected a number"),
    (dict(top_k=-1), 'top_k=-1: expected a whole number, at least 0'),
    (dict(top_k=2.5), 'top_k=2.5: expected a whole number'),
    (dict(top_k=True), 'top_k=True: expected a whole number'),
    (dict(top_p=0), 'top_p=0: expected a number above 0, at most 1'),
    (dict(top_p=90), 'top_p=90: expected a number above 0, at most 1'),
    (dict(min_p=-0.1), 'min_p=-0.1: expected a number from 0'),
    (dict(min_p=1.1), 'min_p=1.1: expected a number from 0'),
    (dict(seed=-1), 'seed=-1: expected a whole number from 0 to 2**32 - 1'),
    (dict(seed=2**32), 'seed=4294967296: expected'),
    (dict(repetition_penalty=0), 'repetition_penalty=0: expected'),
    (dict(repetition_penalty=math.nan), 'repetition_penalty=nan: expected'),
    (dict(no_repeat_ngram_size=-1), 'no_repeat_ngram_size=-1: expected'),
    (dict(min_decode_len=-1), 'min_decode_len=-1: expected'),
    (dict(stop='end'), "stop='end': expected a list of non-empty"),
    (dict(stop=['']), "stop=('',): expected a list of non-empty"),
    (dict(stop=[3]), 'stop=(3,): expected a list of non-empty'),
    (dict(num_beams=0), 'num_beams=0: expected a whole number, at least 1'),
    (dict(num_answers=0), 'num_answers=0: expected'),
    (dict(length_penalty=math.inf), 'length_penalty=inf: expected a number'),
    (
      dict(length_penalty_form='wu'),
      "length_penalty_form='wu': expected 'power' or 'gnmt'",
    ),
    (
      dict(early_stopping='always'),
      "early_stopping='always': expected True, False or 'never'",
    ),
    (dict(early_stopping=1), 'early_stopping=1: expected True, False or'),
    (dict(log_probs='yes'), "log_probs='yes': expected True or False"),
    (dict(draft_len=-1), 'draft_len=-1: expected a whole number of tokens'),
    (
      dict(num_beams=2, num_answers=3),
      'num_answers=3 is more than Decoding.num_beams=2: the answers are the '
      'best beams. Set Decoding.num_beams to 3 or more.',
    ),
    (
      dict(num_beams=4, temperature=0.5),
      'num_beams=4 and Decoding.temperature=0.5: beam search does not '
      'sample. Set Decoding.num_beams to 1 to sample, or '
      'Decoding.temperature to 0.',
    ),
  ],
  ids=str,
)
def test_settings_that_cannot_be_are_refused(settings, message):
  with pytest.raises(ValueError, match='^Decoding.' + re.escape(message)):
    unchecked(**settings)
