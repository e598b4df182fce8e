# SPDX-License-Identifier: Apache-2.0
"""Laws of packing: every prompt once, in few shapes, in bounded memory."""

import itertools
import math
import random

import pytest

from l2s_jax.inference import length_buckets

ANSWER_LENGTH = 24


def make(prompt_length=128, batch_size=32, num_shards=4):
  return length_buckets.Buckets(
    prompt_length=prompt_length,
    answer_length=ANSWER_LENGTH,
    batch_size=batch_size,
    num_shards=num_shards,
  )


def test_lengths_grow_by_half_at_most_and_end_at_the_longest():
  assert length_buckets.lengths(128) == [16, 24, 32, 48, 64, 96, 128]
  assert length_buckets.lengths(10) == [10]
  assert length_buckets.lengths(17) == [16, 17]
  for longest in range(1, 600):
    found = length_buckets.lengths(longest)
    assert found == sorted(set(found)) and found[-1] == longest
    for shorter, longer in itertools.pairwise(found):
      assert longer <= 1.5 * shorter


@pytest.mark.parametrize('prompt_length', [7, 100, 128, 512])
@pytest.mark.parametrize('batch_size,num_shards', [(1, 1), (5, 1), (24, 8)])
def test_shapes_are_few_and_no_larger_than_the_largest(
  prompt_length, batch_size, num_shards
):
  packer = make(prompt_length, batch_size, num_shards)
  most = batch_size * (prompt_length + ANSWER_LENGTH)
  shapes = set()
  for num_tokens in range(1, prompt_length + 1):
    length = packer.length(num_tokens)
    full = packer.most_rows(length)
    assert num_tokens <= length <= prompt_length
    assert full >= batch_size
    for num_prompts in range(1, full + 1):
      rows, padded = packer.shape([num_tokens] * num_prompts)
      assert padded == length
      assert num_prompts <= rows and rows % num_shards == 0
      assert rows < 2 * num_prompts + num_shards
      assert rows * (length + ANSWER_LENGTH) <= most
      shapes.add((rows, length))
  sizes = math.log2(2 * packer.most_rows(packer.length(1)))
  assert len(shapes) <= len(length_buckets.lengths(prompt_length)) * (sizes + 1)


def test_every_prompt_is_in_one_batch_and_one_batch_alone_is_not_full():
  rng = random.Random(0)
  packer = make()
  for size in (0, 1, 31, 500):
    sizes = [(rng.randint(1, 128), ANSWER_LENGTH) for _ in range(size)]
    batches = packer.pack(sizes)
    assert sorted(i for batch in batches for i in batch) == list(range(size))
    for batch in batches[:-1]:
      length = packer.length(max(sizes[i][0] for i in batch))
      assert len(batch) == packer.most_rows(length)


def test_padding_is_little():
  rng = random.Random(0)
  packer = make()
  sizes = [(rng.randint(1, 128), ANSWER_LENGTH) for _ in range(2000)]
  num_slots = sum(
    math.prod(packer.shape([sizes[i][0] for i in batch]))
    for batch in packer.pack(sizes)
  )
  num_tokens = sum(num_tokens for num_tokens, _ in sizes)
  assert num_slots < 1.25 * num_tokens < 2000 * 128


def test_a_shape_that_was_used_goes_over_a_new_one():
  packer = make()
  full = packer.most_rows(16)
  assert packer.shape([12] * full) == (full, 16)
  assert packer.shape([9]) == (full, 16)
  assert packer.shape([17]) == (4, 24)


def test_answers_that_may_be_as_long_share_a_batch():
  sizes = [(10, n % 2 * 8 + 1) for n in range(200)]
  batches = make().pack(sizes)
  mixed = [batch for batch in batches if len({sizes[i] for i in batch}) > 1]
  assert len(batches) > 2 and len(mixed) <= 1
