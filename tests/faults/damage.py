# SPDX-License-Identifier: Apache-2.0
"""Damages each file of a run, a converted folder and predictions, and reads on.

    PYTHONPATH=.:tests python -m faults.damage [--flips=20] [--seed=0]

A file is cut in half, emptied, deleted, or has one bit flipped. Then it is read
as training that goes on, inference, conversion and a restarted `infer` read
it. What comes of it is one of

    equal     the same numbers as without the damage (which may have been said)
    older     those of the older step, and both steps were named
    refused   one sentence
    wrong     other numbers without a word: must never be
    crashed   any other exception: must never be
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import logging
import pathlib
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import helpers
import jax
import numpy as np

from l2s_jax import __main__ as command_line
from l2s_jax.inference import infer
from l2s_jax.interop import convert
from l2s_jax.models import l2s
from l2s_jax.runtime import partitioning
from l2s_jax.systems import parameters, run_folder
from l2s_jax.systems import system as system_lib
from l2s_jax.training import checkpoint, optim
from l2s_jax.training import state as state_lib
from l2s_jax.weights import converted, saved_steps
from l2s_jax.weights import source as source_lib
from l2s_jax.weights.formats import huggingface

MODULE = helpers.MODULES['llm_to_t5_1_0-add-shared']
STEPS = (4, 8)
KINDS = ('cut', 'empty', 'delete', 'flip')
LINES = ('a b c', 'd e', 'f', 'g h i j', 'k l', 'm n o')
MESH = partitioning.MeshConfig(data=1)


def make(folder: pathlib.Path) -> None:
  """Writes an LLM (`llm`), a run with it (`run`), its text (`in.txt`)."""
  folder.mkdir(parents=True, exist_ok=True)
  config = MODULE.llm_config
  source = helpers.Arrays(config, helpers.random_params(l2s.build(config), 1))
  (folder / 'llm').mkdir()
  converted.save(source, folder / 'llm')
  system = _system(folder)
  system, _ = parameters.load_frozen(system, _layout(system))
  run_folder.save(system, folder / 'run')
  optimizer = optim.adamw().make({})
  with contextlib.closing(
    checkpoint.Checkpointer(folder / 'run')
  ) as checkpointer:
    for step in STEPS:
      params = helpers.random_params(MODULE, step)
      trainable = parameters.split(params, system.frozen)[1]
      state = state_lib.create(trainable, optimizer, step)
      state = dataclasses.replace(state, step=jax.numpy.int32(step))
      data = {'num_rows': 8 * step, 'sums': {'loss': 0.1 * step}}
      checkpointer.save(state, data, system.describe())
    checkpointer.keep_best('loss', {4: 2.0, 8: 1.0})
  (folder / 'in.txt').write_text('\n'.join(LINES) + '\n')
  with _partly(3):
    _infer(folder)
  shutil.copytree(folder / 'answers', folder / 'some_answers')
  _infer(folder)


def _system(folder: pathlib.Path) -> system_lib.System:
  return dataclasses.replace(
    helpers.system(MODULE), sources={'llm': str(folder / 'llm')}
  )


def _layout(system: system_lib.System) -> parameters.Layout:
  return parameters.layout(
    system, partitioning.make_mesh(MESH, jax.devices()[:1]), MESH
  )


def resume(folder: pathlib.Path) -> dict[str, Any]:
  """Returns what training goes on from; mends what training mends."""
  run = folder / 'run'
  system = run_folder.pin_llm(_system(folder), run)
  layout = _layout(system)
  system, frozen = parameters.load_frozen(system, layout)
  run_folder.save(system, run)
  trainable, shardings = (
    parameters.split(tree, system.frozen)[1]
    for tree in (layout.shapes, layout.shardings)
  )
  shapes, state_shardings = state_lib.shardings(
    trainable,
    shardings,
    optim.adamw().make({}),
    partitioning.make_mesh(MESH, jax.devices()[:1]),
  )
  with contextlib.closing(checkpoint.Checkpointer(run)) as checkpointer:
    data = checkpointer.restore_data()
    state = checkpointer.restore(shapes, state_shardings)
  assert state is not None, 'training begins anew'
  return {
    'data': data,
    'state': jax.device_get(state),
    'frozen': jax.device_get(frozen),
    'model': run_folder.load(run).describe(),
    'ids': _ids(run_folder.load(run)),
  }


def read(folder: pathlib.Path) -> dict[str, Any]:
  """Returns all that an evaluation or inference reads of a run."""
  run = folder / 'run'
  system = run_folder.load(run)
  _, step = saved_steps.params_folder(run)
  params = parameters.load_params(system, _layout(system), run, step)
  return {
    'step': step,
    'params': jax.device_get(params),
    'model': system.describe(),
    'ids': _ids(system),
  }


def read_best(folder: pathlib.Path) -> dict[str, Any]:
  """Returns what an evaluation reads that was asked for the best step."""
  run = folder / 'run'
  system = run_folder.load(run)
  _, step = saved_steps.params_folder(run, 'best')
  params = parameters.load_params(system, _layout(system), run, step)
  return {'step': step, 'params': jax.device_get(params), 'ids': _ids(system)}


def _ids(system: system_lib.System) -> list[Any]:
  return [
    (v.start_id, v.eos_id, v.pad_id, *map(tuple, map(v.encode, LINES)))
    for v in (system.prompt_vocabulary, system.answer_vocabulary)
  ]


def to_hf(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the SLM of the run as `convert --to=hf` writes it."""
  out = folder / 'hf'
  convert.convert(str(folder / 'run'), str(out), from_='l2s', to='hf')
  return _tensors(huggingface.HuggingFaceFolder(out / 'slm'))


def to_l2s(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the LLM as `convert --to=l2s` writes it again."""
  out = folder / 'again'
  convert.convert(
    str(folder / 'llm'),
    str(out),
    from_='l2s',
    to='l2s',
    vocabulary=str(folder / 'run' / 'vocabularies' / 'prompt'),
  )
  return _tensors(converted.ConvertedFolder(out))


def _tensors(source: source_lib.Source) -> dict[str, Any]:
  config = dataclasses.asdict(source.config)
  return {'config': config} | {
    '/'.join(path): source.read(path) for path in source.shapes()
  }


def answer(folder: pathlib.Path) -> list[Any]:
  """Returns the answers of `infer`, started in a folder that has some."""
  _infer(folder, 'some_answers')
  return _answers(folder / 'some_answers')


def answer_again(folder: pathlib.Path) -> list[Any]:
  """Returns the answers of `infer`, started in a folder that has all."""
  _infer(folder)
  return _answers(folder / 'answers')


def _answers(folder: pathlib.Path) -> list[Any]:
  lines = (folder / 'predictions.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def _infer(folder: pathlib.Path, answers: str = 'answers') -> None:
  with contextlib.suppress(_Stopped):
    infer.infer(
      checkpoint_path=str(folder / 'run'),
      input=str(folder / 'in.txt'),
      output_dir=str(folder / answers),
      prompt_length=8,
      max_decode_len=4,
      batch_size=1,
      mesh=partitioning.MeshConfig(data=len(jax.devices())),
    )


class _Stopped(Exception):
  """Inference has come as far as it was to."""


@contextlib.contextmanager
def _partly(count: int) -> Iterator[None]:
  """Stops inference when the writer has been given so many batches."""
  from l2s_jax.inference import predictions

  append = predictions.GrowingFile.append
  calls = []

  def counting(self, records):
    append(self, records)
    calls.append(len(records))
    if len(calls) == count:
      raise _Stopped

  predictions.GrowingFile.append = counting  # type: ignore[method-assign]
  try:
    yield
  finally:
    predictions.GrowingFile.append = append  # type: ignore[method-assign]


# What is damaged, and how it is read then.
READERS: dict[str, tuple[str, Callable[[pathlib.Path], Any]]] = {
  'resume': ('run', resume),
  'infer, evaluate': ('run', read),
  'infer, evaluate the best': ('run', read_best),
  'convert --to=hf': ('run', to_hf),
  'LLM of a run': ('llm', read),
  'convert --to=l2s': ('llm', to_l2s),
  'infer again': ('some_answers', answer),
  'infer, all there': ('answers', answer_again),
}


def damage(path: pathlib.Path, kind: str, rng: random.Random) -> None:
  """Damages one file."""
  content = bytearray(path.read_bytes())
  if kind == 'delete':
    path.unlink()
    return
  if kind == 'cut':
    content = content[: len(content) // 2]
  elif kind == 'empty':
    content = bytearray()
  elif content:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  path.write_bytes(content)


def same(a: Any, b: Any) -> bool:
  """Returns whether two trees hold the same, bit for bit."""
  leaves, structure = jax.tree.flatten(a)
  others, other_structure = jax.tree.flatten(b)
  return str(structure) == str(other_structure) and all(
    np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(leaves, others, strict=True)
  )


def outcome(
  reader: Callable[[pathlib.Path], Any],
  folder: pathlib.Path,
  expected: Any,
  older: Any,
) -> tuple[str, str]:
  """Reads a damaged folder; returns what came of it, and what was said."""
  said = io.StringIO()
  try:
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
      found = reader(folder)
  except (ValueError, FileNotFoundError) as error:
    # By the rule that makes a sentence of it on the command line.
    if command_line._is_deliberate(error):
      return 'refused', str(error)
    return 'crashed', f'{type(error).__name__}: {error}'
  # What is counted is what nobody foresaw.
  except Exception as error:
    return 'crashed', f'{type(error).__name__}: {error}'
  if same(found, expected):
    return 'equal', said.getvalue()
  if older is not None and same(found, older):
    named = all(f'checkpoints/{s}' in said.getvalue() for s in STEPS[1:])
    return ('older' if named else 'wrong'), said.getvalue()
  return 'wrong', said.getvalue()


def trial(
  good: pathlib.Path,
  place: pathlib.Path,
  file: pathlib.Path,
  kind: str,
  rng: random.Random,
) -> pathlib.Path:
  """Returns a copy of a good folder with one file of it damaged."""
  shutil.rmtree(place, ignore_errors=True)
  shutil.copytree(good, place)
  # The run knows its LLM by its path.
  model = place / 'run' / 'model.json'
  model.write_text(model.read_text().replace(str(good), str(place)))
  damage(place / file, kind, rng)
  return place


def run(
  num_flips: int,
  seed: int,
  readers: tuple[str, ...] = tuple(READERS),
  kinds: tuple[str, ...] = KINDS,
  every: int = 1,
) -> tuple[dict[str, collections.Counter[str]], list[str]]:
  """Returns counts of outcomes by reader, and a line for each bad one.

  Args:
    num_flips: places to flip a bit at, for each file.
    seed: of these.
    readers: some of `READERS`.
    kinds: some of `KINDS`.
    every: damages every so many files only.
  """
  rng = random.Random(seed)
  counts: dict[str, collections.Counter[str]] = {}
  bad: list[str] = []
  with tempfile.TemporaryDirectory() as scratch:
    good, place = pathlib.Path(scratch, 'good'), pathlib.Path(scratch, 'bad')
    make(good)
    for name in readers:
      damaged, reader = READERS[name]
      expected, older = _expected(good, place, reader)
      files = sorted(
        path.relative_to(good)
        for path in (good / damaged).rglob('*')
        if path.is_file()
      )
      counts[name] = collections.Counter()
      for file in files[::every]:
        for kind in kinds:
          for _ in range(num_flips if kind == 'flip' else 1):
            folder = trial(good, place, file, kind, rng)
            result, words = outcome(reader, folder, expected, older)
            counts[name][result] += 1
            if result in ('wrong', 'crashed'):
              bad.append(f'{name}: {file} {kind}: {result} {words[:300]!r}')
  return counts, bad


def _expected(
  good: pathlib.Path,
  place: pathlib.Path,
  reader: Callable[[pathlib.Path], Any],
) -> tuple[Any, Any]:
  """Returns what is read of a good folder, and of its older step."""
  results: list[Any] = []
  for steps in (STEPS, STEPS[:1]):
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(good, place)
    model = place / 'run' / 'model.json'
    model.write_text(model.read_text().replace(str(good), str(place)))
    for step in set(STEPS) - set(steps):
      shutil.rmtree(place / 'run' / 'checkpoints' / str(step))
      (place / 'run' / 'best.json').unlink()
    if steps != STEPS and reader in (read_best, answer, answer_again):
      results.append(None)  # The step is asked for, or was settled before.
    else:
      results.append(reader(place))
  return results[0], results[1]


def table(counts: dict[str, collections.Counter[str]]) -> str:
  """Returns the counts as a table in Markdown."""
  names = ('equal', 'older', 'refused', 'wrong', 'crashed')
  lines = [
    f'| read as | trials | {" | ".join(names)} |',
    '| --- |' + ' ---: |' * (len(names) + 1),
  ]
  total: collections.Counter[str] = collections.Counter()
  for name, counter in counts.items():
    total += counter
    cells = ' | '.join(str(counter[n]) for n in names)
    lines.append(f'| {name} | {counter.total()} | {cells} |')
  cells = ' | '.join(str(total[n]) for n in names)
  lines.append(f'| all | {total.total()} | {cells} |')
  return '\n'.join(lines)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--flips', type=int, default=20)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--readers', nargs='*', default=tuple(READERS))
  parser.add_argument('--every', type=int, default=1)
  args = parser.parse_args()
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  found, problems = run(
    args.flips, args.seed, tuple(args.readers), every=args.every
  )
  print('\n'.join(problems))
  print(table(found))
  sys.exit(bool(problems))
