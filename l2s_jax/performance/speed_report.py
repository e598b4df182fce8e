# SPDX-License-Identifier: Apache-2.0
"""Reports of `benchmark`: JSON, Markdown and PNG."""

import importlib.metadata
import pathlib
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from l2s_jax.evaluation import report
from l2s_jax.evaluation.report import TableRow
from l2s_jax.performance import contenders, peers
from l2s_jax.runtime import chips, distributed, files

JSON, MARKDOWN, PNG = 'benchmark.json', 'benchmark.md', 'benchmark.png'
_TIMES = {
  'system': 'system',
  'model': 'model',
  'engine': 'engine',
  'dtype': 'dtype',
  'prefill_ms': 'prefill ms',
  'first_token_ms': 'first token ms',
  'ms_per_token': 'ms/token',
  'ms_per_token_spread': 'quartiles',
  'tokens_per_sec': 'tokens/s',
  'num_written': 'tokens/answer',
  'total_ms': 'total ms',
  'total_ms_spread': 'quartiles',
  'speedup': 'x LLM',
  'bandwidth_percent': '% of bandwidth',
  'acceptance_percent': '% of drafts kept',
  'equal_percent': '% of tokens equal',
  'first_call_secs': 'first call s',
  **report.MAIN_SCORES,
}
_COSTS = {
  'system': 'system',
  'model': 'model',
  'dtype': 'dtype',
  'params_millions': 'M parameters',
  'memory_mb': 'memory MB',
  'gflops_per_prompt': 'GFLOP/prompt',
  'mflops_per_token': 'MFLOP/token',
  'mb_per_step': 'MB read/step',
}
# Columns in other units: source column and factor.
_UNITS = {
  'bandwidth_percent': ('bandwidth_fraction', 100),
  'acceptance_percent': ('acceptance', 100),
  'equal_percent': ('equal_tokens', 100),
  'params_millions': ('num_params', 1e-6),
  'gflops_per_prompt': ('flops_per_prompt', 1e-9),
  'mflops_per_token': ('flops_per_token', 1e-6),
  'mb_per_step': ('bytes_per_step', 1e-6),
  'memory_mb': ('memory_bytes', 1e-6),
}
_SHAPE = ('batch_size', 'prompt_length', 'num_tokens')
_WORDS = """\
Times are medians over {rounds} rounds, with quartiles. The contenders take
turns in each round. Both speeds follow from the time of one token and the time
of all n tokens: ms/token = (all - one) / (n - 1), prefill = one - ms/token.
EOS does not end an answer, except in rows `to EOS`: there ms/token is the total
time, with prefill, divided by the number of generated tokens. `x LLM` is the
total time of our unquantized LLM divided by that of the row; for rows `to EOS`,
that of the LLM to EOS. `MB read/step` is the memory traffic of one decode step:
the weights once, and the cache of each row at the mean answer length. `% of
bandwidth` is the speed of this traffic relative to {bandwidth:.1f} GB/s, the
highest bandwidth measured on this machine, by reading one large array in the
same rounds; more than 100 % is possible with CPU caches. FLOPs are those of
matrix products. Memory is weights, cache and temporaries of our compiled
functions. `process_peak_mb` is that of the whole process, with all engines and
the array of the bandwidth measurement. `% of tokens equal` compares with the
tokens of our float32 model; for speculative decoding, with those of the LLM.
CTranslate2 cannot generate EOS before the end of an answer, and generates its
second choice there. On a GPU, JAX and torch may compute float32 products in
TF32. `first call s` is the time of compilation and one run.
"""


def machine() -> dict[str, Any]:
  """Returns the hardware and software versions of the timings."""
  packages = ('jax', 'jaxlib', 'flax')
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  description: dict[str, Any] = {
    'cpu': chips.cpu(),
    'cpu_cores': distributed.num_cores(),
    'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in packages},
    **peers.versions(),
    # In kilobytes, except on macOS: bytes.
    'process_peak_mb': peak / (1e6 if sys.platform == 'darwin' else 1e3),
  }
  stats = jax.devices()[0].memory_stats()
  if stats:
    description['device_peak_mb'] = stats['peak_bytes_in_use'] / 1e6
  return description


def write(
  folder: pathlib.Path,
  rows: Sequence[TableRow],
  machine: Mapping[str, Any],
  settings: Mapping[str, Any],
) -> str:
  """Writes benchmark.json, benchmark.md and benchmark.png; returns the tables.

  Args:
    folder: output folder.
    rows: a row for each contender at each shape.
    machine: from `machine`.
    settings: settings of the benchmark.
  """
  content = {
    'rows': rows,
    'machine': machine,
    'settings': settings,
  }
  files.write_json(folder / JSON, content)
  text = markdown(rows, machine, settings)
  with files.whole(folder / MARKDOWN) as file:
    file.write(text)
  plot(rows, folder / PNG)
  return text


def markdown(
  rows: Sequence[TableRow],
  machine: Mapping[str, Any],
  settings: Mapping[str, Any],
) -> str:
  """Returns two Markdown tables, times and costs, for each shape."""
  parts = ['# Benchmark\n']
  for shape, group in by_shape(rows).items():
    llms = {row['system']: row for row in group if _is_llm(row)}
    shown = [_shown(row, llms) for row in group]
    ours = [row for row in shown if row['engine'] == contenders.OURS]
    parts += [
      f'## Batch {shape[0]}, {shape[1]} tokens in, {shape[2]} out\n',
      report.markdown_table(shown, report.columns_in(shown, _TIMES)),
      report.markdown_table(ours, report.columns_in(ours, _COSTS)),
    ]
  bandwidth = machine['bandwidth_gb_per_sec']
  parts.append(_WORDS.format(rounds=settings['rounds'], bandwidth=bandwidth))
  facts = {**machine, **settings}
  parts.append(''.join(f'- {name}: {_fact(x)}\n' for name, x in facts.items()))
  return '\n'.join(parts)


def by_shape(rows: Sequence[TableRow]) -> dict[tuple[int, ...], list[TableRow]]:
  """Groups rows by batch size, prompt length and output length."""
  groups: dict[tuple[int, ...], list[TableRow]] = {}
  for row in rows:
    groups.setdefault(tuple(row[key] for key in _SHAPE), []).append(row)
  return groups


def _is_llm(row: TableRow) -> bool:
  return (
    row['system'] in (contenders.LLM, contenders.LLM_TO_EOS)
    and row['engine'] == contenders.OURS
    and not row['dtype'].startswith('int')
  )


def _shown(row: TableRow, llms: Mapping[str, TableRow]) -> dict[str, Any]:
  """Returns a row with its values in the units of the tables."""
  shown = {**row, **row.get('scores', {})}
  for name, (source, factor) in _UNITS.items():
    if row.get(source) is not None:
      shown[name] = row[source] * factor
  for name in ('ms_per_token', 'total_ms'):
    low, high = row[f'{name}_low'], row[f'{name}_high']
    digits = 1 if row[name] >= 10 else 2
    shown[f'{name}_spread'] = f'{low:.{digits}f}-{high:.{digits}f}'
  llm = llms.get(contenders.llm_of(row['system']))
  if llm is not None:
    shown['speedup'] = llm['total_ms'] / row['total_ms']
  return shown


def _fact(value: Any) -> str:
  return f'{value:,.1f}' if isinstance(value, float) else str(value)


def plot(rows: Sequence[TableRow], path: pathlib.Path) -> None:
  """Writes a PNG with a panel for each shape and a bar for each contender.

  A bar consists of prefill and decoding.
  """
  # Imported here: it takes a second, and only reports need it.
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  groups = by_shape(rows)
  most = max(map(len, groups.values()))
  figure, panels = pyplot.subplots(
    len(groups),
    figsize=(8, (0.35 * most + 1.2) * len(groups)),
    layout='constrained',
    squeeze=False,
  )
  for panel, (shape, group) in zip(panels[:, 0], groups.items(), strict=True):
    names = [
      f'{row["system"]}, {row["model"]}\n{row["engine"]} {row["dtype"]}'
      for row in group
    ]
    # Answers that end with EOS have a single bar.
    prefill = [row.get('prefill_ms', 0) for row in group]
    tokens = [
      row['total_ms'] - of_prompt
      for row, of_prompt in zip(group, prefill, strict=True)
    ]
    places = range(len(group))
    panel.barh(places, prefill, label='prefill')
    panel.barh(places, tokens, left=prefill, label='tokens')
    panel.set_yticks(places, names, fontsize=7)
    panel.invert_yaxis()
    panel.set_xlabel('ms')
    panel.set_title(f'batch {shape[0]}, {shape[1]} tokens in, {shape[2]} out')
    panel.grid(axis='x', alpha=0.3)
  panels[0, 0].legend()
  figure.savefig(path, dpi=120)
  pyplot.close(figure)
