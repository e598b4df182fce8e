# SPDX-License-Identifier: Apache-2.0
"""Laws of the order of examples: permutations and shares, anywhere at once."""

import time

import numpy as np
import pytest

from l2s_jax.data.cached import order

# What `permute` and `at` returned when this was written.
GOLDEN = [3, 9, 6, 5, 2, 7, 1, 8, 4, 0]
GOLDEN_MIXTURE = [[0, 1, 0, 0, 1, 1, 0, 0], [4, 2, 3, 4, 0, 1, 2, 3]]


def places(size):
  return np.arange(size, dtype=np.int64)


@pytest.mark.parametrize('size', [1, 2, 3, 7, 64, 1000, 4096, 4097])
def test_each_index_is_there_once(size):
  for epoch in range(3):
    found = order.permute(places(size), size, order.key(0, epoch))
    assert sorted(found.tolist()) == list(range(size))


def test_an_index_goes_where_it_goes_alone():
  """Whatever other indices are asked for beside it."""
  together = order.permute(places(1000), 1000, order.key(5))
  for index in (0, 17, 999):
    alone = order.permute(np.array([index]), 1000, order.key(5))
    assert alone.tolist() == [together[index]]


def test_permutations_look_random():
  """By fixed points, neighbours, runs and where an index goes."""
  size, num_keys = 1000, 400
  found = np.stack(
    [
      order.permute(places(size), size, order.key(1, n))
      for n in range(num_keys)
    ]
  )
  # One fixed point on average, of variance one.
  fixed = (found == places(size)).sum(axis=1)
  assert abs(fixed.mean() - 1) < 5 / np.sqrt(num_keys)
  # Neighbours are apart as two random numbers are, a third of the size.
  apart = np.abs(np.diff(found, axis=1)).mean() / size
  assert abs(apart - 1 / 3) < 0.005
  # Halves, of which an index goes to either, whichever half it is of.
  stays = ((found < size // 2) == (places(size) < size // 2)).mean()
  assert abs(stays - 0.5) < 0.005
  # Chi-square of the first index's places, in tenths: 9 degrees of freedom.
  counts = np.bincount(found[:, 0] * 10 // size, minlength=10)
  assert ((counts - num_keys / 10) ** 2).sum() / (num_keys / 10) < 28
  # Epochs are independent of one another.
  assert abs(np.corrcoef(found[0], found[1])[0, 1]) < 0.15


def test_the_orders_of_these_seeds_stay_what_they_are():
  """A run goes on with another version of ours, NumPy or Python."""
  found = order.permute(places(10), 10, order.key(0, 0))
  assert found.tolist() == GOLDEN
  mixed = order.Order({'a': 5, 'b': 3}, {'a': 2.0, 'b': 1.0}, seed=1)
  tasks, examples = mixed.at(2**40, 2**40 + 8)
  assert [tasks.tolist(), examples.tolist()] == GOLDEN_MIXTURE


def test_an_epoch_has_each_example_once_in_an_order_of_its_own():
  one = order.Order({'a': 50}, None, seed=3)
  tasks, examples = one.at(0, 150)
  assert not tasks.any()
  epochs = examples.reshape(3, 50)
  assert (np.sort(epochs, axis=1) == places(50)).all()
  assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
  other = order.Order({'a': 50}, None, seed=4).at(0, 50)[1]
  assert (other != epochs[0]).any()


RATES = [
  (2.0, 1.0, 0.5),
  (1e-6, 1.0, 1.0),
  (0.3, 0.3, 0.4),
  (1e9, 3.0, 1.0),
  (1.0,),
]


@pytest.mark.parametrize('rates', RATES)
@pytest.mark.parametrize('start', [0, 10**9, 3 * 10**15])
def test_tasks_have_their_shares_and_each_number_once(rates, start):
  start = start // 1024 * 1024
  tasks, numbers = order.interleave(start + places(64 * 1024), rates, seed=0)
  for task, rate in enumerate(rates):
    own = numbers[tasks == task]
    share = rate / sum(rates) * len(tasks)
    # 2**-30 is how exact a rate is.
    assert abs(len(own) - share) <= len(rates) + len(tasks) * 2**-29
    # Consecutive numbers, without a gap or one twice.
    if len(own):
      assert sorted(own.tolist()) == list(
        range(own.min(), own.min() + len(own))
      )


def test_a_mixture_is_no_pattern_and_starts_anywhere():
  mixed = order.Order({'a': 500, 'b': 70}, {'a': 1.0, 'b': 1.0}, seed=0)
  tasks, examples = mixed.at(0, 5000)
  # As often the same task again as not: 0.5, with a deviation of 0.007.
  assert abs((tasks[1:] == tasks[:-1]).mean() - 0.5) < 0.04
  for start, stop in ((1, 2), (1000, 1100), (4999, 5000)):
    found = mixed.at(start, stop)
    np.testing.assert_array_equal(found[0], tasks[start:stop])
    np.testing.assert_array_equal(found[1], examples[start:stop])
  # All of a task, before any comes a third time.
  of_b = examples[tasks == 1]
  counts = np.bincount(of_b[: 70 * 5], minlength=70)
  assert 1 <= counts.min() and counts.max() <= 9


def test_a_billion_rows_are_passed_over_at_once():
  mixed = order.Order({'a': 10**9, 'b': 10**6}, {'a': 3.0, 'b': 1.0}, seed=0)
  start_secs = time.perf_counter()
  mixed.at(10**9, 10**9 + 4096)
  assert time.perf_counter() - start_secs < 0.5


def test_what_has_no_examples_or_no_rates_is_refused():
  with pytest.raises(ValueError, match="task 'b' has no examples"):
    order.Order({'a': 3, 'b': 0}, {'a': 1.0, 'b': 1.0}, seed=0)
  with pytest.raises(ValueError, match='a, b have no rates'):
    order.Order({'a': 3, 'b': 1}, None, seed=0)
