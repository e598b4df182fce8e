# SPDX-License-Identifier: Apache-2.0
"""Losses as sums with their weights, so that any split adds up exactly."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_cross_entropy(
  logits: Float[Array, 'batch length vocab'],
  targets: Int[Array, 'batch length'],
  weights: Float[Array, 'batch length'],
) -> tuple[Float[Array, ''], dict[str, Float[Array, '']]]:
  """Returns the summed cross-entropy in nats, and the sums to report.

  Args:
    logits: float32, of the answer's vocabulary.
    targets: ids to predict; anything where the weight is 0.
    weights: 1 for a target token, 0 for padding.

  Returns:
    The sum, and 'loss' (the same sum), 'loss_weight' (target tokens) and
    'num_correct' (targets that no other token is more likely than).
  """
  # A comparison summed over the vocabulary, not a gather: it stays local
  # where the vocabulary is sharded, and fuses.
  is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
  target_logits = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
  nats = jax.nn.logsumexp(logits, axis=-1) - target_logits
  # Not an argmax: XLA:CPU takes ten times as long for it as for a maximum.
  correct = target_logits >= jnp.max(logits, axis=-1)
  loss = jnp.sum(nats * weights)
  return loss, {
    'loss': loss,
    'loss_weight': jnp.sum(weights),
    'num_correct': jnp.sum(correct * weights),
  }
