# SPDX-License-Identifier: Apache-2.0
"""Names, shapes and dtypes of the parameters of models and systems."""

import dataclasses
import functools
import types
from collections.abc import (
  Collection,
  Mapping,
)

import jax
from flax import linen as nn
from flax import traverse_util

from l2s_jax.models import batch_keys, l2s
from l2s_jax.models import config as config_lib
from l2s_jax.runtime import partitioning

Path = tuple[str, ...]
# Modules of an encoder-decoder that an encoder alone lacks.
DECODER = {'decoder', 'logits_dense', 'decoder_token_embedder'}


@functools.cache
def of_model(
  config: config_lib.TransformerConfig,
) -> Mapping[Path, jax.ShapeDtypeStruct]:
  """Returns the shapes and dtypes of a language model's parameters, by path.

  The config may be that of an encoder alone.
  """
  if not config.has_decoder:
    whole = of_model(dataclasses.replace(config, num_decoder_layers=1))
    encoder = {p: s for p, s in whole.items() if p[0] not in DECODER}
    return types.MappingProxyType(encoder)
  return of_module(l2s.build(config))


def is_encoder_alone(found: Collection[Path]) -> bool:
  """Returns whether the paths are of an encoder without a decoder."""
  modules = {path[0] for path in found}
  return 'encoder' in modules and not modules & DECODER


@functools.cache
def of_module(
  module: nn.Module,
) -> Mapping[tuple[str, ...], jax.ShapeDtypeStruct]:
  """Returns the shapes and dtypes of a module's parameters, by path.

  They are those of the module's `init`; no array is made.
  """
  shapes, _ = partitioning.abstract_params(
    functools.partial(module.init, deterministic=True),
    batch_keys.example_batch(1, 2, 2),
  )
  return types.MappingProxyType(traverse_util.flatten_dict(shapes))
