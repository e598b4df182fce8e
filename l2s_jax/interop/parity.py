# SPDX-License-Identifier: Apache-2.0
"""Compares logits with those of the package transformers.

Used by `convert --verify` and by tests. torch and transformers are imported
inside functions.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from l2s_jax.models import l2s
from l2s_jax.weights import source as source_lib

_PROMPT_LENGTHS, _ANSWER_LENGTHS = (11, 1, 6), (7, 5, 3)


def compare(folder: pathlib.Path, source: source_lib.Source) -> float:
  """Returns the largest difference of logits, relative to the largest logit.

  Both models are in memory in float32, and read the same random tokens in rows
  of different lengths.

  Args:
    folder: Hugging Face folder.
    source: the same weights, in any format.
  """
  generator = np.random.default_rng(0)
  vocab_size = source.config.vocab_size
  prompts, answers = (
    [generator.integers(vocab_size, size=length) for length in lengths]
    for lengths in (_PROMPT_LENGTHS, _ANSWER_LENGTHS)
  )
  ours = _logits(source, prompts, answers)
  theirs = _logits_of_transformers(
    folder, prompts, answers, source.config.is_encoder_decoder
  )
  scale = max(np.abs(row).max() for row in theirs)
  return float(
    max(
      np.abs(a[: len(b)] - b).max() for a, b in zip(ours, theirs, strict=True)
    )
    / scale
  )


def _logits(
  source: source_lib.Source,
  prompts: list[np.ndarray],
  answers: list[np.ndarray],
) -> np.ndarray:
  """Returns the logits of a padded batch: [row, answer position, vocab]."""
  batch = {}
  for side, rows in (('encoder', prompts), ('decoder', answers)):
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    segment_ids = np.zeros_like(tokens)
    for i, row in enumerate(rows):
      tokens[i, : len(row)], segment_ids[i, : len(row)] = row, 1
    batch[f'{side}_input_tokens'] = jnp.asarray(tokens)
    batch[f'{side}_segment_ids'] = jnp.asarray(segment_ids)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = {
    path: jax.ShapeDtypeStruct(shape.shape, jnp.float32)
    for path, shape in source.shapes().items()
  }
  params, _ = source_lib.load(
    source,
    traverse_util.unflatten_dict(shapes),
    traverse_util.unflatten_dict(dict.fromkeys(shapes, device)),
  )
  model = l2s.build(source.config)
  logits = model.apply({'params': params}, batch, deterministic=True)
  return np.asarray(logits)


def _logits_of_transformers(
  folder: pathlib.Path,
  prompts: list[np.ndarray],
  answers: list[np.ndarray],
  is_encoder_decoder: bool,
) -> list[np.ndarray]:
  """Returns transformers' logits of unpadded rows, [answer position, vocab]."""
  import torch
  import transformers

  kind = (
    transformers.AutoModelForSeq2SeqLM
    if is_encoder_decoder
    else transformers.AutoModelForCausalLM
  )
  model = kind.from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager'
  ).eval()
  rows = []
  for prompt, answer in zip(prompts, answers, strict=True):
    with torch.no_grad():
      if is_encoder_decoder:
        logits = model(
          torch.tensor(prompt)[None],
          decoder_input_ids=torch.tensor(answer)[None],
        ).logits
      else:
        both = np.concatenate([prompt, answer])
        logits = model(torch.tensor(both)[None]).logits[:, len(prompt) :]
    if model.config.model_type == 'umt5':
      # transformers 5 scales umT5's logits as if its embeddings were tied. They
      # are not, and T5X does not scale them, as a golden test shows.
      logits *= model.config.d_model**0.5
    rows.append(logits[0].numpy())
  return rows
