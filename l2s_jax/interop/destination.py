# SPDX-License-Identifier: Apache-2.0
"""DESTINATION of `convert` and `export`: a folder that appears when complete.

The output is written to a temporary folder, and compared there. A local
DESTINATION is this folder, renamed; a lock beside it refuses a second writer.
For a bucket the temporary folder is local, and its files are uploaded one by
one. The files without which no reader accepts the folder come last. A lock is
there until the end. After a kill, the same command takes it over and uploads
all files again.
"""

import contextlib
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from l2s_jax.runtime import files, locks, os_errors, scratch, storage
from l2s_jax.weights import run_format

# Ends of paths. Files with a later one are uploaded later, all others first.
_LAST = (
  run_format.CONVERTED,
  run_format.EXPORT,
  '.gguf',
  'saved_model.pb',
  'config.json',
  # Of T5X's checkpoints, which are read without config.json, too.
  '_METADATA',
  'checkpoint',
  storage.COMMIT,
  run_format.RUN,
)
# Of an upload, so that it is known from the lock of a run.
_LOCK = '.unfinished'
# Orbax's file in the folder of a checkpoint.
_CHECKPOINT = '_CHECKPOINT_METADATA'


def opened(destination: str) -> pathlib.Path:
  """Returns the folder of DESTINATION, which need not exist.

  The temporary folder and the lock of a killed process are removed.

  Raises:
    ValueError: if its bucket cannot be opened, a process is writing it, or it
      has no name.
  """
  storage.check(destination, 'DESTINATION')
  folder = storage.of(destination)
  if not storage.is_bucket(folder):
    if not folder.name:  # '.' or '/'
      raise ValueError(_refusal(folder))
    left = _beside(folder), folder.with_name(_lock_name(folder))
    if any(path.exists() for path in left):
      with _locked(folder):
        shutil.rmtree(_beside(folder), ignore_errors=True)
  return folder


def check(folder: pathlib.Path, num_bytes: int) -> None:
  """Checks that a folder does not exist and that the disk has room for it.

  The upload of a killed process does not count.

  Args:
    folder: the destination.
    num_bytes: size of the tensors to write.

  Raises:
    OSError: if it does not fit.
    ValueError: if the folder exists, or is inside a file.
  """
  is_left = storage.is_bucket(folder) and (folder / _LOCK).exists()
  if folder.exists() and not is_left:
    raise ValueError(_refusal(folder))
  where = ''
  if storage.is_bucket(folder):
    parent = pathlib.Path(tempfile.gettempdir())
    where = ', which are written to TMPDIR before they are uploaded,'
  else:
    parent = files.nearest_existing(folder)
  if not parent.is_dir():
    raise ValueError(
      f'{parent} is a file, expected a folder. Choose another DESTINATION.'
    )
  files.check_room(
    parent, num_bytes, f'the weights{where} need', 'half with --dtype=bfloat16'
  )


@contextlib.contextmanager
def writing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a path for a temporary folder, which is removed at the end.

  After a failure new parent folders of the destination are removed, too. The
  block creates the temporary folder, and calls `finish` as its last step.

  Args:
    folder: the destination.

  Raises:
    ValueError: if another process is writing the destination, or has written
      it.
  """
  if storage.is_bucket(folder):
    with scratch.folder() as name:
      # Of the same name, which files of the folder may repeat.
      yield pathlib.Path(name) / folder.name
    return
  unfinished = _beside(folder)
  missing = [path for path in folder.absolute().parents if not path.exists()]
  try:
    with os_errors.naming(folder), _locked(folder):
      if folder.exists():
        raise ValueError(_refusal(folder))
      try:
        yield unfinished
      finally:
        shutil.rmtree(unfinished, ignore_errors=True)
  finally:
    if not folder.exists():
      for parent in missing:
        with contextlib.suppress(OSError):  # Absent or not empty.
          parent.rmdir()


def finish(made: pathlib.Path, folder: pathlib.Path) -> None:
  """Makes a complete local folder the destination.

  Raises:
    OSError: if it cannot be uploaded. What was uploaded is deleted.
    ValueError: if another process has written the destination.
  """
  if not isinstance(folder, storage.BucketPath):
    made.rename(folder)
    return
  for checkpoint in made.rglob(_CHECKPOINT):
    # In a bucket a checkpoint counts with this file, as Orbax writes it.
    (checkpoint.parent / storage.COMMIT).write_text('complete\n')
  names = {
    path.relative_to(made).as_posix()
    for path in made.rglob('*')
    if path.is_file()
  }
  with locks.held(folder, 'DESTINATION', _LOCK) as lock:
    found = {
      path.relative_to(folder).as_posix() for path, _ in folder.objects()
    } - {_LOCK}
    _check_left(folder, names, found, is_left=lock.is_taken_over)
    for name in sorted(found, key=_rank, reverse=True):
      (folder / name).unlink(missing_ok=True)

    def before(name: str) -> None:
      if _rank(name) and not lock.is_mine():
        raise ValueError(
          f'{folder}: another process has taken over its lock. Look whether it '
          'still runs, or choose another DESTINATION.'
        )

    try:
      files.upload_folder(made, folder, _rank, before)
    except BaseException:
      with contextlib.suppress(OSError):  # The first error is raised.
        # The files may be those of the process that has taken over the lock.
        for name in sorted(names, key=_rank, reverse=True):
          if lock.is_mine():
            (folder / name).unlink(missing_ok=True)
      raise


def _check_left(
  folder: pathlib.Path, names: set[str], found: set[str], *, is_left: bool
) -> None:
  """Refuses a folder that is not an unfinished upload of the same files.

  Args:
    folder: the destination.
    names: files to upload.
    found: files that are there.
    is_left: whether a dead process left its lock.
  """
  most = max(map(_rank, names), default=0)
  last = {name for name in names if _rank(name) == most}
  # With its last files it is complete: a kill may have left the lock alone.
  is_unfinished = is_left and found <= names and not last <= found
  if found and not is_unfinished:
    raise ValueError(_refusal(folder))


def _rank(name: str) -> int:
  """Returns the place of a file in the order of uploading."""
  ranks = (i + 1 for i, end in enumerate(_LAST) if _ends(name, end))
  return max(ranks, default=0)


def _ends(name: str, end: str) -> bool:
  file = name.rpartition('/')[2]
  return file.endswith(end) if end.startswith('.') else file == end


def _locked(
  folder: pathlib.Path,
) -> contextlib.AbstractContextManager[locks.Held]:
  """Locks a local destination, which need not exist."""
  return locks.held(folder.parent, 'DESTINATION', _lock_name(folder), folder)


def _lock_name(folder: pathlib.Path) -> str:
  return f'.{folder.name}.lock'


def _beside(folder: pathlib.Path) -> pathlib.Path:
  return folder.with_name(f'.{folder.name}.unfinished')


def _refusal(folder: pathlib.Path) -> str:
  return f'{folder} already exists. Choose another DESTINATION, or remove it.'
