# SPDX-License-Identifier: Apache-2.0
"""Batches: dicts of numpy arrays on the host, keyed as the models read them.

`encoder_input_tokens` and `encoder_segment_ids` are [batch, prompt length],
`decoder_input_tokens`, `decoder_target_tokens`, `decoder_segment_ids` and
`decoder_loss_weights` (float32, the others int32) [batch, answer length]. A
segment id of 0 is padding; where a row holds several examples (`packing.py`),
they are numbered from 1. A short batch is filled up with copies of its last
row at weight 0, never with empty rows: attention would have nothing to attend
to, and a decode loop would wait for rows that never write an EOS.

Needs no TensorFlow. Putting batches on devices is not done here.
"""

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Int64

from l2s_jax.data import packing

Batch = dict[str, Int32[np.ndarray, '...'] | Float32[np.ndarray, '...']]
# Lengths of prompt and answer, in tokens, as gin has them.
LengthBuckets = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Part:
  """The rows of a batch that a process has made, and what the whole batch is.

  Attributes:
    batch: these rows.
    rows: their places in the whole batch, growing.
    num_rows: of the whole batch.
    num_examples: of the whole batch.
    num_prompt_tokens: of the whole batch, padding excluded.
    position: where the data go on behind it, as JSON has it; None: after as
      many rows as there were.
  """

  batch: Batch
  rows: Int64[np.ndarray, ' rows']
  num_rows: int
  num_examples: int
  num_prompt_tokens: int
  position: Mapping[str, Any] | None = None


def whole(batch: Batch) -> Part:
  """Returns a batch of which a process has made all rows."""
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
  """Returns the encoder's half of a batch.

  Args:
    prompt_ids: EOS included; beyond `length` they are cut, which the caller
      counts if it matters.
    length: of every row, in tokens.
    pad_id: of the prompts' vocabulary.
    batch_size: rows to fill up to; None: as many as there are prompts.

  Raises:
    ValueError: if there are no prompts, more than `batch_size`, or an empty
      one.
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
  """Returns a batch whose answers go on where the prompts end.

  So a decoder-only model writes that nobody has trained on prompts and answers:
  what it reads is the prompt as its tokenizer gives it, without an EOS. The
  last token of each is not in the prefix but is the first that is read
  afterwards, `first_tokens` (-1 for rows without a prompt); in a batch for the
  loss it stands in the place of the start token.

      encoder_input_tokens  [[7, 8, 1, 0]]  prefix_ids (2,), eos_ids (1,)
      -> [[2, 7, 0, 0]], first_tokens [8]

  Args:
    batch: not packed.
    prefix_ids: that the tokenizer puts in front of a text: BOS, or nothing.
    eos_ids: of which one ends a prompt that was not cut.
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
  """Fills a batch up to `batch_size` with its last row, at loss weight 0.

  Raises:
    ValueError: if it has no rows, or more than `batch_size`.
  """
  num_rows = len(next(iter(batch.values())))
  if num_rows == batch_size or batch_size is None:
    return batch
  if not 0 < num_rows < batch_size:
    raise ValueError(
      f'{num_rows} rows do not make a batch of {batch_size}; give at least '
      'one and at most batch_size.'
    )
  rows = np.minimum(np.arange(batch_size), num_rows - 1)
  padded = {key: value[rows] for key, value in batch.items()}
  if 'decoder_loss_weights' in padded:
    padded['decoder_loss_weights'][num_rows:] = 0
  return padded


def _cut(
  sequences: Sequence[Sequence[int]], length: int
) -> list[Sequence[int]]:
  """Returns the first `length` tokens of each, which must have some."""
  if not len(sequences):
    raise ValueError('no sequences to make a batch of.')
  for row, ids in enumerate(sequences):
    if not len(ids):
      raise ValueError(
        f'sequence {row} is empty; append the EOS before batching.'
      )
  return [ids[:length] for ids in sequences]


def control_partners(prompts: Sequence[Sequence[int]]) -> list[int]:
  """Returns for each prompt the index of another whose tokens differ.

  Prompts are sorted by length, then index; each takes the next that differs,
  and the last ones wrap around. For prompts `[[5, 1], [7, 8, 1], [6, 1],
  [5, 1]]` the order is 0, 2, 3, 1 and the partners are `[2, 0, 3, 1]`. Computed
  over a whole split, so that batch size and number of hosts change nothing.

  Raises:
    ValueError: if no two prompts differ.
  """
  texts = [tuple(map(int, prompt)) for prompt in prompts]
  if len(set(texts)) < 2:
    raise ValueError(
      f"the control 'other' needs two different prompts; all "
      f'{len(texts)} are the same.'
    )
  order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
  partners = [-1] * len(texts)
  # Backwards, and around twice: whoever comes after an equal prompt has
  # already found the partner of both.
  following = order[0]
  for index in itertools.chain(reversed(order), reversed(order)):
    same = texts[following] == texts[index]
    partners[index] = partners[following] if same else following
    following = index
  return partners


def lengths(batch: Batch) -> tuple[int, int]:
  """Returns the lengths of a batch's prompts and answers, with padding."""
  prompts, answers = (
    batch[f'{half}_input_tokens'].shape[1] for half in ('encoder', 'decoder')
  )
  return prompts, answers


def bucket_lengths(
  task_feature_lengths: Mapping[str, int], length_buckets: LengthBuckets
) -> list[tuple[int, int]]:
  """Returns the lengths, of prompt and answer, that batches may have.

  Args:
    task_feature_lengths: `inputs` and `targets`, in tokens: the last bucket.
    length_buckets: the others, such as `((16, 24), (32, 40))`. An example goes
      to the first that has room for both its prompt and its answer.

  Raises:
    ValueError: if they do not grow.
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
      f'LENGTH_BUCKETS={length_buckets!r}: expected pairs of lengths, in '
      'tokens of prompt and answer, none shorter than those before it and all '
      f'below TASK_FEATURE_LENGTHS, {last}; such as ((16, 24), (32, 40)).'
    )
  return [(prompt, answer) for prompt, answer in buckets]


def check_lengths(task_feature_lengths: Mapping[str, int]) -> None:
  """Refuses lengths that are off.

  Raises:
    ValueError: saying what TASK_FEATURE_LENGTHS should have.
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
