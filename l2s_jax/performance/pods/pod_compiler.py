# SPDX-License-Identifier: Apache-2.0
"""Compilation for TPUs that are not attached, and resource analysis.

Memory and operations per device are read from the compiled programs. Times are
lower bounds from the chips' peak rates; nothing is executed. `precompile.py` is
the verb.
"""

import collections
import dataclasses
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from l2s_jax.evaluation.report import TableRow
from l2s_jax.models import config as config_lib
from l2s_jax.models import l2s
from l2s_jax.performance.pods import hlo, hlo_costs, programs
from l2s_jax.runtime import chips, compilation, partitioning
from l2s_jax.training import optim

TRAIN, PREFILL, DECODE = 'train', 'prefill', 'decode'
PROGRAMS = (TRAIN, PREFILL, DECODE)
_NUM_LARGEST = 6
_REMATS = ('none', 'minimal', 'full')  # in order of decreasing memory
# Instructions that allocate no buffer.
_NO_BUFFER = (
  'parameter', 'get-tuple-element', 'tuple', 'bitcast', 'while', 'constant',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setting:
  """The settings that may be changed to make a train step fit in memory."""

  batch_size: int
  mesh: partitioning.MeshConfig
  num_microbatches: int
  remat: str

  def __str__(self) -> str:
    sizes = ', '.join(
      f'{axis}={getattr(self.mesh, axis)}' for axis in partitioning.MESH_AXES
    )
    return (
      f'BATCH_SIZE={self.batch_size}, NUM_MICROBATCHES='
      f'{self.num_microbatches}, REMAT={self.remat!r}, MeshConfig({sizes})'
    )


class Compiler:
  """Compiles the programs of one system for one slice."""

  def __init__(
    self,
    slice_: chips.Slice,
    devices: Sequence[Any],
    models: programs.Models,
    task_feature_lengths: Mapping[str, int],
    optimizer: optim.Optimizer,
  ):
    """Stores the configuration; compiles nothing.

    Args:
      slice_: the TPU slice.
      devices: devices of its topology.
      models: the models of the system.
      task_feature_lengths: tokens of 'inputs' (prompt) and 'targets' (answer).
      optimizer: the optimizer of the train step.
    """
    self._slice = slice_
    self._devices = devices
    self._models = models
    self._lengths = task_feature_lengths
    self._optimizer = optimizer
    self._announce = compilation.Announcer()

  def describe(self, setting: Setting) -> str:
    """Describes slice, mesh and models, a line each.

    Raises:
      ValueError: if the mesh does not match the number of devices.
    """
    slice_, chip = self._slice, self._slice.chip
    mesh = partitioning.make_mesh(setting.mesh, self._devices)
    axes = ', '.join(f'{name}={size}' for name, size in mesh.shape.items())
    module = self._models.system(setting.remat).module
    configs = {}
    if isinstance(module, l2s.LlmToSlm):
      configs['LLM'] = module.llm_config
    configs['trained'] = l2s.writer(module)[0].config
    return '\n'.join(
      [
        f'{slice_.num_slices} x {slice_.name}: {slice_.num_chips} devices with '
        f'{chip.hbm_bytes / chips.GIB:.2f} GiB each',
        f'mesh: {axes}',
        *(
          f'{tower}_rules: {dict(rules)}'
          for tower, rules in (
            ('llm', setting.mesh.llm_rules),
            ('slm', setting.mesh.slm_rules),
          )
          if rules
        ),
        *(f'{name}: {_describe(config)}' for name, config in configs.items()),
        f'lengths: {self._lengths["inputs"]} tokens of prompt, '
        f'{self._lengths["targets"]} of answer',
      ]
    )

  def check(
    self, setting: Setting, program_names: Sequence[str], sizes: Sequence[int]
  ) -> None:
    """Validates batch sizes before compilation.

    Args:
      setting: settings of the train step.
      program_names: names in `PROGRAMS`.
      sizes: batch sizes of inference.

    Raises:
      ValueError: if a batch does not divide over the mesh.
    """
    mesh = partitioning.make_mesh(setting.mesh, self._devices)
    if TRAIN in program_names:
      partitioning.check_batch_size(
        setting.batch_size, mesh, num_microbatches=setting.num_microbatches
      )
    if PREFILL in program_names:
      for size in sizes:
        partitioning.check_batch_size(size, mesh, 'DECODE_BATCH_SIZES')

  def describe_arguments(self, setting: Setting) -> str:
    """Describes the bytes per device of the train step's arguments."""
    arguments = self._lay_out(setting).train_arguments(
      self._optimizer, setting.batch_size
    )
    texts = []
    for name, tree in arguments.items():
      shardings = jax.tree.map(lambda x: x.sharding, tree)
      num_bytes = partitioning.bytes_per_device(tree, shardings)
      texts.append(f'{name} {chips.gib(num_bytes)}')
    return f'arguments of the train step per device: {", ".join(texts)}'

  def _lay_out(self, setting: Setting) -> programs.Programs:
    mesh = partitioning.make_mesh(setting.mesh, self._devices)
    return programs.Programs(
      self._models.system(setting.remat), mesh, setting.mesh, self._lengths
    )

  def train_step(self, setting: Setting) -> TableRow:
    """Compiles the train step; returns the row of its costs."""
    self.check(setting, (TRAIN,), ())
    found = self._lay_out(setting)
    program = found.train_step(
      self._optimizer, setting.batch_size, setting.num_microbatches
    )
    row, _ = self._compile(
      TRAIN, program, found.mesh, setting.batch_size, str(setting)
    )
    return row

  def generation(
    self, setting: Setting, batch_size: int, *, decodes: bool
  ) -> Iterator[TableRow]:
    """Compiles prefill and decode; yields a row of costs for each.

    Args:
      setting: mesh and remat settings.
      batch_size: number of prompts.
      decodes: whether to compile the decode loop, too.
    """
    found = self._lay_out(setting)
    prefill, loop = found.generation(batch_size, self._models.dtype)
    row, compiled = self._compile(PREFILL, prefill, found.mesh, batch_size, '')
    yield row
    if decodes and compiled is not None:
      program = loop.lower(prefill, compiled)
      yield self._compile(DECODE, program, found.mesh, batch_size, '')[0]

  def advise(self, setting: Setting) -> tuple[str, TableRow | None]:
    """Looks for settings that fit when the given setting does not.

    Returns:
      Advice, and the costs of the first of `neighbours` that fits; None if none
      fits.
    """
    tried: list[str] = []
    for other in neighbours(setting, self._slice.num_chips):
      try:
        row = self.train_step(other)
      except ValueError:  # The mesh or the batch size does not divide.
        continue
      if row['fits']:
        text = (
          f'This fits, as compiled, with {chips.gib(row["peak_bytes"])} per '
          f'device: {other}.'
        )
        if other.num_microbatches > 1:
          rows = other.batch_size // other.num_microbatches
          text += (
            f' So does BATCH_SIZE={rows} without microbatches, which needs '
            'less memory.'
          )
        return f'{text} Tried before: {"; ".join(tried) or "nothing"}.', row
      tried.append(f'{other} ({chips.gib(row["peak_bytes"])})')
    text = (
      'No similar setting fits. Use more chips, or a smaller model. Compiled: '
      f'{"; ".join(tried)}.'
    )
    return text, None

  def largest_batch(self, setting: Setting, row: TableRow) -> int:
    """Returns the largest batch size that fits: 1, 2, 4, ... times the given.

    Args:
      setting: settings of a train step that fits.
      row: its costs. They give the first guess, since temporaries grow with the
        batch and arguments do not.
    """

    def fits(factor: int) -> bool:
      batch_size = factor * setting.batch_size
      larger = dataclasses.replace(setting, batch_size=batch_size)
      return self.train_step(larger)['fits']

    grows = row['peak_bytes'] - row['argument_bytes']
    free = self._slice.chip.hbm_bytes - row['argument_bytes']
    factor = max(2, 1 << int(math.log2(free / grows)))
    if fits(factor):
      while fits(2 * factor):
        factor *= 2
      return factor * setting.batch_size
    factor //= 2
    while factor > 1 and not fits(factor):
      factor //= 2
    return factor * setting.batch_size

  def _compile(
    self,
    name: str,
    program: programs.Program,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    setting: str,
  ) -> tuple[TableRow, jax.stages.Compiled | None]:
    """Compiles a program; returns its row of costs and the executable.

    The executable is None if the compiler ran out of memory.
    """
    chip = self._slice.chip
    row: TableRow = {
      'program': name,
      'batch_size': batch_size,
      'task_feature_lengths': dict(self._lengths),
      'topology': self._slice.name,
      'num_slices': self._slice.num_slices,
      'mesh': dict(mesh.shape),
      'setting': setting,
      'arguments': largest_arguments(program.arguments),
    }
    start = time.perf_counter()
    what = f'{name} for {batch_size} rows on {self._slice.name}'
    try:
      with self._announce(f'{what}, {setting}' if setting else what):
        compiled = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      row |= out_of_memory(str(error), chip)
      return row, None
    row['compile_secs'] = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    row |= {
      'argument_bytes': memory.argument_size_in_bytes,
      'temporary_bytes': memory.temp_size_in_bytes,
      'peak_bytes': memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
      + memory.temp_size_in_bytes
      + memory.generated_code_size_in_bytes,
      'temporaries': largest_temporaries(text),
    }
    row['fits'] = row['peak_bytes'] <= chip.hbm_bytes
    row['free_fraction'] = 1 - row['peak_bytes'] / chip.hbm_bytes
    row |= self._bounds(
      hlo_costs.count(text), mesh, program.model_flops, is_loop=name == DECODE
    )
    return row, compiled

  def _bounds(
    self,
    costs: hlo_costs.HloCosts,
    mesh: jax.sharding.Mesh,
    model_flops: int | float,
    *,
    is_loop: bool,
  ) -> TableRow:
    """Returns operations per device, and lower bounds on their time."""
    loops = costs.open_loops
    if is_loop:  # One token is one iteration of the only open loop.
      (costs,) = loops
    else:
      costs = sum(loops, costs)
    chip, devices = self._slice.chip, list(mesh.devices.flat)

    def coords(i: int) -> tuple[int, ...]:
      slice_index = getattr(devices[i], 'slice_index', 0)
      place = tuple(devices[i].coords)[: chip.num_axes]
      return (slice_index, *place)

    interconnect_secs = sum(
      x.count
      * self._slice.seconds(
        x.num_bytes,
        [coords(i) for i in x.devices],
        is_permute=x.kind == 'collective-permute',
      )
      for x in costs.collectives
    )
    per_device = model_flops / len(devices)
    secs = {
      # For few rows the compiler emits no matrix products that are counted.
      'compute_secs': max(costs.flops, per_device) / chip.flops_per_sec,
      'hbm_secs': costs.hbm_bytes / chip.hbm_bytes_per_sec,
      'interconnect_secs': interconnect_secs,
    }
    bound = max(secs.values())
    return {
      'loops_counted_once': 0 if is_loop else len(loops),
      'flops': costs.flops,
      'model_flops': per_device,
      'hbm_bytes_moved': costs.hbm_bytes,
      'collective_bytes': costs.collective_bytes,
      'collectives': by_kind(costs.collectives),
      **secs,
      'bound_secs': bound,
      'utilization_bound': per_device / (chip.flops_per_sec * bound),
    }


def neighbours(setting: Setting, num_devices: int) -> Iterator[Setting]:
  """Yields settings of the same train step with decreasing memory needs.

  In this order: FSDP shards instead of replicas, rematerialization,
  microbatches.
  """
  data, fsdp, tensor = partitioning.fit(setting.mesh, num_devices)
  num_shards = data * fsdp
  if data > 1:
    mesh = dataclasses.replace(setting.mesh, data=1, fsdp=num_shards)
    setting = dataclasses.replace(setting, mesh=mesh)
    yield setting
  for remat in _REMATS[_REMATS.index(setting.remat) + 1 :]:
    setting = dataclasses.replace(setting, remat=remat)
    yield setting
  rows = setting.batch_size // setting.num_microbatches
  while rows % (2 * num_shards) == 0:
    rows //= 2
    setting = dataclasses.replace(
      setting, num_microbatches=setting.batch_size // rows
    )
    yield setting


def _describe(config: config_lib.TransformerConfig) -> str:
  """Describes the main sizes of a model."""
  layers = f'{config.num_decoder_layers} layers'
  if config.is_encoder_decoder:
    layers = f'{config.num_encoder_layers} + {layers}'
  return (
    f'{layers}, width {config.emb_dim}, MLP {config.mlp_dim}, vocabulary '
    f'{config.vocab_size}, {config.dtype}, remat {config.remat!r}, attention '
    f'{config.attention!r}'
  )


def out_of_memory(message: str, chip: chips.Chip) -> TableRow:
  """Parses the memory requirement of the compiler's out-of-memory error.

  The compiler's "HLO temporaries" include arguments and results. Its units are
  MiB, GiB and TiB.
  """
  size = re.search(r'HLO temporaries \(([\d.]+)([MGT])\)', message)
  if size is None:
    raise ValueError(
      f'The compiler ran out of memory of an unknown kind: {message}'
    )
  unit = {'M': 2**20, 'G': 2**30, 'T': 2**40}[size[2]]
  peak_bytes = float(size[1]) * unit
  return {
    'fits': False,
    'peak_bytes': peak_bytes,
    'free_fraction': 1 - peak_bytes / chip.hbm_bytes,
  }


def largest_arguments(arguments: Mapping[str, Any]) -> list[TableRow]:
  """Returns the largest arguments by bytes per device."""
  rows: list[TableRow] = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(arguments):
    rows.append(
      {
        'name': jax.tree_util.keystr(path, simple=True, separator='/'),
        'shape': f'{leaf.dtype}{list(leaf.shape)}',
        'bytes': partitioning.bytes_per_device(leaf, leaf.sharding),
      }
    )
  return sorted(rows, key=lambda row: -row['bytes'])[:_NUM_LARGEST]


def largest_temporaries(text: str) -> list[TableRow]:
  """Returns the largest HBM arrays allocated by a compiled program."""
  computations, _ = hlo.parse(text)
  fused = {x.callee('calls') for c in computations.values() for x in c.values()}
  rows: dict[tuple[str, str], TableRow] = {}
  for name, computation in computations.items():
    if name in fused:
      continue
    for x in computation.values():
      if x.opcode in _NO_BUFFER:
        continue
      for array in x.arrays:
        if array.in_hbm:
          row = {
            'name': x.op_name or x.opcode,
            'shape': str(list(array.dims)),
            'bytes': array.num_bytes,
          }
          rows[str(row['name']), str(row['shape'])] = row
  return sorted(rows.values(), key=lambda row: -row['bytes'])[:_NUM_LARGEST]


def by_kind(collectives: Sequence[hlo_costs.Collective]) -> list[TableRow]:
  """Sums equal collectives into rows, the largest first."""
  sums: collections.defaultdict[tuple[Any, ...], list[float]]
  sums = collections.defaultdict(lambda: [0.0, 0.0])
  for x in collectives:
    if x.total_bytes:
      total = sums[x.kind, len(x.devices), x.shape, x.op_name]
      total[0] += x.count
      total[1] += x.total_bytes
  rows = [
    {
      'kind': kind,
      'group_size': size,
      'shape': list(shape),
      'op_name': op_name,
      'count': count,
      'bytes': num_bytes,
    }
    for (kind, size, shape, op_name), (count, num_bytes) in sums.items()
  ]
  return sorted(rows, key=lambda row: -row['bytes'])
