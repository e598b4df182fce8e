# SPDX-License-Identifier: Apache-2.0
"""Batches: dicts of NumPy arrays on the host, under the model's batch keys.

`encoder_input_tokens` and `encoder_segment_ids` are [batch, prompt length];
`decoder_input_tokens`, `decoder_target_tokens`, `decoder_segment_ids` and
`decoder_loss_weights` are [batch, answer length]. The loss weights are float32,
all other arrays int32. Segment id 0 is padding; the examples of a packed row
(`packing.py`) are numbered from 1. A short batch is padded with copies of its
last row at loss weight 0. Empty rows would leave attention without a key, and
would keep the decode loop running because they never generate an EOS.

This module needs no TensorFlow and places nothing on devices.
"""

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Int64

from l2s_jax.data import packing

Batch = dict[str, Int32[np.ndarray, '...'] | Float32[np.ndarray, '...']]
# Pairs of prompt and answer lengths, in tokens, as bound by gin.
LengthBuckets = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Part:
  """One process's rows of a batch, with the metadata of the whole batch.

  Attributes:
    batch: the rows of this process.
    rows: indices of these rows in the whole batch, ascending.
    num_rows: number of rows of the whole batch.
    num_examples: number of examples of the whole batch.
    num_prompt_tokens: number of prompt tokens of the whole batch, without
      padding.
    position: JSON-serializable data position after the batch, for checkpoints.
      None: the position is the number of rows.
  """

  batch: Batch
  rows: Int64[np.ndarray, ' rows']
  num_rows: int
  num_examples: int
  num_prompt_tokens: int
  position: Mapping[str, Any] | None = None


def whole(batch: Batch) -> Part:
  """Wraps a batch as a `Part` with all of its rows."""
  num_rows = len(batch['encoder_segment_ids'])
  return Part(
    batch,
    np.arange(num_rows, dtype=np.int64),
    num_rows,
    num_examples=int(batch['decoder_segment_ids'].max(axis=1).sum()),
    num_prompt_tokens=int((batch['encoder_segment_ids'] > 0).sum()),
  )


def prompt_batch(
  prompt_ids: Sequence[Sequence[int]],
  *,
  length: int,
  pad_id: int,
  batch_size: int | None = None,
) -> Batch:
  """Returns the encoder arrays of a batch.

  Args:
    prompt_ids: token ids of each prompt with EOS. Prompts longer than `length`
      are cut; the caller counts the cuts.
    length: length of each row, in tokens.
    pad_id: pad id of the prompt vocabulary.
    batch_size: number of rows after padding. None: the number of prompts.

  Raises:
    ValueError: if there are no prompts, more than `batch_size`, or an empty
      prompt.
  """
  tokens, segment_ids = packing.fill(
    _cut(prompt_ids, length),
    range(len(prompt_ids)),
    length=length,
    pad_id=pad_id,
  )
  return pad_rows(
    {'encoder_input_tokens': tokens, 'encoder_segment_ids': segment_ids},
    batch_size,
  )


def continuing(
  batch: Batch, prefix_ids: Sequence[int], eos_ids: Collection[int]
) -> Batch:
  """Returns a batch with the answers as direct continuations of the prompts.

  No EOS stands between them. A decoder-only model that was not trained on pairs
  of prompt and answer reads its tokenizer's prefix, then the prompt without
  EOS. The last of these tokens is taken out of the prompt and returned in
  `first_tokens`, the input of the first decode step (-1 for rows without a
  prompt). In batches with a loss it replaces the start token.

      encoder_input_tokens  [[7, 8, 1, 0]]  prefix_ids (2,), eos_ids (1,)
      -> [[2, 7, 0, 0]], first_tokens [8]

  Args:
    batch: batch with one example per row.
    prefix_ids: tokens the tokenizer prepends to a text: BOS, or none.
    eos_ids: EOS ids. A prompt that was not cut ends with one of them.
  """
  tokens = batch['encoder_input_tokens']
  num_rows, length = tokens.shape
  prompts: list[list[int]] = []
  first_tokens = np.full((num_rows,), -1, np.int32)
  for row, size in enumerate((batch['encoder_segment_ids'] > 0).sum(axis=1)):
    ids = tokens[row, :size].tolist()
    if ids and ids[-1] in eos_ids:
      ids.pop()
    if size:
      ids = [*prefix_ids, *ids] or [tokens[row, 0].item()]
      first_tokens[row] = ids.pop()
    prompts.append(ids[:length])
  filled, segment_ids = packing.fill(
    prompts, range(num_rows), length=length, pad_id=0
  )
  result = dict(batch) | {
    'encoder_input_tokens': filled,
    'encoder_segment_ids': segment_ids,
  }
  if 'decoder_input_tokens' in batch:
    before = batch['decoder_input_tokens'].copy()
    before[:, 0] = np.where(first_tokens >= 0, first_tokens, before[:, 0])
    result['decoder_input_tokens'] = before
  return result | {'first_tokens': first_tokens}


def pad_rows(batch: Batch, batch_size: int | None) -> Batch:
  """Pads a batch to `batch_size` rows with copies of its last row.

  The copies have loss weight 0.

  Raises:
    ValueError: if the batch has no rows, or more than `batch_size`.
  """
  num_rows = len(next(iter(batch.values())))
  if num_rows == batch_size or batch_size is None:
    return batch
  if not 0 < num_rows < batch_size:
    raise ValueError(
      f'{num_rows} rows do not fit into a batch of {batch_size}; expected 1 to '
      f'{batch_size} rows.'
    )
  rows = np.minimum(np.arange(batch_size), num_rows - 1)
  padded = {key: value[rows] for key, value in batch.items()}
  if 'decoder_loss_weights' in padded:
    padded['decoder_loss_weights'][num_rows:] = 0
  return padded


def _cut(
  sequences: Sequence[Sequence[int]], length: int
) -> list[Sequence[int]]:
  """Cuts sequences to `length` tokens; refuses empty ones."""
  if not len(sequences):
    raise ValueError('no sequences to batch; expected at least one.')
  for row, ids in enumerate(sequences):
    if not len(ids):
      raise ValueError(
        f'sequence {row} is empty; append the EOS before batching.'
      )
  return [ids[:length] for ids in sequences]


def control_partners(prompts: Sequence[Sequence[int]]) -> list[int]:
  """Returns for each prompt the index of a different prompt.

  Prompts are sorted by length, then index. The partner of a prompt is the next
  one with other tokens, cyclically. For prompts `[[5, 1], [7, 8, 1], [6, 1],
  [5, 1]]` the order is 0, 2, 3, 1 and the partners are `[2, 0, 3, 1]`. Partners
  are computed over a whole split, so they do not depend on batch size or number
  of hosts.

  Raises:
    ValueError: if all prompts are equal.
  """
  texts = [tuple(map(int, prompt)) for prompt in prompts]
  if len(set(texts)) < 2:
    raise ValueError(
      f"the control 'other' needs two different prompts; all "
      f'{len(texts)} are the same.'
    )
  order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
  partners = [-1] * len(texts)
  # Backwards, twice around: the successor of an equal prompt already has the
  # partner of both.
  following = order[0]
  for index in itertools.chain(reversed(order), reversed(order)):
    same = texts[following] == texts[index]
    partners[index] = partners[following] if same else following
    following = index
  return partners


def lengths(batch: Batch) -> tuple[int, int]:
  """Returns the padded lengths of a batch's prompts and answers."""
  prompts, answers = (
    batch[f'{half}_input_tokens'].shape[1] for half in ('encoder', 'decoder')
  )
  return prompts, answers


def bucket_lengths(
  task_feature_lengths: Mapping[str, int], length_buckets: LengthBuckets
) -> list[tuple[int, int]]:
  """Returns the (prompt, answer) lengths of all buckets, in ascending order.

  Args:
    task_feature_lengths: lengths of `inputs` and `targets`, in tokens: the last
      bucket.
    length_buckets: the shorter buckets, such as `((16, 24), (32, 40))`. An
      example belongs to the first bucket with room for both its prompt and its
      answer.

  Raises:
    ValueError: if the lengths are not positive or do not increase.
  """
  last = task_feature_lengths['inputs'], task_feature_lengths['targets']
  buckets = [*length_buckets, last]
  are_lengths = all(
    len(bucket) == 2
    and all(isinstance(length, int) and length > 0 for length in bucket)
    for bucket in buckets
  )
  if not are_lengths or any(
    shorter == longer or shorter[0] > longer[0] or shorter[1] > longer[1]
    for shorter, longer in itertools.pairwise(buckets)
  ):
    raise ValueError(
      f'LENGTH_BUCKETS={length_buckets!r}: expected pairs of a prompt length '
      'and an answer length in tokens, in increasing order and below '
      f'TASK_FEATURE_LENGTHS, {last}, such as ((16, 24), (32, 40)).'
    )
  return [(prompt, answer) for prompt, answer in buckets]


def check_lengths(task_feature_lengths: Mapping[str, int]) -> None:
  """Validates TASK_FEATURE_LENGTHS.

  Raises:
    ValueError: if the keys are not `inputs` and `targets`, or a length is not a
      positive number of tokens.
  """
  if set(task_feature_lengths) != {'inputs', 'targets'}:
    raise ValueError(
      f'TASK_FEATURE_LENGTHS has {", ".join(task_feature_lengths)}; expected '
      'inputs and targets, in tokens.'
    )
  for name, length in task_feature_lengths.items():
    if not isinstance(length, int) or length < 1:
      raise ValueError(
        f'TASK_FEATURE_LENGTHS has {name}={length!r}; expected a positive '
        'number of tokens.'
      )
