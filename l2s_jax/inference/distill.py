# SPDX-License-Identifier: Apache-2.0
"""Sequence-level distillation: a teacher answers a training set's prompts.

Answers are written as by `infer`, so that a stopped command resumes. A
manifest, written last, marks the folder as complete. `data/distilled.py` makes
a task of the folder.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import gin

from l2s_jax.data import bound_tasks, distilled, tasks
from l2s_jax.inference import (
  answer_settings,
  pipeline,
  predictions,
  prompts,
  sampling,
)
from l2s_jax.models import l2s
from l2s_jax.runtime import distributed, files, gin_config, partitioning
from l2s_jax.systems import parameters
from l2s_jax.systems import session as session_lib
from l2s_jax.systems import system as system_lib
from l2s_jax.weights import run_format

_DIR = 'DISTILL_DIR'


@gin.configurable(module='l2s_jax')
def distill(
  checkpoint_path: str = gin.REQUIRED,
  mixture_or_task_name: str = gin.REQUIRED,
  distill_dir: str = gin.REQUIRED,
  task_feature_lengths: Mapping[str, int] = gin.REQUIRED,
  batch_size: int = 32,
  step: int | Literal['best'] | None = None,
  vocabulary: str | None = None,
  extra_ids: int = 0,
  mesh: partitioning.MeshConfig | None = None,
  decoding: sampling.Decoding | None = None,
  shard: int = 0,
  num_shards: int = 1,
  *,
  dry_run: bool = False,
) -> None:
  """Writes a teacher's answers to the prompts of a task's training split.

  The folder is training data for gin_configs/tasks/distilled.gin. A line has
  `prompt`, `target` (the task's own answer), `prediction`, and `ended`: for
  each answer, whether it reached EOS or a stop text within its token limit.
  With `Decoding.num_answers` it also has `predictions`, the best first, and
  `scores`. The same command resumes where it was stopped. `config.gin` is the
  operative config.

  Args:
    checkpoint_path: the teacher: a run of an LLM baseline (its MODEL_DIR); or a
      Hugging Face or converted folder, a T5X checkpoint, a GGUF file, or a name
      on the Hub.
    mixture_or_task_name: task with the prompts to answer. Of a mixture, distill
      each task separately, into a folder of its own.
    distill_dir: the output folder, local or in a bucket.
    task_feature_lengths: `inputs`, maximum number of prompt tokens (longer
      prompts are truncated, marked and counted); `targets`, largest number of
      tokens an answer. In tokens of the teacher's tokenizer.
    batch_size: prompts per batch at the full prompt length; batches of shorter
      prompts have more rows in the same memory.
    step: checkpoint step; None means the newest, 'best' the best by
      BEST_METRIC.
    vocabulary: tokenizer of a pretrained model without one.
    extra_ids: T5's sentinel ids behind its SentencePiece model.
    mesh: device mesh and axis rules.
    decoding: decoding settings; None means greedy. A sample depends only on the
      seed and on the index of its prompt.
    shard: index of the part of the prompts to answer, out of `num_shards`
      contiguous parts; the shard that finishes last completes the folder.
    num_shards: number of shards.
    dry_run: print sizes and shardings, then stop.

  Raises:
    FileNotFoundError: if the teacher or the task's data do not exist.
    ValueError: if the folder holds answers of another teacher, decoding or
      task, or a setting is invalid.
  """
  gin_config.check_lengths(task_feature_lengths)
  answering = answer_settings.Answering(
    checkpoint_path,
    step,
    llm_path=None,
    vocabulary=vocabulary,
    extra_ids=extra_ids,
    prompt_length=task_feature_lengths['inputs'],
    max_decode_len=task_feature_lengths['targets'],
    batch_size=batch_size,
    decoding=decoding or sampling.Decoding(),
    says_ends=True,
  )
  part = predictions.Shard(shard, num_shards)
  part.check()
  folder = files.folder(distill_dir, _DIR)
  label = f'MIXTURE_OR_TASK_NAME={mixture_or_task_name}'
  _check_task(mixture_or_task_name, label)
  session = session_lib.start(
    functools.partial(_load_teacher, answering),
    mesh,
    answering.lengths,
    batch_sizes={'BATCH_SIZE': batch_size},
  )
  read = prompts.task_reader(
    session_lib.bind_task(session.system, mixture_or_task_name, label),
    distilled.SPLIT,
    label,
    None if dry_run else answering.lengths,
  )
  if dry_run:
    print(session.describe())
    return

  with session.entered(), distributed.watch_preemption() as watcher:
    chosen = answering.choose_step()
    survey = prompts.survey(read(), 'target')
    if survey.num_bad == survey.num_lines:
      raise ValueError(
        f'{label}: none of the {survey.num_lines} prompts of split '
        f'{distilled.SPLIT!r} has text.'
      )
    settings = _settings(answering, session, mixture_or_task_name, chosen)
    tally = pipeline.answer_lines(
      functools.partial(answering.load, session, chosen),
      read,
      survey,
      part,
      folder,
      settings,
      watcher=watcher,
      named_by=_DIR,
    )
  if report := tally.describe(answering.prompt_length):
    distributed.say(report)
  if distributed.is_first():
    _complete(folder, part, settings | {'prompts_sha256': survey.sha256})
  distributed.wait_for_all('distill')


def _check_task(name: str, label: str) -> None:
  """Refuses a cached task: its cache has fixed answers.

  Raises:
    ValueError: if `name` is a cached task.
  """
  if bound_tasks.is_cached(name):
    raise ValueError(
      f'{label}: a cache has fixed answers. Give the task that was cached; the '
      'distilled task can be cached again.'
    )


def _load_teacher(answering: answer_settings.Answering) -> system_lib.System:
  """Returns the teacher's system.

  Raises:
    ValueError: if the teacher is not a single language model.
  """
  if answering.decoding.draft_len:
    raise ValueError(
      f'Decoding.draft_len={answering.decoding.draft_len} needs LLM-to-SLM, '
      'but the teacher is a single language model. Set Decoding.draft_len to 0.'
    )
  system = answering.load_system()
  if isinstance(system.module, l2s.LlmToSlm):
    raise ValueError(
      f'CHECKPOINT_PATH={answering.checkpoint_path} is an LLM-to-SLM run, '
      'which is the student. The teacher is a single language model: give a '
      'run of the LLM baseline, or a pretrained model.'
    )
  return system


def _settings(
  answering: answer_settings.Answering,
  session: session_lib.Session,
  mixture_or_task_name: str,
  step: int,
) -> dict[str, Any]:
  """Returns JSON-serialisable settings that affect the answers."""
  # On all hosts: restoring a checkpoint is collective.
  fingerprint = parameters.fingerprint(
    session.layout, answering.checkpoint_path, step
  )
  return {
    'mixture_or_task': mixture_or_task_name,
    'task_settings': distilled.settings_text(
      tasks.data_settings(mixture_or_task_name)
    ),
    'teacher': {
      'fingerprint': distributed.from_first(fingerprint),
      'vocabulary': session.system.answer_vocabulary.fingerprint(),
    },
    'decoding': dataclasses.asdict(answering.decoding),
    'task_feature_lengths': answering.lengths,
  } | answering.measured_settings()


def _complete(
  folder: pathlib.Path, part: predictions.Shard, settings: Mapping[str, Any]
) -> None:
  """Writes the manifest once all shards are complete; reports progress."""
  paths = [
    folder / predictions.Shard(index, part.count).name('predictions', '.jsonl')
    for index in range(part.count)
  ]
  missing = sum(not path.is_file() for path in paths)
  if missing:
    distributed.say(
      f'{folder}: this shard is done; {missing} of {part.count} shards are '
      'missing.'
    )
    return
  counts = distilled.count(predictions.read(paths))
  manifest = {
    **run_format.stamp(),
    **settings,
    'files': [
      {'name': path.name, 'sha256': distilled.sha256(path)} for path in paths
    ],
    'counts': counts,
  }
  files.write_json(folder / distilled.FILE, json.loads(json.dumps(manifest)))
  distributed.say(
    f'{folder} is complete: {counts["answers"]:,} answers to '
    f'{counts["prompts"]:,} prompts; {counts["unended"]:,} did not end within '
    f'{settings["task_feature_lengths"]["targets"]} tokens; UNENDED in '
    'gin_configs/tasks/distilled.gin drops or keeps them.'
  )
