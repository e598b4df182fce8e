# SPDX-License-Identifier: Apache-2.0
"""The start of every verb: a mesh, a system and its layout; and a task.

Incompatible settings are refused here, before weights are read and programs
compile.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax

from l2s_jax.data import bound_tasks
from l2s_jax.models import l2s
from l2s_jax.runtime import partitioning
from l2s_jax.systems import builders, parameters
from l2s_jax.systems import system as system_lib


@dataclasses.dataclass(frozen=True)
class Session:
  """A system on a mesh.

  Attributes:
    mesh: the device mesh.
    mesh_config: its shape and axis rules.
    system: with the axis rules of its LLM.
    layout: shapes and shardings of its parameters on the mesh.
    lengths: maximum tokens of 'inputs' (prompt) and 'targets' (answer).
  """

  mesh: jax.sharding.Mesh
  mesh_config: partitioning.MeshConfig
  system: system_lib.System
  layout: parameters.Layout
  lengths: Mapping[str, int]

  @property
  def num_shards(self) -> int:
    """Number of shards of a batch's rows."""
    return self.mesh.shape['data'] * self.mesh.shape['fsdp']

  def describe(self, optimizer_bytes: int | None = None) -> str:
    """Returns the report of `--dry_run`; see `parameters.summary`."""
    return parameters.summary(
      self.system, self.layout, self.mesh, optimizer_bytes
    )

  @contextlib.contextmanager
  def entered(self) -> Iterator[None]:
    """Enters the mesh and the axis rules for tracing."""
    with _entered(self.mesh, self.mesh_config):
      yield


def start(
  load: Callable[[], system_lib.System],
  mesh: partitioning.MeshConfig | None,
  lengths: Mapping[str, int],
  *,
  batch_sizes: Mapping[str, int | None],
  num_microbatches: int = 1,
) -> Session:
  """Returns a session, validated as far as shapes allow.

  Args:
    load: returns the system; called after the mesh was validated.
    mesh: None puts all devices along `data`.
    lengths: maximum tokens of 'inputs' and 'targets'.
    batch_sizes: by setting; each must be a multiple of the number of shards,
      the first one of that number times `num_microbatches`. None skips one.
    num_microbatches: sequential parts of a batch.

  Raises:
    ValueError: if devices, batch sizes, lengths or parameters do not fit.
  """
  mesh_config = mesh or partitioning.MeshConfig()
  device_mesh = partitioning.make_mesh(mesh_config)
  for number, (name, size) in enumerate(batch_sizes.items()):
    if size is not None:
      num_parts = 1 if number else num_microbatches
      partitioning.check_batch_size(size, device_mesh, name, num_parts)
  system = builders.with_rules(load(), mesh_config)
  l2s.check_lengths(
    system.module,
    lengths['inputs'],
    lengths['targets'],
    reads_llm=system.cached_states is None,
  )
  with _entered(device_mesh, mesh_config):
    layout = parameters.layout(system, device_mesh, mesh_config)
  return Session(device_mesh, mesh_config, system, layout, lengths)


@contextlib.contextmanager
def _entered(
  mesh: jax.sharding.Mesh, mesh_config: partitioning.MeshConfig
) -> Iterator[None]:
  with (
    partitioning.use_mesh(mesh),
    partitioning.axis_rules(mesh_config.rules('slm')),
  ):
    yield


def bind_task(
  system: system_lib.System, mixture_or_task_name: str, label: str | None = None
) -> bound_tasks.BoundTask:
  """Returns a SeqIO task, a mixture or a cache with a system's vocabularies.

  Args:
    system: has the vocabularies.
    mixture_or_task_name: as in `bound_tasks.bind`.
    label: the setting that names the task, for messages.

  Raises:
    ValueError: if the system uses cached states and the task has none, or those
      of another LLM; or if the task alone has them.
  """
  _check_states(system, mixture_or_task_name, label or 'MIXTURE_OR_TASK_NAME')
  return bound_tasks.bind(
    mixture_or_task_name,
    system.prompt_vocabulary,
    system.answer_vocabulary,
    label=label,
  )


def with_cached_states(
  system: system_lib.System, mixture_or_task_name: str
) -> system_lib.System:
  """Returns the system with the cached LLM states of a task, if any.

  Args:
    system: with its LLM.
    mixture_or_task_name: as in `bound_tasks.bind`.

  Raises:
    FileNotFoundError: if gin asks for features that do not exist.
    ValueError: if the system has no frozen LLM, or the states are another's.
  """
  features = bound_tasks.features_of(mixture_or_task_name)
  if features is None:
    return system
  if not isinstance(system.module, l2s.LlmToSlm):
    raise ValueError(
      f'USE_FEATURES=True: {features.folder} has the states of an LLM, but the '
      'model is a single language model, which reads prompts itself. Set '
      'USE_FEATURES=False.'
    )
  module = system.module
  if module.train_llm:
    raise ValueError(
      f'USE_FEATURES=True: {features.folder} has the states of a frozen LLM, '
      'but TRAIN_LLM=True trains the LLM. Set one of them to False.'
    )
  if module.llm_layer != features.layer:
    raise ValueError(
      f'{features.folder} has the states of {_layer(features.layer)} of the '
      f'LLM, but LLM_LAYER={module.llm_layer!r} selects '
      f'{_layer(module.llm_layer)}. Set LLM_LAYER={features.layer!r}, cache '
      'the features of that layer in another CACHE_DIR, or set '
      'USE_FEATURES=False.'
    )
  is_bidirectional = module.llm_config.bidirectional_prefix
  if features.bidirectional != is_bidirectional:
    raise ValueError(
      f'{features.folder} has the states of an LLM with '
      f'LLM_BIDIRECTIONAL={features.bidirectional}, but this LLM has '
      f'{is_bidirectional}. Set LLM_BIDIRECTIONAL={features.bidirectional}, '
      'cache the features of this LLM in another CACHE_DIR, or set '
      'USE_FEATURES=False.'
    )
  if features.prefix_ids != tuple(module.llm_prefix_ids):
    raise ValueError(
      f'{features.folder} has the states of an LLM with the tokens '
      f'{features.prefix_ids} before each prompt, but this LLM has '
      f'{tuple(module.llm_prefix_ids)}. Cache the features again in another '
      'CACHE_DIR, or set USE_FEATURES=False.'
    )
  width = module.llm_config.emb_dim
  if features.width != width:
    raise ValueError(
      f'{features.folder} has the states of another LLM than '
      f'{system.sources.get("llm")}: they have the width {features.width}, its '
      f'states have {width}. Set LLM_PATH to the LLM of the cache, or '
      'USE_FEATURES=False.'
    )
  states = system_lib.CachedStates(
    str(features.folder),
    features.dtype,
    features.llm_fingerprint,
    features.layer,
  )
  return dataclasses.replace(system, cached_states=states)


def _layer(layer: int | str | None) -> str:
  """Returns a name of an LLM layer, for errors."""
  if layer is None:
    return 'the last layer'
  return 'a mix of all layers' if layer == l2s.MIX else f'layer {layer}'


def _check_states(
  system: system_lib.System, mixture_or_task_name: str, label: str
) -> None:
  """Checks that the states of a task are those of the system, if any.

  Raises:
    ValueError: if one of them lacks states, or they differ.
  """
  states = system.cached_states
  features = bound_tasks.features_of(mixture_or_task_name)
  if states is None and features is not None:
    raise ValueError(
      f'{label}={mixture_or_task_name}: this task uses the features of '
      f'{features.folder}, but the other tasks need the LLM. Set features=True '
      'for all caches, or for none (USE_FEATURES).'
    )
  if states is not None and features is None:
    raise ValueError(
      f'{label}={mixture_or_task_name}: the states of {states.location} '
      'replace the LLM, which is not in memory, but this task has no states. '
      'Cache it with --features and set its cache, or set USE_FEATURES=False.'
    )
  if states is None or features is None:
    return
  if states.layer != features.layer:
    raise ValueError(
      f'{label}={mixture_or_task_name}: {features.folder} has the states of '
      f'{_layer(features.layer)} of the LLM, {states.location} those of '
      f'{_layer(states.layer)}. Cache both with the same LLM_LAYER.'
    )
  if states.llm_fingerprint != features.llm_fingerprint:
    raise ValueError(
      f'{label}={mixture_or_task_name}: {features.folder} has the states of '
      f'another LLM ({features.llm_fingerprint[:16]}) than {states.location} '
      f'({states.llm_fingerprint[:16]}). Cache both with the same LLM_PATH.'
    )
