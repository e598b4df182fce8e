# SPDX-License-Identifier: Apache-2.0
"""Training steps of other engines on the same shapes: `benchmark --train`.

Steps use AdamW with a small learning rate, and the dropout of the config. Both
peers are optional: transformers with torch; and T5X, which is not on PyPI and
takes part if it can be imported.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import gin
import jax
import jax.numpy as jnp

from l2s_jax.data import batching
from l2s_jax.models import batch_keys
from l2s_jax.models import config as config_lib
from l2s_jax.performance import peers

# Runs one step, blocks until it is done, and returns its loss in nats per
# target token.
Step = Callable[[], float]

LEARNING_RATE = 1e-4
_START_ID = 0


# Weights and optimizer state are float32.
PEERS = {
  'transformers float32': peers.Peer('transformers', 'float32', peers.TORCH),
  'transformers bfloat16': peers.Peer('transformers', 'bfloat16', peers.TORCH),
  't5x float32': peers.Peer('t5x', 'float32', ('t5x',)),
}


def load(
  name: str,
  folder: pathlib.Path,
  config: config_lib.TransformerConfig,
  batch: batching.Batch,
) -> Step:
  """Loads a model; returns its training step on a fixed batch.

  Args:
    name: name of an available peer.
    folder: the model in Hugging Face format.
    config: config of the model: encoder-decoder or decoder-only.
    batch: a batch without padding.

  Raises:
    peers.UnsupportedError: if T5X does not support the model.
  """
  peer = PEERS[name]
  if peer.engine == 't5x':
    return _load_t5x(config, batch)
  return _load_transformers(folder, config, batch, peer.dtype)


def _load_transformers(
  folder: pathlib.Path,
  config: config_lib.TransformerConfig,
  batch: batching.Batch,
  dtype: str,
) -> Step:
  import torch

  model, device = peers.torch_model(folder, config, 'float32')
  model = model.train()
  optimizer = torch.optim.AdamW(
    model.parameters(), LEARNING_RATE, weight_decay=0.0, fused=True
  )
  prompts, answers = (
    torch.tensor(batch[key], dtype=torch.long, device=device)
    for key in ('encoder_input_tokens', 'decoder_target_tokens')
  )
  if config.is_encoder_decoder:
    inputs, labels = prompts, answers
  else:
    start = torch.full_like(answers[:, :1], _START_ID)
    inputs = torch.cat([prompts, start, answers], 1)
    unasked = torch.full_like(inputs[:, : -answers.shape[1]], -100)
    labels = torch.cat([unasked, answers], 1)

  def step() -> float:
    with torch.autocast(device, torch.bfloat16, enabled=dtype == 'bfloat16'):
      loss = model(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), labels=labels
      ).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()

  return step


def _load_t5x(
  config: config_lib.TransformerConfig, batch: batching.Batch
) -> Step:
  import optax

  with gin.unlock_config():  # T5X registers configurables.
    import seqio
    from t5x import models, optimizers, train_state, trainer
    from t5x.examples.t5 import network

  if not config.is_encoder_decoder or config.positions != 'relative':
    raise peers.UnsupportedError('T5X supports only T5 models.')
  module = network.Transformer(
    network.T5Config(
      vocab_size=config.vocab_size,
      dtype=jnp.float32,
      emb_dim=config.emb_dim,
      num_heads=config.num_heads,
      num_encoder_layers=config.num_encoder_layers,
      num_decoder_layers=config.num_decoder_layers,
      head_dim=config.head_dim,
      mlp_dim=config.mlp_dim,
      mlp_activations=tuple(config.mlp_activations),
      dropout_rate=config.dropout_rate,
      logits_via_embedding=config.logits_via_embedding,
    )
  )
  vocabulary = seqio.PassThroughVocabulary(config.vocab_size)
  definition = optimizers.wrap_optax_optimizer(optax.adamw)(
    learning_rate=LEARNING_RATE, weight_decay=0.0
  )
  model = models.EncoderDecoderModel(module, vocabulary, vocabulary, definition)
  # T5X recognizes padding by its id.
  keys = [key for key in batch_keys.KEYS if not key.endswith('_segment_ids')]
  arrays = jax.device_put({key: batch[key] for key in keys})
  variables = model.get_initial_variables(
    jax.random.key(0),
    {key: x.shape for key, x in arrays.items()},
    {key: x.dtype for key, x in arrays.items()},
  )
  state = train_state.FlaxOptimTrainState.create(definition, variables)

  def update(state: Any, batch: Any, key: Any) -> Any:
    return trainer.train_with_lr(
      state, batch, jnp.float32(LEARNING_RATE), key, model, None
    )

  compiled = jax.jit(update, donate_argnums=0)

  def step() -> float:
    nonlocal state
    key = jax.random.fold_in(jax.random.key(1), state.step)
    state, metrics = compiled(state, arrays, key)
    sums = jax.block_until_ready(metrics)['loss_per_nonpadding_target_token']
    return float(sums.compute())

  return step
