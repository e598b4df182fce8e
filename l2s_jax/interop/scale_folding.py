# SPDX-License-Identifier: Apache-2.0
"""The scale of attention logits, moved into the query kernels.

A model of ours may divide attention logits by sqrt(head_dim) and have relative
positions (`TransformerConfig.scale_attention`), which no T5 of others does. The
same model without the scale has query kernels that are as much smaller.
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
  """Returns a config without the scale, and the factor of query kernels.

  A config that a family of transformers says as it is, or that no family says
  without the scale either, comes back with the factor 1.
  """
  factor = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
  unscaled = dataclasses.replace(
    config, scale_attention=False, query_pre_attn_scalar=None
  )
  if (
    not config.scale_attention
    or config.qk_norm  # It would undo the factor.
    or huggingface.model_types(config)
    or not huggingface.model_types(unscaled)
  ):
    return config, 1.0
  return unscaled, factor


def is_query(path: shapes_lib.Path) -> bool:
  return len(path) > 1 and path[-2] == 'query'


def check(
  factor: float, stored: np.dtype, written: np.dtype, location: str
) -> None:
  """Refuses a factor that the dtype of the kernels does not hold.

  A power of two is exact in any dtype; others are rounded once, which a float32
  does not show, nor a kernel that is rounded to another dtype as it is written.

  Raises:
    ValueError: with the dtype that does.
  """
  if math.frexp(factor)[0] == 0.5 or jnp.float32 in (stored, written):
    return
  raise ValueError(
    f'{location} divides attention logits by {1 / factor:g}, which goes into '
    f'its query kernels; these are stored as {stored.name}, which would round '
    'them a second time. Write them with --dtype=float32.'
  )


def scale(array: np.ndarray, factor: float, dtype: np.dtype) -> np.ndarray:
  """Returns a query kernel times the factor, rounded once."""
  return (array.astype(np.float32) * np.float32(factor)).astype(dtype)
