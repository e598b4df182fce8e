# SPDX-License-Identifier: Apache-2.0
"""Reports of `precompile`: text, JSON and Markdown."""

import json
import pathlib
from collections.abc import Sequence

from l2s_jax.evaluation.report import TableRow
from l2s_jax.runtime import chips, files

_NUM_COLLECTIVES = 8


def describe(row: TableRow) -> str:
  """Formats the row of a program as text."""
  title = f'{row["program"]}, {row["batch_size"]} rows'
  if 'flops' not in row:
    return f'{title}: DOES NOT FIT, {chips.gib(row["peak_bytes"])} per device'
  verdict = 'fits' if row['fits'] else 'DOES NOT FIT'
  lines = [
    f'{title}: {verdict}, {chips.gib(row["peak_bytes"])} per device, '
    f'{100 * row["free_fraction"]:.0f} % free',
    f'  arguments {chips.gib(row["argument_bytes"])}, temporaries '
    f'{chips.gib(row["temporary_bytes"])}',
    f'  {row["flops"]:.4g} FLOPs ({row["model_flops"]:.4g} of the model), '
    f'{row["hbm_bytes_moved"] / 1e9:.3g} GB through HBM, '
    f'{row["collective_bytes"] / 1e9:.3g} GB from other devices',
    f'  at least {_ms(row["bound_secs"])}: compute {_ms(row["compute_secs"])}, '
    f'HBM {_ms(row["hbm_secs"])}, interconnect '
    f'{_ms(row["interconnect_secs"])}',
    f'  utilization at most {100 * row["utilization_bound"]:.1f} %',
    f'  compiled in {row["compile_secs"]:.0f} s',
  ]
  for name in ('arguments', 'temporaries'):
    lines.append(f'  largest {name}:')
    lines += [f'    {_tensor(tensor)}' for tensor in row[name]]
  if row['loops_counted_once']:
    lines.append(
      f'  {row["loops_counted_once"]} loops have a trip count that depends on '
      'data, and were counted once: all figures except memory are too low'
    )
  lines.append('  collectives:')
  for x in row['collectives'][:_NUM_COLLECTIVES]:
    lines.append(
      f'    {x["bytes"] / 1e6:9.1f} MB in {x["count"]:.0f} {x["kind"]} of '
      f'{x["group_size"]} devices, {x["shape"]}: {x["op_name"]}'
    )
  rest = row['collectives'][_NUM_COLLECTIVES:]
  if rest:
    total = sum(x['bytes'] for x in rest)
    lines.append(f'    {total / 1e6:9.1f} MB in {len(rest)} other kinds')
  return '\n'.join(lines)


def refusal(row: TableRow) -> str:
  """Returns the error for a program that does not fit.

  It names the bytes required and the largest tensors.
  """
  free = row['peak_bytes'] / (1 - row['free_fraction'])
  takes = f'{chips.gib(row["peak_bytes"])} of the {chips.gib(free)}'
  lines = [
    f'{row["program"]} for {row["batch_size"]} rows does not fit on '
    f'{row["topology"]}: it needs {takes} of a device. Largest arguments per '
    'device:',
    *(f'  {_tensor(tensor)}' for tensor in row['arguments']),
  ]
  if row.get('temporaries'):
    lines.append('Largest temporaries:')
    lines += [f'  {_tensor(tensor)}' for tensor in row['temporaries']]
  return '\n'.join(lines)


def advice(text: str, row: TableRow | None) -> str:
  """Formats the advice of `Compiler.advise`.

  Args:
    text: the advice.
    row: costs of the program that fits, with its temporaries, which the
      compiler reports for such programs only; None if none fits.
  """
  if row is None:
    return text
  lines = [text, 'Its largest temporaries:']
  return '\n'.join([*lines, *(f'  {_tensor(x)}' for x in row['temporaries'])])


def write(
  folder: pathlib.Path, description: str, rows: Sequence[TableRow]
) -> None:
  """Writes precompile.json and precompile.md."""
  folder.mkdir(parents=True, exist_ok=True)
  with files.whole(folder / 'precompile.json') as file:
    json.dump(
      {'description': description.splitlines(), 'programs': list(rows)},
      file,
      indent=2,
    )
  columns = (
    'program', 'rows', 'fits', 'GiB per device', 'free', 'time at least',
    'bound by', 'utilization at most',
  )  # fmt: skip
  table = [columns, ('---',) * len(columns), *map(_cells, rows)]
  with files.whole(folder / 'precompile.md') as file:
    lines = [f'- {line}' for line in description.splitlines()]
    lines += ['', *(f'| {" | ".join(cells)} |' for cells in table), '']
    file.write('\n'.join(lines))


def _cells(row: TableRow) -> tuple[str, ...]:
  first = (
    row['program'],
    str(row['batch_size']),
    'yes' if row['fits'] else 'no',
    f'{row["peak_bytes"] / chips.GIB:.2f}',
    f'{100 * row["free_fraction"]:.0f} %',
  )
  if 'flops' not in row:
    return (*first, '', '', '')
  times = {
    name: row[f'{name}_secs'] for name in ('compute', 'hbm', 'interconnect')
  }
  return (
    *first,
    _ms(row['bound_secs']),
    max(times, key=lambda name: times[name]),
    f'{100 * row["utilization_bound"]:.1f} %',
  )


def _tensor(tensor: TableRow) -> str:
  return f'{chips.gib(tensor["bytes"])} {tensor["shape"]} {tensor["name"]}'


def _ms(secs: float) -> str:
  return f'{1e3 * secs:.3g} ms'
