# SPDX-License-Identifier: Apache-2.0
"""The growing output of `infer` and `distill` in a bucket, as numbered parts.

An object cannot grow. The lines are written to a local temporary file. Every
PART_SECS, and at the end of a stopped job, the new ones become an object:

    predictions.jsonl.partial/START-STOP-DIGEST

START and STOP are offsets in the complete file, in bytes. DIGEST is that of all
bytes before STOP. The next start reads the parts that continue one another, and
removes others. The complete file is uploaded as one object, after its digests;
then the parts are deleted.
"""

import concurrent.futures
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import xxhash

from l2s_jax.inference import predictions, prompts
from l2s_jax.runtime import storage

# A kill loses the answers of this period. Each part is a billed request.
PART_SECS = 30.0
_NUM_READING = 16
_NAME = re.compile(r'(\d{15})-(\d{15})-([0-9a-f]{32})')


def growing_file(
  path: pathlib.Path, items: Iterable[prompts.Item] | None = None
) -> predictions.GrowingFile:
  """Returns the growing file of a path, local or in a bucket.

  Args:
    path: of the complete file.
    items: the input items, in the order of the lines; None skips the
      comparison.
  """
  if isinstance(path, storage.BucketPath):
    return _FileOfParts(path, items)
  return predictions.GrowingFile(path, items)


def remove(path: pathlib.Path) -> None:
  """Removes the parts of a complete file, which a kill may leave."""
  if isinstance(path, storage.BucketPath):
    _folder(path).rmtree()


class _FileOfParts(predictions.GrowingFile):
  """A growing file in a bucket. The caller holds a lock of it."""

  def __init__(
    self, path: storage.BucketPath, items: Iterable[prompts.Item] | None
  ):
    self._scratch = tempfile.TemporaryDirectory(prefix='l2s_jax-')
    super().__init__(pathlib.Path(self._scratch.name) / path.name, items)
    self._target = path
    self._shown = _folder(path)
    self._is_whole = False

  def __enter__(self) -> predictions.GrowingFile:
    with self._partial.open('wb') as file:
      for content in _contents(_folder(self._target)):
        file.write(content)
      size = file.tell()
    super().__enter__()
    self._uploaded = self._file.seek(0, 2)
    # Parts have whole lines, by their digests.
    assert self._uploaded == size, (self._shown, self._uploaded, size)
    self._last_part = time.monotonic()
    return self

  def __exit__(self, *error: object) -> None:
    try:
      # A store that has just failed is not asked again.
      if not self._is_whole and not isinstance(error[1], OSError):
        self._upload()
    finally:
      super().__exit__(*error)
      self._scratch.cleanup()

  def append(self, records: Sequence[predictions.Record]) -> None:
    super().append(records)
    if time.monotonic() - self._last_part > PART_SECS:
      self._upload()

  def finish(self) -> None:
    super().finish()
    local = predictions.notes_of(self.path)
    predictions.notes_of(self._target).write_bytes(local.read_bytes())
    self._target.upload(self.path)
    self._is_whole = True
    remove(self._target)

  def _upload(self) -> None:
    """Writes the lines after the last part as the next one."""
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


def _contents(folder: storage.BucketPath) -> Iterator[bytes]:
  """Yields the contents of the parts in order; removes all others.

  A process that lost its lock may have written parts beside those of the next.
  """
  hasher: Any = xxhash.xxh3_128()
  position = 0
  others = []
  places = [place for place, _ in folder.objects()]
  with concurrent.futures.ThreadPoolExecutor(_NUM_READING) as pool:
    for first in range(0, len(places), _NUM_READING):
      some = places[first : first + _NUM_READING]
      for place, content in zip(
        some, pool.map(storage.BucketPath.read_bytes, some), strict=True
      ):
        found = _NAME.fullmatch(place.name)
        with_it = hasher.copy()
        with_it.update(content)
        if (
          found is None
          or int(found[1]) != position
          or int(found[2]) != position + len(content)
          or found[3] != with_it.hexdigest()
        ):
          others.append(place)
          continue
        hasher, position = with_it, position + len(content)
        yield content
  for place in others:
    place.unlink(missing_ok=True)
  if others:
    print(
      f'{folder}: removed {len(others)} parts, which do not continue the '
      'others or do not match their digests.',
      file=sys.stderr,
    )
