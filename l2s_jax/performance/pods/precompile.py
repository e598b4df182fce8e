# SPDX-License-Identifier: Apache-2.0
"""The verb `precompile`: resource needs on TPUs that are not attached.

The TPU compiler (`libtpu`) compiles the train step, prefill and the decode loop
for a named topology, on the CPU of this machine. Memory and operations per
device are read from the compiled programs. Times are lower bounds from the
chips' peak rates (`runtime/chips.py`); nothing is executed.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import jax
from jax.experimental import topologies

from l2s_jax.evaluation.report import TableRow
from l2s_jax.models import config as config_lib
from l2s_jax.models import l2s
from l2s_jax.performance.pods import pod_compiler, precompile_report, programs
from l2s_jax.runtime import chips, extras, files, gin_config, partitioning
from l2s_jax.systems import system
from l2s_jax.training import optim


@gin.configurable(module='l2s_jax')
def precompile(
  task_feature_lengths: Mapping[str, int] = gin.REQUIRED,
  batch_size: int = gin.REQUIRED,
  optimizer: optim.Optimizer = gin.REQUIRED,
  topology: str | None = None,
  llm: system.Tower | None = None,
  slm: system.Tower | None = None,
  injection: str = 'add',
  shared_vocabulary: bool | None = None,
  dtype: str = 'bfloat16',
  llm_dtype: str = 'bfloat16',
  mesh: partitioning.MeshConfig | None = None,
  num_slices: int = 1,
  num_microbatches: int = 1,
  remat: str = 'none',
  attention: str = 'plain',
  decode_batch_sizes: int | Sequence[int] | None = None,
  program_names: Sequence[str] = pod_compiler.PROGRAMS,
  suggest: bool = True,
  find_largest_batch: bool = False,
  output_dir: str | None = None,
  *,
  dry_run: bool = False,
) -> list[TableRow]:
  """Compiles a system for TPUs that are not attached; reports its costs.

  For each program and per device: bytes in memory, FLOPs, bytes moved,
  collectives by kind and size, and lower bounds on the time.

  Args:
    task_feature_lengths: tokens of 'inputs' (prompt) and 'targets' (answer).
    batch_size: global batch size of the train step.
    optimizer: optimizer of the train step.
    topology: TPU type and chips along each axis of its torus: 'v5e:2x4',
      'v5e:16x16', 'v6e:16x16', 'v5p:4x4x4' (sold as v5p-128: Google counts the
      cores of v5p, two per chip).
    llm: config or weights of the LLM; None compiles the SLM alone.
    slm: config or weights of the SLM; None compiles the LLM alone.
    injection: 'add' or 'replace'.
    shared_vocabulary: whether LLM and SLM share a vocabulary; None: if their
      embedding tables have equally many rows.
    dtype: dtype of the SLM's activations, and of its weights in inference.
    llm_dtype: dtype of the LLM.
    mesh: device mesh and axis rules; None puts all devices along `data`.
    num_slices: number of slices, joined by the network.
    num_microbatches: microbatches per batch.
    remat: rematerialization of the trained model; see
      `TransformerConfig.remat`.
    attention: of both models, as `TransformerConfig.attention`.
    decode_batch_sizes: batch sizes of inference, one number or several; None
      takes `batch_size`.
    program_names: any of 'train', 'prefill' and 'decode'; 'decode' needs
      'prefill'.
    suggest: whether to look for settings that fit if the train step does not;
      each attempt compiles.
    find_largest_batch: whether to double the train step's batch size as long as
      it fits.
    output_dir: output folder of precompile.json and precompile.md; None writes
      nothing.
    dry_run: prints the mesh and the bytes of the train step's arguments, and
      compiles nothing.

  Returns:
    A row for each program.

  Raises:
    ValueError: if a setting is invalid; or if a program does not fit: names its
      largest tensors and, for the train step, settings that fit.
  """
  gin_config.check_positive(
    BATCH_SIZE=batch_size,
    NUM_SLICES=num_slices,
    NUM_MICROBATCHES=num_microbatches,
  )
  gin_config.check_lengths(task_feature_lengths)
  _check(program_names, injection)
  if topology is None:
    raise ValueError(
      'No topology is set. Set --topology to a TPU and the number of chips '
      'along each axis of its interconnect, such as v5e:2x4.'
    )
  slice_ = chips.find(topology, num_slices)
  folder = None
  if output_dir is not None:
    folder = files.local_folder(output_dir, 'OUTPUT_DIR')
  configs = _load_configs(llm, slm)
  setting = pod_compiler.Setting(
    batch_size, mesh or partitioning.MeshConfig(), num_microbatches, remat
  )
  compiler = pod_compiler.Compiler(
    slice_,
    _devices(slice_),
    programs.Models(
      configs.get('llm'),
      configs.get('slm'),
      injection=injection,
      shared_vocabulary=shared_vocabulary,
      dtype=dtype,
      llm_dtype=llm_dtype,
      attention=attention,
    ),
    task_feature_lengths,
    optimizer,
  )
  if decode_batch_sizes is None:
    decode_batch_sizes = batch_size
  if isinstance(decode_batch_sizes, int):
    decode_batch_sizes = (decode_batch_sizes,)
  report = _Report(compiler.describe(setting), folder)
  print(report.description)
  compiler.check(setting, program_names, decode_batch_sizes)
  if dry_run:
    print(compiler.describe_arguments(setting))
    return []
  if pod_compiler.TRAIN in program_names:
    _compile_train_step(compiler, setting, report, suggest, find_largest_batch)
  if pod_compiler.PREFILL in program_names:
    decodes = pod_compiler.DECODE in program_names
    for size in decode_batch_sizes:
      for row in compiler.generation(setting, size, decodes=decodes):
        report.add(row)
  report.check()
  return report.rows


def _load_configs(
  llm: system.Tower | None, slm: system.Tower | None
) -> dict[str, config_lib.TransformerConfig]:
  """Returns the configs of the given models, by 'llm' and 'slm'."""
  configs = {
    name: tower.load_config()
    for name, tower in (('llm', llm), ('slm', slm))
    if tower is not None and (tower.config or tower.path)
  }
  if not configs:
    raise ValueError(
      'Nothing to compile: set LLM and SLM, or one of them, to configs (such '
      'as %T5_1_1_XL, with its gin file), or LLM_PATH and SLM_PATH to weights.'
    )
  return configs


class _Report:
  """Rows of the report, printed and written as they arrive.

  Attributes:
    description: description of the setting.
    rows: a row for each program.
    advice: sentences about settings that fit.
  """

  def __init__(self, description: str, folder: pathlib.Path | None):
    self.description = description
    self.rows: list[TableRow] = []
    self.advice: list[str] = []
    self._folder = folder

  def add(self, row: TableRow) -> None:
    print(precompile_report.describe(row), flush=True)
    self.rows.append(row)
    self.write()

  def write(self) -> None:
    if self._folder is not None:
      precompile_report.write(self._folder, self.description, self.rows)

  def check(self) -> None:
    """Raises an error for programs that do not fit, with advice."""
    too_large = [row for row in self.rows if not row['fits']]
    if too_large:
      refusals = map(precompile_report.refusal, too_large)
      raise ValueError('\n'.join([*refusals, *self.advice]))


def _compile_train_step(
  compiler: pod_compiler.Compiler,
  setting: pod_compiler.Setting,
  report: _Report,
  suggest: bool,
  find_largest_batch: bool,
) -> None:
  """Adds the train step, and settings or a batch size that fit."""
  row = compiler.train_step(setting)
  report.add(row)
  if not row['fits'] and suggest:
    report.advice.append(precompile_report.advice(*compiler.advise(setting)))
  elif row['fits'] and find_largest_batch:
    row['largest_batch'] = compiler.largest_batch(setting, row)
    print(f'  the largest batch that fits: {row["largest_batch"]}')
    report.write()


def _check(program_names: Sequence[str], injection: str) -> None:
  """Validates PROGRAMS and INJECTION."""
  if injection not in l2s.INJECTIONS:
    raise ValueError(f'INJECTION={injection!r} is not one of {l2s.INJECTIONS}.')
  unknown = set(program_names) - set(pod_compiler.PROGRAMS)
  if unknown or isinstance(program_names, str):
    raise ValueError(
      f'PROGRAMS={program_names!r}: expected a tuple of '
      f'{pod_compiler.PROGRAMS}.'
    )
  if (
    pod_compiler.DECODE in program_names
    and pod_compiler.PREFILL not in program_names
  ):
    raise ValueError(
      f'PROGRAMS={program_names!r}: decode needs the result of prefill. Add '
      'prefill.'
    )


def _devices(slice_: chips.Slice) -> list[Any]:
  """Returns the TPU compiler's device descriptions of a slice.

  Raises:
    ValueError: if `libtpu` is not installed, or does not know the slice.
  """
  # The compiler for TPUs, which runs on any x86-64 Linux.
  extras.require('precompile', 'libtpu')
  # libtpu would query Google Cloud's metadata server, and wait.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', slice_.accelerator_type)
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  # Only one process may use TPUs, but any number may compile for them.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  # JAX's own computations must not look for a TPU.
  jax.config.update('jax_platforms', 'cpu')
  # Programs compiled for other machines cannot be loaded here.
  jax.config.update('jax_enable_compilation_cache', False)
  options: dict[str, Any] = {'wrap': _along_three(slice_.wraps, False)}
  if slice_.num_chips < 4:  # default: 2 x 2 chips per host
    options['chips_per_host_bounds'] = _along_three(slice_.shape, 1)
  if slice_.num_slices > 1:
    options['num_slices'] = slice_.num_slices
  try:
    topology = topologies.get_topology_desc(
      platform='tpu', topology_name=slice_.name, **options
    )
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(
      f'TOPOLOGY={slice_.name!r} is not a slice that the compiler supports. '
      f'Hosts have 2 x 2 chips, so each axis above 1 must be even. {error}'
    ) from None
  return list(topology.devices)


def _along_three(values: Sequence[Any], default: Any) -> tuple[Any, ...]:
  """Pads per-axis values to the compiler's three axes."""
  return (*values, *[default] * (3 - len(values)))
