# SPDX-License-Identifier: Apache-2.0
"""Names, shapes and dtypes of the parameters of models and systems."""

import dataclasses
import functools
import types
from collections.abc import Collection, Mapping

import jax
import numpy as np
from flax import traverse_util

from l2s_jax.models import config as config_lib
from l2s_jax.models import l2s, language_model
from l2s_jax.runtime import partitioning

Path = tuple[str, ...]
# What a T5 has beside the encoder and the embeddings that it shares.
DECODER = {'decoder', 'logits_dense', 'decoder_token_embedder'}
_BATCH = (
  'encoder_input_tokens',
  'encoder_segment_ids',
  'decoder_input_tokens',
  'decoder_segment_ids',
)


@functools.cache
def of_model(
  config: config_lib.TransformerConfig,
) -> Mapping[Path, jax.ShapeDtypeStruct]:
  """Returns the tensors of a whole model."""
  if not config.has_decoder:
    whole = of_model(dataclasses.replace(config, num_decoder_layers=1))
    encoder = {p: s for p, s in whole.items() if p[0] not in DECODER}
    return types.MappingProxyType(encoder)
  shapes, _ = partitioning.abstract_params(
    functools.partial(l2s.build(config).init, deterministic=True),
    jax.random.key(0),
    _batch(),
  )
  return types.MappingProxyType(traverse_util.flatten_dict(shapes))


def is_encoder_alone(found: Collection[Path]) -> bool:
  modules = {path[0] for path in found}
  return 'encoder' in modules and not modules & DECODER


Module = l2s.LlmToSlm | language_model.LanguageModel


@functools.cache
def of_system(module: Module) -> Mapping[Path, jax.ShapeDtypeStruct]:
  """Returns the parameters of a system; of an LLM that reads, its encoder."""
  shapes, _ = partitioning.abstract_params(
    functools.partial(module.init, deterministic=True),
    jax.random.key(0),
    _batch(),
  )
  return traverse_util.flatten_dict(shapes)


def _batch() -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the smallest batch that meets all parameters."""
  return dict.fromkeys(_BATCH, jax.ShapeDtypeStruct((1, 2), np.int32))
