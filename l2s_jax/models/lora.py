# SPDX-License-Identifier: Apache-2.0
"""What LoRA has learned beside kernels, merged into them or told apart."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2s_jax.models import layers

PyTree = Any

NAMES = layers.LORA


def is_learned(path: str) -> bool:
  """Returns whether a parameter, its path with '/', is one of LoRA's."""
  return path.split('/')[-1] in NAMES


def add(kernel: Any, down: Any, up: Any, alpha: float) -> Any:
  """Returns the kernel that does what the three do.

  Args:
    kernel: [*inputs, *outputs].
    down: [*inputs, rank].
    up: [rank, *outputs].
    alpha: as `TransformerConfig.lora_alpha`.
  """
  rank = up.shape[0]
  product = down.reshape(-1, rank) @ up.reshape(rank, -1)
  return kernel + product.reshape(kernel.shape) * np.float32(alpha / rank)


def merge(params: Mapping[str, PyTree], alpha: float) -> dict[str, PyTree]:
  """Returns a model's parameters without LoRA, whose kernels have it in them.

  Args:
    params: layers stacked.
    alpha: as `TransformerConfig.lora_alpha`.
  """

  def merged(tree: Any, is_stacked: bool) -> Any:
    if not isinstance(tree, Mapping):
      return tree
    found = {
      name: merged(x, is_stacked or name == 'layers')
      for name, x in tree.items()
      if name not in NAMES
    }
    if NAMES[0] in tree:
      down, up = (tree[name] for name in NAMES)
      found['kernel'] = _add(tree['kernel'], down, up, alpha, is_stacked)
    return found

  return merged(params, False)


def _add(
  kernel: Any, down: Any, up: Any, alpha: float, is_stacked: bool
) -> Any:
  arrays = (jnp.asarray(kernel), jnp.asarray(down), jnp.asarray(up))
  if not is_stacked:
    return add(*arrays, alpha)
  return jax.vmap(functools.partial(add, alpha=alpha))(*arrays)
