# SPDX-License-Identifier: Apache-2.0
"""Keys of a batch, with the shapes and dtypes of its arrays.

Prompt arrays have the shape [batch, prompt length], answer arrays [batch,
answer length]:

    encoder_input_tokens   the prompt, in the LLM's vocabulary
    encoder_segment_ids    from 1; 0 is padding
    decoder_input_tokens   start token, then the targets but the last
    decoder_target_tokens  the answer and its EOS, in the SLM's vocabulary
    decoder_segment_ids    from 1; 0 is padding
    decoder_loss_weights   1.0, and 0.0 for padding

Segment ids number the packed examples of a row from 1. Optional keys are
documented with the code that makes them: controls in
`evaluation/seqio_evaluator.py`, answers that continue their prompt in
`data.continuing`, cached LLM states in `stored_states.py`.
"""

import jax
import numpy as np

# For each key, the task feature that gives its length, and its dtype.
KEYS = {
  'encoder_input_tokens': ('inputs', np.int32),
  'encoder_segment_ids': ('inputs', np.int32),
  'decoder_input_tokens': ('targets', np.int32),
  'decoder_target_tokens': ('targets', np.int32),
  'decoder_segment_ids': ('targets', np.int32),
  'decoder_loss_weights': ('targets', np.float32),
}


def example_batch(
  batch_size: int,
  prompt_length: int,
  answer_length: int,
  sharding: jax.sharding.Sharding | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes and dtypes of a training batch, for AOT compilation.

  Args:
    batch_size: rows.
    prompt_length: tokens per prompt, padding included.
    answer_length: tokens per answer, padding included.
    sharding: of every array; None leaves it unspecified.
  """
  lengths = {'inputs': prompt_length, 'targets': answer_length}
  return {
    key: jax.ShapeDtypeStruct(
      (batch_size, lengths[feature]), dtype, sharding=sharding
    )
    for key, (feature, dtype) in KEYS.items()
  }
