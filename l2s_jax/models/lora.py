# SPDX-License-Identifier: Apache-2.0
"""What LoRA has learned beside kernels, merged into them or told apart."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from l2s_jax.models import layers

PyTree = Any

NAMES = layers.LORA


def is_learned(path: str) -> bool:
  """Returns whether a parameter, its path with '/', is one of LoRA's."""
  return path.split('/')[-1] in NAMES


def add(
  kernel: Any, down: Any, up: Any, alpha: float, *, is_stacked: bool
) -> Any:
  """Returns the kernel that does what the three do.

  Args:
    kernel: [*inputs, *outputs]; of stacked layers, all have an axis before.
    down: [*inputs, rank].
    up: [rank, *outputs].
    alpha: as `TransformerConfig.lora_alpha`.
    is_stacked: whether they are of stacked layers.
  """
  layers_axis = kernel.shape[:1] if is_stacked else ()
  rank = down.shape[-1]
  product = down.reshape(*layers_axis, -1, rank) @ up.reshape(
    *layers_axis, rank, -1
  )
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
      found['kernel'] = add(
        tree['kernel'], down, up, alpha, is_stacked=is_stacked
      )
    return found

  return merged(params, False)
