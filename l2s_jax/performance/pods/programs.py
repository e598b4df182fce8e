# SPDX-License-Identifier: Apache-2.0
"""Lowering of a system's programs from abstract shapes.

The train step, prefill and the decode loop, as run by `training/train.py` and
`inference/generate.py`, for a mesh whose devices need not be attached.
Arguments are shapes with shardings; nothing is allocated.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from l2s_jax.inference import generate
from l2s_jax.models import batch_keys, l2s
from l2s_jax.models import config as config_lib
from l2s_jax.models import flops as flops_lib
from l2s_jax.runtime import partitioning
from l2s_jax.systems import builders, parameters
from l2s_jax.systems import system as system_lib
from l2s_jax.training import optim
from l2s_jax.training import state as state_lib
from l2s_jax.training import train_step as train_step_lib
from l2s_jax.vocabularies import byte

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Program:
  """A lowered program.

  Attributes:
    lowered: the program to compile.
    arguments: shapes with shardings, by name.
    model_flops: FLOPs of matrix products over all devices, without
      recomputation; of a decode loop, for one token of every row.
  """

  lowered: jax.stages.Lowered
  arguments: Mapping[str, PyTree]
  model_flops: flops_lib.Number


@dataclasses.dataclass(frozen=True)
class Models:
  """The models of a system, without weights.

  Attributes:
    llm: config of the LLM; None compiles the SLM alone.
    slm: config of the SLM; None compiles the LLM alone.
    injection: 'add' or 'replace'.
    shared_vocabulary: whether the vocabulary is shared; None: if both embedding
      tables have equally many rows.
    dtype: dtype of the trained model's activations.
    llm_dtype: dtype of a frozen LLM.
    attention: of both models, as `TransformerConfig.attention`.
  """

  llm: config_lib.TransformerConfig | None
  slm: config_lib.TransformerConfig | None
  injection: str = 'add'
  shared_vocabulary: bool | None = None
  dtype: str = 'bfloat16'
  llm_dtype: str = 'bfloat16'
  attention: str = 'plain'

  def system(self, remat: str = 'none') -> system_lib.System:
    """Returns the LLM-to-SLM system, or that of the only model given.

    Args:
      remat: rematerialization of the trained model; see
        `TransformerConfig.remat`.
    """
    # The tokenizer is not used.
    vocabulary = byte.ByteVocabulary()
    trained = self.slm or self.llm
    assert trained is not None
    trained = dataclasses.replace(
      trained, dtype=self.dtype, remat=remat, attention=self.attention
    )
    if self.llm is None or self.slm is None:
      return system_lib.System(l2s.build(trained), vocabulary, vocabulary)
    shared = self.shared_vocabulary
    if shared is None:
      shared = self.llm.vocab_size == self.slm.vocab_size
    llm = dataclasses.replace(
      self.llm, dtype=self.llm_dtype, attention=self.attention
    )
    return system_lib.System(
      l2s.LlmToSlm(llm, trained, self.injection, shared),
      vocabulary,
      vocabulary,
      frozen=('llm',),
      frozen_dtype=self.llm_dtype,
    )


class Programs:
  """The programs of one system on one mesh.

  Attributes:
    system: the system, with the LLM's axis rules.
    mesh: the device mesh.
  """

  def __init__(
    self,
    system: system_lib.System,
    mesh: jax.sharding.Mesh,
    mesh_config: partitioning.MeshConfig,
    task_feature_lengths: Mapping[str, int],
  ):
    """Computes the shardings of the parameters.

    Args:
      system: see `Models`.
      mesh: mesh of devices, or of a topology's device descriptions.
      mesh_config: the axis rules.
      task_feature_lengths: tokens of 'inputs' (prompt) and 'targets' (answer).

    Raises:
      ValueError: if parameters do not divide over the mesh.
    """
    self.system = builders.with_rules(system, mesh_config)
    self.mesh = mesh
    self._rules = mesh_config.rules('slm')
    self._lengths = dict(task_feature_lengths)
    # Outside the mesh, whose devices cannot run this small computation.
    self._layout = parameters.layout(self.system, mesh, mesh_config)

  def train_arguments(
    self, optimizer: optim.Optimizer, batch_size: int
  ) -> dict[str, PyTree]:
    """Returns the arguments of the train step by name."""
    frozen, _, state = self._train_state(optimizer)
    return _by_name(frozen, state, self._batch(batch_size))

  def _train_state(
    self, optimizer: optim.Optimizer
  ) -> tuple[PyTree, optax.GradientTransformation, state_lib.TrainState]:
    """Returns the frozen parameters, the optimizer and the train state."""
    frozen_names = self.system.frozen
    frozen, trainable = parameters.split(self._layout.shapes, frozen_names)
    of_frozen, of_trainable = parameters.split(
      self._layout.shardings, frozen_names
    )
    transform = optimizer.make(
      parameters.split(self._layout.axes, frozen_names)[1]
    )
    placed = state_lib.shardings(trainable, of_trainable, transform, self.mesh)
    return (
      partitioning.with_shardings(frozen, of_frozen),
      transform,
      partitioning.with_shardings(*placed),
    )

  def train_step(
    self,
    optimizer: optim.Optimizer,
    batch_size: int,
    num_microbatches: int = 1,
  ) -> Program:
    """Lowers the train step, with donated state.

    Args:
      optimizer: the optimizer.
      batch_size: global batch size.
      num_microbatches: microbatches per batch.
    """
    module = self.system.module
    frozen, transform, state = self._train_state(optimizer)
    batch = self._batch(batch_size)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    with self.entered():
      lowered = jax.jit(
        functools.partial(
          train_step_lib.train_step,
          module=module,
          optimizer=transform,
          num_microbatches=num_microbatches,
          is_trained=lambda path: (
            optimizer.is_trained(path, optimizer.projector_steps)
            and self.system.is_trained(path)
          ),
        ),
        donate_argnums=0,
        out_shardings=(shardings, None),
      ).lower(state, frozen, batch)
    return Program(
      lowered,
      _by_name(frozen, state, batch),
      batch_size * flops_lib.train_flops(module, *self._lengths_of_both),
    )

  def generation(
    self, batch_size: int, dtype: str
  ) -> tuple[Program, 'DecodeLoop']:
    """Lowers prefill; returns it with the decode loop, which is lowered later.

    The KV cache has all slots of the longest answer from the start.

    Args:
      batch_size: number of prompts.
      dtype: dtype of the weights.
    """
    prompt_length, answer_length = self._lengths_of_both
    generator = generate.generator(self.system, answer_length)
    generator.first_slots = answer_length
    params = partitioning.with_shardings(
      jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(dtype)),
        self._layout.shapes,
      ),
      self._layout.shardings,
    )
    batch = {
      key: value
      for key, value in self._batch(batch_size).items()
      if key.startswith('encoder_')
    }
    prepared = generator.place(
      _place_prepared(
        jax.eval_shape(generator.prepare, params), self._layout.shardings
      )
    )
    with self.entered():
      lowered = jax.jit(
        lambda prepared, batch: generator.start(prepared, batch).state
      ).lower(prepared, batch)
    prefill = Program(
      lowered,
      {'parameters': prepared, 'batch': batch},
      batch_size * flops_lib.prompt_flops(self.system.module, prompt_length),
    )
    writer, _ = l2s.writer(self.system.module)
    flops = flops_lib.token_flops(writer.config, prompt_length, answer_length)
    return prefill, DecodeLoop(
      self, generator, prepared, answer_length, batch_size * flops
    )

  @property
  def _lengths_of_both(self) -> tuple[int, int]:
    return self._lengths['inputs'], self._lengths['targets']

  def _batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return batch_keys.example_batch(
      batch_size,
      *self._lengths_of_both,
      sharding=partitioning.batch_sharding(self.mesh),
    )

  @contextlib.contextmanager
  def entered(self) -> Iterator[None]:
    """Enters the mesh and the axis rules for tracing."""
    with partitioning.use_mesh(self.mesh), partitioning.axis_rules(self._rules):
      yield


@dataclasses.dataclass(frozen=True)
class DecodeLoop:
  """The decode loop, not lowered until prefill's output shardings are known."""

  programs: Programs
  generator: generate.Generator
  prepared: PyTree
  answer_length: int
  model_flops: flops_lib.Number

  def lower(self, prefill: Program, compiled: jax.stages.Compiled) -> Program:
    """Lowers the loop for the state returned by a compiled prefill."""
    state = partitioning.with_shardings(
      prefill.lowered.out_info, compiled.output_shardings
    )
    params = self.generator.writer_params(self.prepared)
    with self.programs.entered():
      lowered = self.generator.decode.lower(
        params, state, np.int32(self.answer_length)
      )
    return Program(
      lowered, {'parameters': params, 'state': state}, self.model_flops
    )


def _by_name(
  frozen: PyTree, state: state_lib.TrainState, batch: PyTree
) -> dict[str, PyTree]:
  """Returns the arguments of a train step by name."""
  return {
    'frozen': frozen,
    'trainable': state.trainable,
    'optimizer': state.opt_state,
    'batch': batch,
  }


def _place_prepared(shapes: PyTree, shardings: PyTree) -> PyTree:
  """Returns parameter shapes for generation with shardings.

  In generation layout each layer has its own arrays, and a tied head is a
  transposed copy of the embedding table; see
  `language_model.params_for_generation`.
  """
  flat = traverse_util.flatten_dict(shardings)

  def place(names, shape):
    source = tuple(re.sub(r'^layers_\d+$', 'layers', name) for name in names)
    if source in flat:
      spec = flat[source].spec[1 if source != names else 0 :]
    else:
      tables = ('decoder_token_embedder', 'token_embedder')
      paths = [(*names[:-2], table, 'embedding') for table in tables]
      spec = next(flat[path].spec for path in paths if path in flat)[::-1]
    mesh = next(iter(flat.values())).mesh
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return partitioning.with_shardings(shape, sharding)

  return traverse_util.unflatten_dict(
    {
      names: place(names, shape)
      for names, shape in traverse_util.flatten_dict(shapes).items()
    }
  )
