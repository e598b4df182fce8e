# SPDX-License-Identifier: Apache-2.0
"""Losses as sums with their weights, exact over microbatches and hosts."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_cross_entropy(
  logits: Float[Array, 'batch length vocab'],
  targets: Int[Array, 'batch length'],
  weights: Float[Array, 'batch length'],
  *,
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
) -> tuple[Float[Array, ''], dict[str, Float[Array, '']]]:
  """Returns the summed loss to differentiate, and sums to report.

  Args:
    logits: float32, over the answer's vocabulary.
    targets: token ids to predict; ignored where the weight is 0.
    weights: 1 for a target token, 0 for padding.
    label_smoothing: probability mass moved from the target to all other ids, in
      equal parts. The entropy of these soft targets is subtracted, so that the
      minimum of the loss is 0.
    z_loss: factor of the squared log of the softmax's denominator, which is
      added to the loss; keeps the logits near log-probabilities.

  Returns:
    The sum over tokens of (smoothed) cross-entropy and z-loss, in nats; and a
    dict of sums: 'loss' (cross-entropy without smoothing and z-loss, comparable
    across settings), 'z_loss' (the term added), 'loss_weight' (number of target
    tokens) and 'num_correct' (targets with the largest logit, ties included).

  Raises:
    ValueError: for a `label_smoothing` outside [0, 1).

  Source: smoothing and z-loss are those of t5x/losses.py.
  """
  if not 0 <= label_smoothing < 1:
    raise ValueError(
      f'label_smoothing={label_smoothing}: expected a probability below 1.'
    )
  # A masked sum over the vocabulary, not a gather: it stays local where the
  # vocabulary is sharded, and XLA fuses it.
  is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
  target_logits = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  nats = log_z - target_logits
  # Not an argmax, which is ten times slower than a maximum on XLA:CPU.
  correct = target_logits >= jnp.max(logits, axis=-1)
  loss = total = jnp.sum(nats * weights)
  if label_smoothing:
    smoothed = _smoothed(logits, target_logits, log_z, label_smoothing)
    total = jnp.sum(smoothed * weights)
  added = z_loss * jnp.sum(jnp.square(log_z) * weights)
  return total + added, {
    'loss': loss,
    'z_loss': added,
    'loss_weight': jnp.sum(weights),
    'num_correct': jnp.sum(correct * weights),
  }


def _smoothed(
  logits: Float[Array, 'batch length vocab'],
  target_logits: Float[Array, 'batch length'],
  log_z: Float[Array, 'batch length'],
  label_smoothing: float,
) -> Float[Array, 'batch length']:
  """Returns the KL divergence of the softmax from soft targets, in nats."""
  num_others = logits.shape[-1] - 1
  on, off = 1 - label_smoothing, label_smoothing / num_others
  entropy = -on * math.log(on) - num_others * off * math.log(off)
  # The soft targets sum to 1, so log_z has the factor 1, and their one-hot
  # table is never materialised.
  expected_logit = (on - off) * target_logits + off * jnp.sum(logits, axis=-1)
  return log_z - expected_logit - entropy


def divergence(
  logits: Float[Array, 'batch length vocab'],
  teacher_logits: Float[Array, 'batch length teacher_vocab'],
  weights: Float[Array, 'batch length'],
  *,
  interpolation: float = 0.0,
  temperature: float = 1.0,
) -> Float[Array, '']:
  """Returns the distillation loss of a student, summed over tokens, in nats.

  With P the teacher's distribution, Q the student's, b the interpolation and
  M = b P + (1 - b) Q, the loss of a token is

      KL(P || M) / (1 - b) + KL(Q || M) / b

  Its limits are KL(P || Q) at b = 0 and KL(Q || P) at b = 1. It is the
  generalised Jensen-Shannon divergence b KL(P || M) + (1 - b) KL(Q || M),
  divided by b (1 - b): the loss does not vanish at either end, and gradients
  keep their scale for all b. At b = 1/2 it is four times the Jensen-Shannon
  divergence.

  The two embedding tables may have different numbers of rows for one
  vocabulary. P and Q are then renormalised over the shared ids, and -log of the
  student's probability of the shared ids is added. At b = 0 this equals
  KL(P || Q) over the student's whole table, with P = 0 for the teacher's
  missing ids.

  Args:
    logits: of the student, float32.
    teacher_logits: of the teacher, float32.
    weights: 1 for a target token, 0 for padding.
    interpolation: b, from 0 to 1.
    temperature: divides the logits of both.

  Source: Agarwal et al. 2024 (arXiv:2306.13649), section 3.
  """
  num_ids = min(logits.shape[-1], teacher_logits.shape[-1])
  logits, teacher_logits = logits / temperature, teacher_logits / temperature
  log_q, log_p = (
    jax.nn.log_softmax(x[..., :num_ids]) for x in (logits, teacher_logits)
  )
  b = interpolation
  if b == 0:
    nats = _kl(log_p, log_q)
  elif b == 1:
    nats = _kl(log_q, log_p)
  else:
    # M is divided by P and by Q before the log: log(M / Q) is as small as b,
    # and a difference of logs would lose it in rounding.
    log_b, log_1_b = math.log(b), math.log1p(-b)
    log_m_p = jnp.logaddexp(log_b, log_1_b + (log_q - log_p))
    log_m_q = jnp.logaddexp(log_b + (log_p - log_q), log_1_b)
    nats = -(
      jnp.sum(jnp.exp(log_p) * log_m_p, axis=-1) / (1 - b)
      + jnp.sum(jnp.exp(log_q) * log_m_q, axis=-1) / b
    )
  if num_ids < logits.shape[-1]:
    nats += jax.nn.logsumexp(logits, axis=-1)
    nats -= jax.nn.logsumexp(logits[..., :num_ids], axis=-1)
  return jnp.sum(nats * weights)


def _kl(
  log_p: Float[Array, 'batch length vocab'],
  log_q: Float[Array, 'batch length vocab'],
) -> Float[Array, 'batch length']:
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
