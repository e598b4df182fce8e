# SPDX-License-Identifier: Apache-2.0
"""Paths of the file system and of buckets: `gs://` and `s3://`.

`of` returns a `pathlib.Path`. For a bucket it is a `BucketPath`, which has the
same methods, by requests to the store. Code that reads and writes files does
not distinguish the two. The exceptions are operations that an object store
lacks: it has no rename, no append, and no empty folders. An object appears
whole, or not at all.

Requests are repeated by the libraries gcsfs, s3fs and TensorStore, a bounded
number of times. An error that remains is an OSError of one sentence.
"""

import concurrent.futures
import contextlib
import errno
import functools
import glob
import io
import json
import os
import pathlib
import stat as stat_lib
import tempfile
import threading
import urllib.parse
import uuid
from collections.abc import Callable, Generator, Iterator
from typing import Any, NoReturn

from l2s_jax.runtime import extras, os_errors, scratch

# By scheme: the module of its file system.
MODULES = {'gs': 'gcsfs', 's3': 's3fs'}
# Orbax writes it last; a checkpoint in a bucket without it does not count.
COMMIT = 'commit_success.txt'
# In errors of requests whose condition does not hold.
_CONDITION = (
  'conditionNotMet',
  'PreconditionFailed',
  'ConditionalRequestConflict',
  '412',
  'pre-condition',
)
# Of a file that is read in order.
_BUFFER_BYTES = 2**20
_NUM_DELETING = 16

if not os.environ.get('EPATH_USE_TF') and not extras.missing('gcsfs'):
  # Orbax and TFDS open buckets by etils, which otherwise takes TensorFlow.
  os.environ['EPATH_USE_TF'] = 'false'


def scheme(path: str | os.PathLike[str]) -> str | None:
  """Returns the scheme of a URL, or None for a local path."""
  head, separator, _ = os.fspath(path).partition('://')
  return head if separator else None


def is_bucket(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path is that of a bucket."""
  return scheme(path) in MODULES


def of(path: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the path object of a local path or of a bucket."""
  if isinstance(path, pathlib.Path):
    return path
  return BucketPath(path) if is_bucket(path) else pathlib.Path(path)


def check(path: str | os.PathLike[str], name: str) -> None:
  """Checks that a path is local, or that its bucket can be opened.

  Args:
    path: given by the user.
    name: name of the setting, for errors.

  Raises:
    ValueError: if its scheme is unknown, it names no bucket, or the package for
      it is missing.
  """
  found = scheme(path)
  if found is None:
    return
  if found not in MODULES:
    raise ValueError(
      f'{name}={os.fspath(path)}: {found}:// is not supported; give a local '
      'path, gs://BUCKET/PATH or s3://BUCKET/PATH.'
    )
  if not BucketPath(path).bucket:
    raise ValueError(
      f'{name}={os.fspath(path)} names no bucket; give {found}://BUCKET/PATH.'
    )
  extras.require(f'{name}={os.fspath(path)}', MODULES[found])


def check_local(**given: str | os.PathLike[str]) -> None:
  """Refuses paths in buckets.

  Args:
    **given: paths given by the user, by the names of their settings.

  Raises:
    ValueError: if one has a scheme.
  """
  for name, path in given.items():
    if scheme(path) is not None:
      raise ValueError(
        f'{name}={os.fspath(path)}: only paths of the file system are '
        'supported here; give a local path, or mount the bucket (such as with '
        'gcsfuse).'
      )


def lasting(path: str) -> str:
  """Returns a path that is valid in any working directory."""
  return path if is_bucket(path) else os.path.abspath(path)


def for_library(path: pathlib.Path) -> Any:
  """Returns a path for Orbax: a local path as it is, a bucket's as epath."""
  if not isinstance(path, BucketPath):
    return path
  from etils import epath

  return epath.Path(str(path))


def kvstore(folder: pathlib.Path) -> dict[str, Any] | str:
  """Returns TensorStore's key-value store of a folder."""
  if not isinstance(folder, BucketPath):
    return f'file://{folder}/'
  spec = {
    'driver': 'gcs' if folder.scheme == 'gs' else 's3',
    'bucket': folder.bucket,
    'path': f'{folder.key}/',
  }
  endpoint = os.environ.get('AWS_ENDPOINT_URL_S3') or os.environ.get(
    'AWS_ENDPOINT_URL'
  )
  if folder.scheme == 's3' and endpoint:
    region = os.environ.get('AWS_REGION') or os.environ.get(
      'AWS_DEFAULT_REGION', 'us-east-1'
    )
    spec |= {'endpoint': endpoint, 'aws_region': region}
  return spec


@functools.cache
def _filesystem(scheme: str, pid: int) -> Any:
  """Returns fsspec's file system of a scheme, in this process.

  Without a cache of listings: other processes write, too.
  """
  del pid
  extras.require(f'{scheme}://', MODULES[scheme])
  import fsspec

  # Orbax opens one of its own.
  for name in ('gs', 'gcs', 's3'):
    fsspec.config.conf.setdefault(name, {})['use_listings_cache'] = False
  return fsspec.filesystem(scheme, use_listings_cache=False)


def _copy(source: str, target: str, fs: Any) -> None:
  fs.copy(source, target)


class BucketPath(pathlib.PosixPath):
  """A path in a bucket, with the methods of `pathlib.Path`.

  No method touches the local disk: each works on the bucket, or is refused.
  """

  @property
  def scheme(self) -> str:
    return self.parts[0].rstrip(':')

  @property
  def bucket(self) -> str:
    return self.parts[1] if len(self.parts) > 1 else ''

  @property
  def key(self) -> str:
    """The name within the bucket."""
    return '/'.join(self.parts[2:])

  def __str__(self) -> str:
    return f'{self.scheme}://{"/".join(self.parts[1:])}'

  def __fspath__(self) -> str:
    return str(self)

  def __repr__(self) -> str:
    return f'BucketPath({str(self)!r})'

  def __reduce__(self) -> tuple[Any, ...]:
    return BucketPath, (str(self),)

  def as_posix(self) -> str:
    return str(self)

  def as_uri(self) -> str:
    return str(self)

  def absolute(self) -> 'BucketPath':
    return self

  def resolve(self, strict: bool = False) -> 'BucketPath':
    """Returns the path without `..`."""
    if strict and not self.exists():
      raise FileNotFoundError(2, os.strerror(2), str(self))
    if '..' not in self.parts:
      return self
    key = os.path.normpath('/' + self.key).lstrip('/')
    return BucketPath(f'{self.scheme}://{self.bucket}/{key}')

  def expanduser(self) -> 'BucketPath':
    return self

  @property
  def parent(self) -> 'BucketPath':
    """The folder of the path; a bucket is its own parent."""
    return super().parent if self.key else self

  @property
  def parents(self) -> tuple['BucketPath', ...]:
    found: list[BucketPath] = []
    path = self
    while path.key:
      path = path.parent
      found.append(path)
    return tuple(found)

  def match(self, pattern: str | os.PathLike[str], **kwargs: Any) -> bool:  # type: ignore[override]
    pattern = os.fspath(pathlib.PurePosixPath(pattern))
    return pathlib.PurePosixPath(*self.parts).match(pattern, **kwargs)

  def is_absolute(self) -> bool:
    return True

  def is_relative_to(self, *other: Any) -> bool:
    try:
      self.relative_to(*other)
    except ValueError:
      return False
    return True

  def is_symlink(self) -> bool:
    return False

  is_block_device = is_char_device = is_fifo = is_symlink
  is_junction = is_mount = is_socket = is_symlink

  def exists(self, **_: Any) -> bool:
    return self._info() is not None

  def is_file(self) -> bool:
    info = self._info()
    return info is not None and info['type'] == 'file'

  def is_dir(self) -> bool:
    info = self._info()
    return info is not None and info['type'] == 'directory'

  def stat(self, **_: Any) -> os.stat_result:
    """Returns size and modification time of an object."""
    info = self._info()
    if info is None:
      raise FileNotFoundError(2, os.strerror(2), str(self))
    kind = stat_lib.S_IFREG if info['type'] == 'file' else stat_lib.S_IFDIR
    changed = info.get('updated') or info.get('mtime')
    changed = changed or info.get('LastModified') or 0
    if isinstance(changed, str):
      import datetime

      changed = datetime.datetime.fromisoformat(changed)
    secs = changed if isinstance(changed, int | float) else changed.timestamp()
    nsecs = round(secs * 1e9)
    size = info.get('size') or 0
    times = (int(secs), int(secs), int(secs))
    return os.stat_result(
      (kind, 0, 0, 1, 0, 0, size, *times),
      {'st_mtime_ns': nsecs, 'st_ctime_ns': nsecs, 'st_atime_ns': nsecs},
    )

  lstat = stat

  def iterdir(self) -> Generator['BucketPath', None, None]:
    for entry in self._list():
      yield self / entry

  def _list(self) -> list[str]:
    found = self._call(lambda fs: fs.ls(str(self), detail=False))
    names = (name.rstrip('/').rpartition('/')[2] for name in found)
    # A marker of a folder, as some programs make it, is listed as its name.
    own = f'{self.bucket}/{self.key}'.rstrip('/')
    return sorted(
      {
        name
        for name, path in zip(names, found, strict=True)
        if path.rstrip('/') != own
      }
    )

  def relative_to(self, *other: Any, **kwargs: Any) -> Any:
    base = pathlib.PurePosixPath(*BucketPath(*other).parts)
    return pathlib.PurePosixPath(*self.parts).relative_to(base, **kwargs)

  def glob(self, pattern: str, **_: Any) -> Iterator['BucketPath']:  # type: ignore[override]
    if {'**', '..'} & set(pathlib.PurePosixPath(pattern).parts):
      self._refuse(f'glob({pattern!r})')
    folder = glob.escape(str(self))
    found = self._call(
      lambda fs: fs.glob(f'{folder}/{pattern}'), of_bucket=True
    )
    return (BucketPath(f'{self.scheme}://{name}') for name in sorted(found))

  def rglob(
    self, pattern: str, **_: Any
  ) -> Generator['BucketPath', None, None]:
    """Yields objects; folders exist by them alone."""
    if {'**', '..'} & set(pathlib.PurePosixPath(pattern).parts):
      self._refuse(f'rglob({pattern!r})')
    return (
      path
      for path, _ in self.objects()
      if path.relative_to(self).match(pattern)
    )

  def objects(self) -> list[tuple['BucketPath', tuple[Any, ...]]]:
    """Returns all objects below with their versions: size, time and tag."""
    found = self._call(
      lambda fs: fs.find(str(self), detail=True), of_bucket=True
    )
    return [
      (
        BucketPath(f'{self.scheme}://{name}'),
        tuple(
          str(info.get(key))
          for key in ('size', 'generation', 'updated', 'ETag', 'LastModified')
        ),
      )
      for name, info in sorted(found.items())
    ]

  def check_readable(self) -> None:
    """Reads a byte of each object below.

    Raises:
      OSError: if the store does not give one.
    """
    for path, (size, *_) in self.objects():
      if int(size):
        with contextlib.suppress(FileNotFoundError):
          path.read_range(0, 1)

  def mkdir(self, *_: Any, **__: Any) -> None:
    """Does nothing: folders exist by their objects."""

  def rmdir(self) -> None:
    """Does nothing, likewise."""

  def unlink(self, missing_ok: bool = False) -> None:
    try:
      self._call(lambda fs: fs.rm_file(str(self)))
    except FileNotFoundError:
      if not missing_ok:
        raise

  def rmtree(self) -> None:
    """Deletes all objects below; the commit file of a checkpoint first."""
    (self / COMMIT).unlink(missing_ok=True)
    # One list and a request for each object; `rm` lists many times.
    with concurrent.futures.ThreadPoolExecutor(_NUM_DELETING) as pool:
      for _ in pool.map(_unlink, [path for path, _ in self.objects()]):
        pass

  def move_to(self, target: 'BucketPath') -> None:
    """Copies all objects below to another place, then deletes them here.

    The commit file of a checkpoint is deleted first, and not copied.
    """
    (self / COMMIT).unlink(missing_ok=True)
    places = {str(path) for path, _ in self.objects()}
    for place in sorted(places):
      goal = f'{target}{place.removeprefix(str(self))}'
      self._call(functools.partial(_copy, place, goal))
    self.rmtree()

  def read_bytes(self) -> bytes:
    content = self._call(lambda fs: fs.cat_file(str(self)))
    assert isinstance(content, bytes)
    return content

  def read_range(self, start: int, stop: int) -> bytes:
    """Returns the bytes [start, stop) of an object, by one request."""
    if start >= stop:
      return b''
    content = self._call(
      lambda fs: fs.cat_file(str(self), start=start, end=stop)
    )
    assert isinstance(content, bytes)
    return content

  def read_text(
    self, encoding: str | None = None, errors: str | None = None
  ) -> str:
    content = self.read_bytes()
    text = content.decode(encoding or 'utf-8', errors or 'strict')
    return text.replace('\r\n', '\n').replace('\r', '\n')

  def write_bytes(self, data: Any) -> int:
    content = bytes(data)
    self._call(lambda fs: fs.pipe_file(str(self), content), of_bucket=True)
    return len(content)

  def write_text(  # type: ignore[override]
    self, data: str, encoding: str | None = None, errors: str | None = None
  ) -> int:
    self.write_bytes(data.encode(encoding or 'utf-8', errors or 'strict'))
    return len(data)

  def create(self, content: bytes) -> bool:
    """Writes an object unless it exists, atomically; returns whether it did."""
    try:
      self._call(
        lambda fs: fs.pipe_file(str(self), content, mode='create'),
        is_create=True,
        of_bucket=True,
      )
    except FileExistsError:
      return False
    return True

  def version(self) -> str:
    """Returns what identifies the content: GCS's generation, or S3's ETag.

    Raises:
      FileNotFoundError: if there is no such object.
    """
    info = self._call(lambda fs: fs.info(str(self)))
    return str(info['generation' if self.scheme == 'gs' else 'ETag'])

  def replace_version(self, version: str, content: bytes) -> str | None:
    """Overwrites an object that still has a version, atomically.

    Returns:
      The new version, or None if the object is another one or has gone.
    """
    try:
      return self._call(
        functools.partial(_put_if, self, version, content), is_create=True
      )
    except (FileExistsError, FileNotFoundError):
      return None

  def upload(self, file: str | os.PathLike[str]) -> None:
    """Writes a local file as the object, which appears when it is complete."""
    self._call(
      lambda fs: fs.put_file(os.fspath(file), str(self)), of_bucket=True
    )

  def download(self, file: str | os.PathLike[str]) -> None:
    """Copies the object to a local file."""
    self._call(lambda fs: fs.get_file(str(self), os.fspath(file)))

  def open(  # type: ignore[override]
    self, mode: str = 'r', buffering: int = -1, **text: Any
  ) -> Any:
    """Opens an object for reading; `files.whole` writes."""
    del buffering
    if mode not in ('r', 'rb'):
      self._refuse(f'open(mode={mode!r})')
    raw = self._call(lambda fs: fs.open(str(self), 'rb'))
    file = io.BufferedReader(raw, _BUFFER_BYTES)
    if mode == 'r':
      return io.TextIOWrapper(file, **{'encoding': 'utf-8'} | text)
    return file

  def _refuse(self, operation: str) -> NoReturn:
    raise OSError(
      f'{self}: {operation} is not possible in a bucket; give a local path'
    )

  def _info(self) -> dict[str, Any] | None:
    try:
      info = self._call(lambda fs: fs.info(str(self)))
    except FileNotFoundError:
      return None
    assert isinstance(info, dict)
    return info

  def _is_condition(self, error: Exception) -> bool:
    """Returns whether the condition of a request does not hold."""
    if str(getattr(error, 'code', '')) == '412':
      return True
    text = str(error)
    for name in self.parts[1:]:  # A name may have any text.
      if any(word in name for word in _CONDITION):
        text = text.replace(name, '')
    return any(word in text for word in _CONDITION)

  def _call(
    self,
    request: Callable[[Any], Any],
    *,
    is_create: bool = False,
    of_bucket: bool = False,
  ) -> Any:
    """Returns the result of a request, with errors as sentences.

    Raises:
      FileNotFoundError: if there is no such object; if `of_bucket`, as for
        writes, no such bucket.
      FileExistsError: if `is_create` and there is one.
      OSError: for all other errors of the store.
    """
    if self.scheme not in MODULES or not self.bucket:
      raise ValueError(f'{self!r} is not a path in a bucket.')
    try:
      return request(_filesystem(self.scheme, os.getpid()))
    except FileNotFoundError as error:
      if of_bucket and error.filename is None:  # Not the local file.
        raise FileNotFoundError(
          f'{self}: there is no bucket {self.scheme}://{self.bucket}, or its '
          'credentials do not show it. Correct the path, or create the bucket.'
        ) from None
      raise FileNotFoundError(2, os.strerror(2), str(self)) from error
    except (ValueError, TypeError, AssertionError, NotImplementedError):
      raise
    except Exception as error:  # Each library has classes of its own.
      if is_create and (
        isinstance(error, FileExistsError) or self._is_condition(error)
      ):
        raise FileExistsError(17, os.strerror(17), str(self)) from error
      if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT):
        raise  # Of the local folder.
      kind = f'{type(error).__name__}: ' if type(error) is not OSError else ''
      raise OSError(
        f'{self}: {kind}{os_errors.first_line(error)}; '
        f'{os_errors.STORE}. Earlier output is intact.'
      ) from error


# Methods of any version of Python that an object store cannot have.
_REFUSED = (
  'chmod',
  'copy',
  'copy_into',
  'full_match',
  'group',
  'hardlink_to',
  'lchmod',
  'link_to',
  'move',
  'move_into',
  'owner',
  'readlink',
  'rename',
  'replace',
  'samefile',
  'symlink_to',
  'touch',
  'walk',
)
# Those of the class. Paths are made by `of`.
_REFUSED_OF_CLASS = ('cwd', 'from_uri', 'home')


def _refusal(name: str) -> Callable[..., NoReturn]:
  def refuse(self: BucketPath, *_: Any, **__: Any) -> NoReturn:
    self._refuse(name)

  return refuse


def _refusal_of_class(name: str) -> Callable[..., NoReturn]:
  def refuse(*_: Any, **__: Any) -> NoReturn:
    raise OSError(f'BucketPath.{name} is not possible; give the path')

  return refuse


for _name in _REFUSED:
  setattr(BucketPath, _name, _refusal(_name))
for _name in _REFUSED_OF_CLASS:
  setattr(BucketPath, _name, staticmethod(_refusal_of_class(_name)))


def _put_if(path: BucketPath, version: str, content: bytes, fs: Any) -> str:
  """Writes an object on the condition of its version; returns the new one."""
  if path.scheme == 's3':
    written = fs.call_s3(
      'put_object',
      Bucket=path.bucket,
      Key=path.key,
      Body=content,
      IfMatch=version,
    )
    return str(written['ETag'])
  bucket = urllib.parse.quote(path.bucket)
  bound = uuid.uuid4().hex
  parts = (
    (
      'application/json; charset=UTF-8',
      json.dumps({'name': path.key}).encode(),
    ),
    ('application/octet-stream', content),
  )
  body = b''.join(
    f'--{bound}\r\nContent-Type: {kind}\r\n\r\n'.encode() + part + b'\r\n'
    for kind, part in parts
  )
  written = fs.call(
    'POST',
    f'{fs._location}/upload/storage/v1/b/{bucket}/o',
    uploadType='multipart',
    ifGenerationMatch=version,
    headers={'Content-Type': f'multipart/related; boundary={bound}'},
    data=body + f'--{bound}--'.encode(),
    json_out=True,
  )
  return str(written['generation'])


def _unlink(path: BucketPath) -> None:
  path.unlink(missing_ok=True)


def local_copy(path: str | os.PathLike[str]) -> str:
  """Returns a local path with the content of a file.

  It is the path itself, or a copy of the object in a temporary folder, which is
  removed when the process ends. A version of an object is copied once.
  """
  path = os.fspath(path)
  if not is_bucket(path):
    return path
  source = BucketPath(path)
  return str(_copied(source, source.version(), source.download))


def local_folder(path: pathlib.Path) -> pathlib.Path:
  """Returns a local folder with the content of a folder, as `local_copy`."""
  if not isinstance(path, BucketPath):
    return path
  objects = path.objects()

  def fill(target: pathlib.Path) -> None:
    for source, _ in objects:
      place = target / source.relative_to(path)
      place.parent.mkdir(parents=True, exist_ok=True)
      source.download(place)

  return _copied(path, str(objects), fill)


def _copied(
  path: BucketPath, version: str, fill: Callable[[pathlib.Path], None]
) -> pathlib.Path:
  """Returns the copy of a version, which `fill` writes if there is none."""
  key = str(path), version
  with _COPYING[hash(key) % len(_COPYING)]:  # Threads wait for one copy.
    if key not in _COPIES:
      folder = scratch.folder()
      try:
        fill(pathlib.Path(folder.name) / path.name)
      except BaseException:
        folder.cleanup()
        raise
      _COPIES[key] = folder
    return pathlib.Path(_COPIES[key].name) / path.name


@contextlib.contextmanager
def fetched(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a local path with the content of a file, until the block ends.

  It is the path itself, or a temporary copy of an object as it is now.
  """
  if not isinstance(path, BucketPath):
    yield path
    return
  with scratch.folder() as name:
    copy = pathlib.Path(name) / path.name
    path.download(copy)
    yield copy


# By path and version. Keeps references, since garbage collection would remove
# the folders.
_COPIES: dict[tuple[str, str], tempfile.TemporaryDirectory[str]] = {}
_COPYING = [threading.Lock() for _ in range(64)]
