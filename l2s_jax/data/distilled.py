# SPDX-License-Identifier: Apache-2.0
"""Distilled answers: a teacher's answers to the prompts of a training set.

The verb `distill` writes a folder:

    predictions*.jsonl   one line per prompt, in order; see `inference`
    distilled.json       manifest: task, teacher, decoding and file digests;
                         written last, so it marks a complete folder

This module opens such a folder and turns its lines into training examples. It
needs no TensorFlow.
"""

import collections
import dataclasses
import hashlib
import json
import math
import pathlib
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from l2s_jax.runtime import console, files, integrity, storage
from l2s_jax.weights import run_format

FILE = run_format.DISTILLED
ANSWERS = ('best', 'each', 'drawn')
UNENDED = ('drop', 'keep')
SPLIT = 'train'  # The distilled split.

_KEYS = {
  'mixture_or_task': str,
  'task_settings': str,
  'prompts_sha256': str,
  'teacher': dict,
  'decoding': dict,
  'task_feature_lengths': dict,
  'files': list,
  'counts': dict,
}
_REMEDY = 'run `distill` again with the same settings to replace lost answers.'


@dataclasses.dataclass(frozen=True)
class Folder:
  """A complete folder of distilled answers.

  Attributes:
    path: path of the folder.
    manifest: content of `distilled.json`.
  """

  path: pathlib.Path
  manifest: Mapping[str, Any]

  @property
  def task(self) -> str:
    """Name of the task with the answered prompts."""
    return self.manifest['mixture_or_task']

  @property
  def digest(self) -> str:
    """Hash of all answers, in their order."""
    digests = [file['sha256'] for file in self.manifest['files']]
    return hashlib.sha256(' '.join(digests).encode()).hexdigest()

  def check_task(self, task_settings: Mapping[str, Any]) -> None:
    """Refuses answers to the prompts of another task or of older data.

    Args:
      task_settings: current settings of the task, from `tasks.data_settings`.

    Raises:
      ValueError: with a line for each difference.
    """
    lines = files.differences(
      json.loads(self.manifest['task_settings']),
      json.loads(settings_text(task_settings)),
      have='distilled with',
      want='now',
    )
    if lines:
      raise ValueError(
        f'DISTILL_DIR={self.path} was distilled from the task {self.task!r} '
        'with other settings:\n'
        + '\n'.join(lines)
        + '\nPut the gin file of that task before distilled.gin, with the '
        'settings used for `distill`, or distill again into another folder.'
      )

  def records(self) -> Iterator[dict[str, Any]]:
    """Yields the records of all files in order, one per prompt.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if the digest of a file differs from the manifest's.
    """
    for file in self.manifest['files']:
      path = self.path / file['name']
      if not path.is_file():
        raise FileNotFoundError(
          f'DISTILL_DIR={self.path}: {file["name"]} is missing; {_REMEDY}'
        )
      with storage.fetched(path) as local:
        if integrity.verification() and sha256(local) != file['sha256']:
          raise ValueError(
            f'{path} is damaged: its digest does not match {FILE}. Remove it, '
            f'and {_REMEDY}'
          )
        with local.open('rb') as lines:
          for number, line in enumerate(lines, start=1):
            yield files.parse_json(
              line, f'{path}, line {number}', remedy=_REMEDY, finite=False
            )


def open_folder(path: str) -> Folder:
  """Opens a folder of distilled answers.

  Args:
    path: DISTILL_DIR.

  Raises:
    FileNotFoundError: if the folder is missing or incomplete.
    ValueError: if its manifest is broken or from a newer version.
  """
  folder = files.folder(path, 'DISTILL_DIR')
  manifest = folder / FILE
  if not manifest.is_file():
    if (folder / run_format.ANSWERS).is_file():
      raise FileNotFoundError(
        f'DISTILL_DIR={path} is not complete: it has no {FILE}, which is '
        'written when all prompts are answered. Run `distill` again with the '
        'same settings, for every shard.'
      )
    raise FileNotFoundError(
      f'DISTILL_DIR={path} has no {FILE}: it contains no distilled answers. '
      f'Generate them with `{console.name()} distill`.'
    )
  found = files.read_json(manifest, keys=_KEYS, remedy=_REMEDY)
  found = run_format.migrate(FILE, found, manifest, remedy=_REMEDY)
  known = dict.fromkeys((*run_format.stamp(), *_KEYS))
  run_format.refuse_unknown(found, known, manifest, remedy=_REMEDY)
  return Folder(folder, found)


def settings_text(task_settings: Mapping[str, Any]) -> str:
  """Serializes a task's settings for the manifest.

  The setting `cached` is dropped: reading a task from a SeqIO cache changes no
  prompt.
  """
  kept = {key: task_settings[key] for key in task_settings if key != 'cached'}
  return json.dumps(kept, sort_keys=True)


def sha256(path: pathlib.Path) -> str:
  """Returns the SHA-256 of a file, in hex."""
  with storage.fetched(path) as local, local.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def count(records: Iterator[Mapping[str, Any]]) -> dict[str, int]:
  """Returns the numbers of prompts and answers, in total and by kind.

  Keys: `prompts`, of which `bad` have no text and `truncated` were cut;
  `answers`, of which `unended` were cut by the token limit.
  """
  counts = dict.fromkeys(
    ('prompts', 'bad', 'truncated', 'answers', 'unended'), 0
  )
  for record in records:
    counts['prompts'] += 1
    if record['prediction'] is None:
      counts['bad'] += 1
      continue
    counts['truncated'] += record.get('prompt_truncated') is True
    counts['answers'] += len(record['ended'])
    counts['unended'] += record['ended'].count(False)
  return counts


def examples(
  folder: Folder, *, answers: str, unended: str, name: str
) -> dict[str, list[str]]:
  """Returns the training examples: equally many 'inputs' and 'targets'.

  Blank answers are always dropped. Dropped prompts and answers are counted on
  standard error.

  Args:
    folder: the folder of answers.
    answers: one of `ANSWERS`, the selection among a prompt's remaining answers.
      'best' takes the first. 'each' takes every distinct one. 'drawn' samples
      one with the probabilities softmax(scores), the same one in every run;
      with a length penalty of 0 these are the teacher's own probabilities.
    unended: 'drop' or 'keep' answers that the token limit has cut.
    name: name of the task, for messages.

  Raises:
    ValueError: for an invalid setting, or if no example is left.
  """
  for setting, value, expected in (
    ('ANSWERS', answers, ANSWERS),
    ('UNENDED', unended, UNENDED),
  ):
    if value not in expected:
      raise ValueError(
        f'{setting}={value!r}: expected one of {", ".join(expected)}.'
      )
  made: dict[str, list[str]] = {'inputs': [], 'targets': []}
  left_out: collections.Counter[str] = collections.Counter()
  num_prompts = 0
  for number, record in enumerate(folder.records()):
    num_prompts += 1
    if record['prediction'] is None:
      left_out['prompts without text'] += 1
      continue
    texts = record.get('predictions', [record['prediction']])
    scores = record.get('scores', [0.0])
    kept = []
    for text, score, has_ended in zip(
      texts, scores, record['ended'], strict=True
    ):
      if not has_ended and unended == 'drop':
        left_out["answers that did not end (UNENDED='drop')"] += 1
      elif not text.strip():
        left_out['blank answers'] += 1
      else:
        kept.append((text, score))
    chosen = _choose(kept, answers, number) if kept else []
    made['inputs'] += [record['prompt']] * len(chosen)
    made['targets'] += chosen
  size = len(made['inputs'])
  words = ', '.join(f'{number:,} {what}' for what, number in left_out.items())
  summary = f'{name}: {size:,} examples from {num_prompts:,} distilled prompts'
  if not size:
    raise ValueError(
      f'{summary} in DISTILL_DIR={folder.path}; skipped {words}. Allow the '
      'teacher longer answers (targets in TASK_FEATURE_LENGTHS), or set '
      "UNENDED='keep'."
    )
  if left_out:
    print(f'{summary}; skipped {words}.', file=sys.stderr, flush=True)
  return made


def _choose(
  kept: Sequence[tuple[str, float]], answers: str, number: int
) -> list[str]:
  """Selects the training targets among a prompt's answers (best first)."""
  texts = [text for text, _ in kept]
  if answers == 'each':
    return list(dict.fromkeys(texts))
  if answers == 'best':
    return texts[:1]
  best = max(score for _, score in kept)
  weights = [math.exp(score - best) for _, score in kept]
  return random.Random(number).choices(texts, weights)
