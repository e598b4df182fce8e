# SPDX-License-Identifier: Apache-2.0
"""Folds the scale of attention logits into the query kernels.

Models here can have relative positions and attention logits divided by
sqrt(head_dim) (`TransformerConfig.scale_attention`). T5 in other frameworks has
no such scale. A model without the scale computes the same logits with query
kernels multiplied by the scale.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from l2s_jax.models import config as config_lib
from l2s_jax.models import shapes as shapes_lib
from l2s_jax.weights.formats import huggingface


def fold(
  config: config_lib.TransformerConfig,
) -> tuple[config_lib.TransformerConfig, float]:
  """Returns the config without the scale, and the factor of the query kernels.

  The config is returned unchanged, with factor 1, if a model family of
  transformers can express it, or if none can express it without the scale.
  """
  factor = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
  unscaled = dataclasses.replace(
    config, scale_attention=False, query_pre_attn_scalar=None
  )
  if (
    not config.scale_attention
    or config.qk_norm  # QK norm would undo the factor.
    or huggingface.model_types(config)
    or not huggingface.model_types(unscaled)
  ):
    return config, 1.0
  return unscaled, factor


def is_query(path: shapes_lib.Path) -> bool:
  """Returns whether a parameter is a query kernel or bias."""
  return len(path) > 1 and path[-2] == 'query'


def check(
  factor: float, stored: np.dtype, written: np.dtype, location: str
) -> None:
  """Checks that folding the scale does not round query kernels a second time.

  A power of two is exact in every dtype. Another factor rounds once, which is
  acceptable in float32, and in a cast that rounds anyway.

  Args:
    factor: factor from `fold`.
    stored: dtype of the source.
    written: dtype of the destination.
    location: location of the weights, for errors.

  Raises:
    ValueError: if neither dtype is float32 and the factor is no power of two.
  """
  if math.frexp(factor)[0] == 0.5 or jnp.float32 in (stored, written):
    return
  raise ValueError(
    f'{location} divides attention logits by {1 / factor:g}. --to=hf folds '
    'this into the query kernels, and would round them a second time to '
    f'{stored.name}. Use --dtype=float32.'
  )


def scale(array: np.ndarray, factor: float, dtype: np.dtype) -> np.ndarray:
  """Returns a query kernel multiplied by the factor in float32, then cast."""
  return (array.astype(np.float32) * np.float32(factor)).astype(dtype)
