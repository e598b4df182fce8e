# SPDX-License-Identifier: Apache-2.0
"""Losses as sums with their weights, so that any split adds up exactly."""

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
  """Returns the sum to differentiate, in nats, and the sums to report.

  Args:
    logits: float32, of the answer's vocabulary.
    targets: ids to predict; anything where the weight is 0.
    weights: 1 for a target token, 0 for padding.
    label_smoothing: probability that the target gives up to all other ids in
      equal parts. The entropy of these soft targets is taken off, so that the
      least value is 0.
    z_loss: times the squared log of the softmax's denominator is added; keeps
      the logits near log-probabilities.

  Returns:
    The sum of cross-entropy, smoothed or not, and z-loss; and 'loss' (the
    plain cross-entropy, comparable whatever the settings), 'z_loss' (what was
    added), 'loss_weight' (target tokens) and 'num_correct' (targets that no
    other token is more likely than).

  Raises:
    ValueError: for a `label_smoothing` outside [0, 1).

  Source: smoothing and z-loss are those of t5x/losses.py.
  """
  if not 0 <= label_smoothing < 1:
    raise ValueError(
      f'label_smoothing={label_smoothing} is not a probability below 1.'
    )
  # A comparison summed over the vocabulary, not a gather: it stays local
  # where the vocabulary is sharded, and fuses.
  is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
  target_logits = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  nats = log_z - target_logits
  # Not an argmax: XLA:CPU takes ten times as long for it as for a maximum.
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
  """Returns the divergence of soft targets from the softmax, in nats."""
  num_others = logits.shape[-1] - 1
  on, off = 1 - label_smoothing, label_smoothing / num_others
  entropy = -on * math.log(on) - num_others * off * math.log(off)
  # The soft targets sum to 1, so that log_z comes in once; their one-hot
  # table is never made.
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
  """Returns how far a student is from its teacher, summed over tokens, in nats.

  With P the teacher's distribution, Q the student's, b the interpolation and
  M = b P + (1 - b) Q, it is

      KL(P || M) / (1 - b) + KL(Q || M) / b

  which is KL(P || Q) at b = 0 and KL(Q || P) at b = 1. This is the generalised
  Jensen-Shannon divergence b KL(P || M) + (1 - b) KL(Q || M), divided by
  b (1 - b): so that it does not vanish towards the ends, and gradients have one
  size for all b. At b = 1/2 it is four times the Jensen-Shannon divergence.

  Of two tables of one vocabulary that are not equally large, P and Q are the
  distributions among the ids that both have. To ids that the teacher lacks it
  gives nothing: -log of what the student leaves to the others is added, which
  at b = 0 makes KL(P || Q) that of the student's whole table.

  Args:
    logits: of the student, float32.
    teacher_logits: of the teacher, float32.
    weights: 1 for a token of the answer, 0 for padding.
    interpolation: b, from 0 to 1.
    temperature: both logits are divided by it.

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
    # M is divided by P and Q before its log is taken: as a difference of logs
    # log(M / Q), which is as small as b, would be lost in their rounding.
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
