# SPDX-License-Identifier: Apache-2.0
"""LoRA parameters: recognised by name, and merged into their kernels."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from l2s_jax.models import layers

PyTree = Any

NAMES = layers.LORA


def is_learned(path: str) -> bool:
  """Returns whether a parameter path, joined by '/', is of a LoRA matrix."""
  return path.split('/')[-1] in NAMES


def add(
  kernel: Any, down: Any, up: Any, alpha: float, *, is_stacked: bool
) -> Any:
  """Returns the kernel with its LoRA update added.

  Args:
    kernel: [*inputs, *outputs]; stacked layers add a leading axis to all three.
    down: [*inputs, rank].
    up: [rank, *outputs].
    alpha: as `TransformerConfig.lora_alpha`.
    is_stacked: whether the arrays have the leading axis `layers`.
  """
  layers_axis = kernel.shape[:1] if is_stacked else ()
  rank = down.shape[-1]
  product = down.reshape(*layers_axis, -1, rank) @ up.reshape(
    *layers_axis, rank, -1
  )
  return kernel + product.reshape(kernel.shape) * np.float32(alpha / rank)


def merge(params: Mapping[str, PyTree], alpha: float) -> dict[str, PyTree]:
  """Returns a model's parameters with LoRA merged into the kernels.

  Args:
    params: nested dict of arrays, layers stacked.
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
