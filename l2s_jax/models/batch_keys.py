# SPDX-License-Identifier: Apache-2.0
"""What a batch holds: its keys, and the shapes and types of its arrays.

A prompt's arrays are [rows, prompt length], an answer's [rows, answer length]:

    encoder_input_tokens   the prompt, in the LLM's vocabulary
    encoder_segment_ids    from 1; 0 is padding
    decoder_input_tokens   start token, then the targets but the last
    decoder_target_tokens  the answer and its EOS, in the SLM's vocabulary
    decoder_segment_ids    from 1; 0 is padding
    decoder_loss_weights   1.0, and 0.0 for padding

Segment ids number the examples of a row. The keys of controls and of answers
that go on where a prompt ends are optional and stand where they are made
(`evaluation/seqio_evaluator.py`, `data.continuing`), those of the LLM's states
from a cache in `stored_states.py`.
"""

import jax
import numpy as np

# By key: which of the task's features gives the length, and the type.
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
  """Returns the shapes of a training batch, and where its rows are."""
  lengths = {'inputs': prompt_length, 'targets': answer_length}
  return {
    key: jax.ShapeDtypeStruct(
      (batch_size, lengths[feature]), dtype, sharding=sharding
    )
    for key, (feature, dtype) in KEYS.items()
  }
