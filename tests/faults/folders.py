# SPDX-License-Identifier: Apache-2.0
"""Folders of every kind that a user keeps, and what the program reads of them.

A run with two checkpoints, its LLM as a converted folder, answers of `infer`,
a cache of tokens and of LLM states, a bundle, and an exported model. `damage`
damages them.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterator
from typing import Any

import cache_files
import helpers
import jax

from l2s_jax.caching import cache_writer, feature_files, feature_writer
from l2s_jax.data.cached import cache_format, cache_task, feature_format
from l2s_jax.evaluation import evaluate, metric_writer, run_pairs, run_records
from l2s_jax.inference import infer, predictions
from l2s_jax.interop import convert, to_huggingface
from l2s_jax.interop.exports import bundling
from l2s_jax.models import l2s
from l2s_jax.runtime import files, integrity, partitioning
from l2s_jax.systems import bundle as bundle_lib
from l2s_jax.systems import model_paths, parameters, run_folder
from l2s_jax.systems import session as session_lib
from l2s_jax.systems import system as system_lib
from l2s_jax.training import checkpoint, optim
from l2s_jax.training import state as state_lib
from l2s_jax.weights import converted, manifest, opening, saved_steps
from l2s_jax.weights import source as source_lib
from l2s_jax.weights.formats import huggingface

MODULE = helpers.MODULES['llm_to_t5_1_0-add-shared']
STEPS = (4, 8)
KEPT_RUN = pathlib.Path(__file__).parents[1] / 'kept_runs' / '1' / 'l2s'
# Tokens of a cached example; some are longer.
LENGTHS = {'inputs': 14, 'targets': 8}
LINES = ('a b c', 'd e', 'f', 'g h i j', 'k l', 'm n o')
MESH = partitioning.MeshConfig(data=1)
_LAYOUTS: dict[str, parameters.Layout] = {}


def make(
  folder: pathlib.Path, wanted: Collection[str] = ('answers', 'cache', 'bundle')
) -> None:
  """Writes all folders into one.

  Args:
    folder: the one.
    wanted: the run and its LLM are always written; of the others, those that
      are named here, and those that are written with them.
  """
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
  _make_logs(folder / 'run')
  (folder / 'in.txt').write_text('\n'.join(LINES) + '\n')
  if {'answers', 'some_answers'} & set(wanted):
    with _partly(3):
      _infer(folder)
    shutil.copytree(folder / 'answers', folder / 'some_answers')
    _infer(folder)
  if 'cache' in wanted:
    _make_cache(folder, system)
  if {'bundle', 'model'} & set(wanted):
    _make_exports(folder)


def _make_logs(run: pathlib.Path) -> None:
  """Writes the log and the evaluations of a kept run as they are today."""
  with contextlib.closing(
    metric_writer.MetricWriter(run, tensorboard=False)
  ) as writer:
    for record in metric_writer.read(KEPT_RUN):
      writer.write(record['step'], metric_writer.scalars(record))
  shutil.copy2(KEPT_RUN / 'config.gin', run)
  shutil.copytree(KEPT_RUN / 'eval', run / 'eval')
  for path in (run / 'eval').glob('metrics-*.json'):
    scores = evaluate.read_scores(path)
    files.write_json(path, integrity.seal(scores))
    name = path.stem.removeprefix('metrics-')
    shutil.copy2(run / 'config.gin', path.with_name(f'config-{name}.gin'))
  for path in (run / 'eval').glob('*.jsonl'):
    predictions.write(path, list(predictions.read([path])))


def _make_cache(folder: pathlib.Path, system: system_lib.System) -> None:
  """Writes the tokens of two tasks, and the LLM's states of their prompts."""
  cache_files.write(
    folder / 'cache',
    {
      name: {'train': cache_files.random_examples(size, seed=size)}
      for name, size in (('one', 12), ('other', 5))
    },
    num_shards=2,
  )
  session = session_lib.start(
    lambda: dataclasses.replace(system, llm_fingerprint='f' * 64),
    partitioning.MeshConfig(data=len(jax.devices())),
    LENGTHS,
    batch_sizes={},
  )
  cache = cache_format.open_cache(folder / 'cache')
  plan = feature_files.make_plan(
    cache, session.system, 'bfloat16', LENGTHS['inputs']
  )
  with session.entered(), contextlib.redirect_stderr(io.StringIO()):
    feature_files.settle_plan(cache.folder, plan)
    frozen = jax.device_put(
      helpers.random_params(MODULE)['llm'],
      session.layout.shardings['llm'],
    )
    feature_writer.write(
      session,
      {'llm': frozen},
      cache,
      feature_files.missing_of(cache),
      plan,
      batch_size=8,
    )
  feature_files.finish(cache, plan)
  tokens = dict(cache.content)
  for of_task in tokens['tasks'].values():
    for of_split in of_task['splits'].values():
      del of_split['index_digests']
  (folder / 'plan.json').write_text(
    json.dumps({'tokens': tokens, 'features': plan})
  )


def _make_exports(folder: pathlib.Path) -> None:
  """Writes the run as a bundle, and a model as `--to=hf` does."""
  parts = bundling.open_parts(str(folder / 'run'), None, None)
  (folder / 'bundle').mkdir()
  bundling.write(parts, folder / 'bundle', None)
  config = MODULE.slm_config
  params = helpers.random_params(l2s.build(config), 2)
  vocabulary = helpers.vocabulary()
  model = folder / 'model'
  to_huggingface.save(helpers.Arrays(config, params), model, vocabulary)
  vocabulary.save(model)
  manifest.write(model, 'hf', {})


def _system(folder: pathlib.Path) -> system_lib.System:
  return dataclasses.replace(
    helpers.system(MODULE), sources={'llm': str(folder / 'llm')}
  )


def _layout(system: system_lib.System) -> parameters.Layout:
  # Most of the time of a trial; damage seldom changes it.
  kinds = system.frozen, system.frozen_dtype, system.cached_states
  key = repr((system.module, *kinds))
  if key not in _LAYOUTS:
    mesh = partitioning.make_mesh(MESH, jax.devices()[:1])
    _LAYOUTS[key] = parameters.layout(system, mesh, MESH)
  return _LAYOUTS[key]


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


def read_cache(folder: pathlib.Path) -> dict[str, Any]:
  """Returns an epoch of batches with LLM states, and all texts."""
  cache = cache_format.open_cache(folder / 'cache')
  vocabulary = helpers.vocabulary()
  task = cache_task.CachedTask(
    cache,
    vocabulary,
    vocabulary,
    dict.fromkeys(cache.tasks, ()),
    feature_format.open_features(cache),
  )
  task.check_data('train', LENGTHS)
  batches = task.train_batches(
    task_feature_lengths=LENGTHS, batch_size=4, seed=0, pack=True
  )
  with contextlib.closing(batches):
    parts = [dict(next(batches).batch) for _ in range(12)]
  texts = {
    name: [
      cache_format.decode_texts(record, split.dtype)
      for split in [cache.split(name, 'train')]
      for record in split.read(range(len(split)))
    ]
    for name in cache.tasks
  }
  return {'parts': parts, 'texts': texts}


def finish_cache(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the same of a cache whose last step, its descriptions, is redone.

  As after a kill before `cache.json` was there.
  """
  plan = json.loads((folder / 'plan.json').read_text())
  cache = folder / 'cache'
  (cache / cache_format.FILE).unlink(missing_ok=True)
  (cache / feature_format.FILE).unlink(missing_ok=True)
  cache_writer.finish(cache, plan['tokens'])
  feature_files.finish(cache_format.open_cache(cache), plan['features'])
  return read_cache(folder)


def read_bundle(folder: pathlib.Path) -> dict[str, Any]:
  """Returns all that `infer` reads of a bundle."""
  bundle_lib._open.cache_clear()  # Each process opens it anew.
  system = model_paths.load(str(folder / 'bundle'))
  params = parameters.load_params(
    system, _layout(system), folder / 'bundle', None
  )
  return {
    'params': jax.device_get(params),
    'model': system.describe(),
    'ids': _ids(system),
  }


def read_model(folder: pathlib.Path) -> dict[str, Any]:
  """Returns all that is read of an exported model."""
  system = model_paths.load(str(folder / 'model'))
  source = opening.open_source(str(folder / 'model'))
  return {'arrays': _tensors(source), 'ids': _ids(system)}


def read_report(folder: pathlib.Path) -> dict[str, Any]:
  """Returns what `report` reads of a run."""
  (run,) = run_records.read_all([str(folder / 'run')])
  differences: dict[str, Any] = {}
  for name in run.evaluations:
    rows, notes = run_pairs.differences(name, [run])
    print(*notes, sep='\n')  # As the report has them.
    differences |= {f'{name}, {row["other"]}': row for row in rows}
  return {
    'log': dict(run.log),
    'evaluations': {k: str(v) for k, v in run.evaluations.items()},
    'differences': differences,
  }


class _Stopped(Exception):
  """Inference has come as far as it was to."""


@contextlib.contextmanager
def _partly(count: int) -> Iterator[None]:
  """Stops inference when the writer has been given so many batches."""
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
  'report': ('run', read_report),
  'LLM of a run': ('llm', read),
  'convert --to=l2s': ('llm', to_l2s),
  'infer again': ('some_answers', answer),
  'infer, all there': ('answers', answer_again),
  'train from a cache': ('cache', read_cache),
  'cache again': ('cache', finish_cache),
  'infer from a bundle': ('bundle', read_bundle),
  'infer from an export': ('model', read_model),
}
