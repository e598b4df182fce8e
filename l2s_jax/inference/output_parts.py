# SPDX-License-Identifier: Apache-2.0
"""The growing output of `infer` and `distill` in a bucket, as numbered parts.

An object cannot grow. The lines are written to a local temporary file. Every
PART_SECS, and after an error or a signal, the new ones become an object:

    predictions.jsonl.partial/START-STOP-DIGEST

START and STOP are offsets in the complete file, in bytes. DIGEST is that of all
bytes before STOP. The next start reads the longest sequence of parts that
continue one another, and removes the others. A process that lost its lock may
have written some: they overlap those of the next process. The complete file is
uploaded as one object, after its digests; then the parts are deleted.
"""

import concurrent.futures
import pathlib
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import xxhash

from l2s_jax.inference import predictions, prompts
from l2s_jax.runtime import os_errors, preemption, scratch, storage

# A kill loses the answers of this period. Each part is a billed request.
PART_SECS = 30.0
_NUM_READING = 16
_NAME = re.compile(r'(\d{15})-(\d{15})-([0-9a-f]{32})')


def growing_file(
  path: pathlib.Path,
  items: Iterable[prompts.Item] | None = None,
  watcher: preemption.Watcher | None = None,
) -> predictions.GrowingFile:
  """Returns the growing file of a path, local or in a bucket.

  Args:
    path: of the complete file.
    items: the input items, in the order of the lines; None skips the
      comparison.
    watcher: of signals, after which the last lines are uploaded.
  """
  if isinstance(path, storage.BucketPath):
    return _FileOfParts(path, items, watcher)
  return predictions.GrowingFile(path, items)


def remove(path: pathlib.Path) -> None:
  """Removes the parts of a complete file, which a kill may leave."""
  if isinstance(path, storage.BucketPath):
    _folder(path).rmtree()


class _FileOfParts(predictions.GrowingFile):
  """A growing file in a bucket. The caller holds a lock of it."""

  def __init__(
    self,
    path: storage.BucketPath,
    items: Iterable[prompts.Item] | None,
    watcher: preemption.Watcher | None,
  ):
    self._scratch = scratch.folder()
    super().__init__(pathlib.Path(self._scratch.name) / path.name, items)
    self._target = path
    self._shown = _folder(path)
    self._is_open = False
    self._watcher = watcher
    # The thread of the watcher uploads, too.
    self._lock = threading.RLock()

  def __enter__(self) -> predictions.GrowingFile:
    try:
      size = _join(_folder(self._target), self._partial)
      super().__enter__()
    except BaseException:
      self._scratch.cleanup()
      raise
    self._uploaded = self._file.seek(0, 2)
    # Parts have whole lines, by their digests.
    assert self._uploaded == size, (self._shown, self._uploaded, size)
    self._last_part = time.monotonic()
    self._is_open = True
    if self._watcher:
      self._watcher.save = self._upload_last
    return self

  def __exit__(self, *error: object) -> None:
    with self._lock:
      try:
        # A store that has just failed is not asked again.
        if error[1] is None:
          self._upload()
        elif not isinstance(error[1], OSError):
          self._upload_last()  # The first error is raised.
      finally:
        self._is_open = False
        if self._watcher:
          self._watcher.save = None
        super().__exit__(*error)
        self._scratch.cleanup()

  def append(self, records: Sequence[predictions.Record]) -> None:
    with self._lock:
      super().append(records)
      if time.monotonic() - self._last_part > PART_SECS:
        self._upload()

  def finish(self) -> None:
    with self._lock:
      super().finish()
      local = predictions.notes_of(self.path)
      predictions.notes_of(self._target).write_bytes(local.read_bytes())
      self._target.upload(self.path)
      self._is_open = False
      remove(self._target)

  def _upload_last(self) -> None:
    """Uploads the last lines; an error is said, not raised."""
    with self._lock:
      try:
        self._upload()
      except OSError as failure:
        print(
          f'{self._shown}: the last answers are not uploaded, and will be '
          f'computed again: {os_errors.first_line(failure)}.',
          file=sys.stderr,
        )

  def _upload(self) -> None:
    """Writes the lines after the last part as the next one."""
    if not self._is_open:
      return  # The file is complete, or has been left.
    end = self._file.seek(0, 2)
    if end > self._uploaded:
      self._file.seek(self._uploaded)
      name = f'{self._uploaded:015}-{end:015}-{self._hasher.hexdigest()}'
      (_folder(self._target) / name).write_bytes(self._file.read())
      self._uploaded = end
    self._last_part = time.monotonic()


def _folder(path: storage.BucketPath) -> storage.BucketPath:
  """Returns the folder of a file's parts."""
  return path.with_name(f'{path.name}.partial')


class _Part(NamedTuple):
  """A part that continues others.

  Attributes:
    before: the part before it; None for the first.
    stop: its end in the complete file, in bytes.
    hasher: of all bytes before `stop`.
    place: of its object.
    offset: of its content in the local file.
    size: of its content.
  """

  before: '_Part | None'
  stop: int
  hasher: Any
  place: storage.BucketPath | None
  offset: int = 0
  size: int = 0


def _join(folder: storage.BucketPath, path: pathlib.Path) -> int:
  """Writes the longest sequence of parts as a local file; removes all others.

  Returns:
    The size of the file.
  """
  # Ends of sequences, by the offset in the complete file. Where parts overlap,
  # several have the same.
  longest = _Part(None, 0, xxhash.xxh3_128(), None)
  ends: dict[int, list[_Part]] = {0: [longest]}
  places = [place for place, _ in folder.objects()]
  with path.open('wb') as file:
    for place, content in _contents(places):
      found = _NAME.fullmatch(place.name)
      for end in ends.get(int(found[1]), ()) if found else ():
        hasher = end.hasher.copy()
        hasher.update(content)
        part = _Part(
          end,
          end.stop + len(content),
          hasher,
          place,
          file.tell(),
          len(content),
        )
        assert found is not None
        if int(found[2]) == part.stop and found[3] == hasher.hexdigest():
          file.write(content)
          ends.setdefault(part.stop, []).append(part)
          longest = max(longest, part, key=lambda x: x.stop)
          break
    written = file.tell()
  chosen = []
  part = longest
  while part.before is not None:
    chosen.append(part)
    part = part.before
  if longest.stop < written:
    _keep(path, chosen[::-1])
  others = sorted(set(places) - {part.place for part in chosen})
  for other in others:
    other.unlink(missing_ok=True)
  if others:
    print(
      f'{folder}: removed {len(others)} parts, which do not continue the '
      'others, overlap them, or do not match their digests.',
      file=sys.stderr,
    )
  return longest.stop


def _contents(
  places: Sequence[storage.BucketPath],
) -> Iterator[tuple[storage.BucketPath, bytes]]:
  """Yields objects with their contents, some of which are read at a time."""
  with concurrent.futures.ThreadPoolExecutor(_NUM_READING) as pool:
    for first in range(0, len(places), _NUM_READING):
      some = places[first : first + _NUM_READING]
      read = pool.map(storage.BucketPath.read_bytes, some)
      yield from zip(some, read, strict=True)


def _keep(path: pathlib.Path, parts: Sequence[_Part]) -> None:
  """Removes from a local file all but the contents of some parts."""
  kept = path.with_name(f'{path.name}.kept')
  with path.open('rb') as source, kept.open('wb') as target:
    for part in parts:
      source.seek(part.offset)
      target.write(source.read(part.size))
  kept.replace(path)
