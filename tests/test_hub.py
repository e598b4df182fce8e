# SPDX-License-Identifier: Apache-2.0
"""Names on the Hugging Face Hub: what is fetched, and what is said if not.

The Hub is a server on this machine that answers what huggingface_hub asks.
"""

import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
import urllib.parse

import helpers
import numpy as np
import pytest

from l2s_jax.interop import to_huggingface
from l2s_jax.models import l2s
from l2s_jax.weights import hub, opening

REASON = 'fetches from the Hub'
NAME = 'some-org/tiny.model'
COMMIT = 'c' * 40


class Hub(http.server.ThreadingHTTPServer):
  """Serves one folder as the model NAME.

  Attributes:
    folder: its files, in subfolders, too.
    errors: status and code of the Hub for files that are listed, not given.
    given: the files whose content was asked for.
  """

  def __init__(self, folder):
    super().__init__(('127.0.0.1', 0), Handler)
    self.folder = folder
    self.errors = {}
    self.given = set()

  @property
  def url(self):
    return f'http://127.0.0.1:{self.server_port}'

  def files(self):
    for path in sorted(self.folder.rglob('*')):
      if path.is_file():
        yield str(path.relative_to(self.folder)), path.read_bytes()


class Handler(http.server.BaseHTTPRequestHandler):
  """Knows three kinds of addresses: a model, its files' names, a file."""

  server: Hub

  def do_GET(self):
    path = urllib.parse.urlparse(self.path).path
    if path == f'/api/models/{NAME}/revision/main':
      return self.answer_json({'id': NAME, 'sha': COMMIT, 'siblings': []})
    if path == f'/api/models/{NAME}/tree/{COMMIT}':
      return self.answer_json(
        [
          {
            'type': 'file',
            'path': name,
            'size': len(content),
            'oid': hashlib.sha1(content).hexdigest(),
          }
          for name, content in self.server.files()
        ]
      )
    prefix = f'/{NAME}/resolve/{COMMIT}/'
    if not path.startswith(prefix):
      return self.refuse(404, 'RepoNotFound')
    name = path.removeprefix(prefix)
    if name in self.server.errors:
      return self.refuse(*self.server.errors[name])
    if self.command == 'GET':
      self.server.given.add(name)
    return self.answer(dict(self.server.files())[name])

  do_HEAD = do_GET

  def answer_json(self, content):
    self.answer(json.dumps(content).encode(), 'application/json')

  def answer(self, content, kind='application/octet-stream'):
    self.send_response(200)
    self.send_header('Content-Type', kind)
    self.send_header('Content-Length', str(len(content)))
    self.send_header('ETag', f'"{hashlib.sha1(content).hexdigest()}"')
    self.send_header('X-Repo-Commit', COMMIT)
    self.end_headers()
    if self.command == 'GET':
      self.wfile.write(content)

  def refuse(self, status, code):
    self.send_response(status)
    self.send_header('X-Error-Code', code)
    self.send_header('X-Error-Message', f'because of {code}')
    self.send_header('Content-Length', '0')
    self.end_headers()

  def log_message(self, format, *args):
    pass


def set_endpoint(monkeypatch, url):
  """Does what HF_ENDPOINT does where the package is not imported yet."""
  from huggingface_hub import constants

  template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(
    constants.ENDPOINT, url
  )
  monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
  monkeypatch.setattr(constants, 'ENDPOINT', url)


@pytest.fixture
def server(tmp_path, monkeypatch):
  """Returns the Hub, which has a tiny T5 and files that nobody needs."""
  constants = pytest.importorskip('huggingface_hub.constants', reason=REASON)
  folder = tmp_path / 'served'
  params = helpers.random_params(l2s.build(helpers.T5_1_1))
  source = helpers.Arrays(helpers.T5_1_1, params)
  to_huggingface.save(source, folder, helpers.vocabulary())
  helpers.vocabulary().save(folder)
  (folder / 'onnx').mkdir()
  for name in ('tf_model.h5', 'pytorch_model.bin', 'onnx/model.safetensors'):
    (folder / name).write_text('large')
  hub_server = Hub(folder)
  thread = threading.Thread(target=hub_server.serve_forever, daemon=True)
  thread.start()
  set_endpoint(monkeypatch, hub_server.url)
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
  monkeypatch.chdir(tmp_path)  # Where no folder has the model's name.
  yield hub_server
  hub_server.shutdown()
  hub_server.server_close()
  thread.join()


def test_a_name_is_fetched_and_converted(server, tmp_path):
  environment = {
    **os.environ,
    'PYTHONPATH': os.pathsep.join(
      [str(pathlib.Path(__file__).parents[1]), os.environ.get('PYTHONPATH', '')]
    ),
    'HF_ENDPOINT': server.url,
    'HF_HOME': str(tmp_path / 'home'),
    'HF_HUB_OFFLINE': '0',
  }
  done = subprocess.run(
    [sys.executable, '-m', 'l2s_jax', 'convert', '--from=hf', '--to=l2s']
    + [NAME, 'out'],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert '29 tensors read back with equal' in done.stdout
  ours = opening.open_source(str(tmp_path / 'out'))
  theirs = opening.open_source(str(server.folder))
  for path in theirs.shapes():
    np.testing.assert_array_equal(ours.read(path), theirs.read(path))
  # The last one says where answers start and end.
  wanted = {'config.json', 'model.safetensors', 'vocab.json', 'merges.txt'}
  assert server.given == wanted | {'generation_config.json'}


def test_a_pickle_is_fetched_only_where_there_is_nothing_else(server):
  (server.folder / 'model.safetensors').unlink()
  folder = hub.download(NAME)
  assert (folder / 'pytorch_model.bin').read_text() == 'large'
  assert 'tf_model.h5' not in server.given


def refusal(name):
  with pytest.raises(ValueError) as error:
    hub.download(name)
  assert '\n' not in str(error.value)
  return str(error.value)


def test_a_model_that_is_not_there_is_one_sentence(server):
  sentence = refusal('some-org/no-such-model')
  assert sentence.startswith('some-org/no-such-model is not a local folder')
  assert 'Check the name' in sentence


def test_a_gated_model_says_how_to_get_it(server):
  server.errors['model.safetensors'] = (403, 'GatedRepo')
  sentence = refusal(NAME)
  assert sentence.startswith(f'{NAME} is a gated model. Request access')


def test_a_file_that_is_listed_and_not_there_is_one_sentence(server):
  server.errors['model.safetensors'] = (404, 'EntryNotFound')
  sentence = refusal(NAME)
  assert 'could not be downloaded from the Hugging Face Hub: 404' in sentence


def test_a_model_without_weights_of_a_known_form_is_named(server):
  (server.folder / 'model.safetensors').unlink()
  (server.folder / 'pytorch_model.bin').unlink()
  assert refusal(NAME).startswith(f'{NAME} has neither *.safetensors nor')


def test_a_server_that_is_down_is_one_sentence(server, monkeypatch):
  set_endpoint(monkeypatch, 'http://127.0.0.1:9')  # Nothing listens there.
  assert 'could not be downloaded' in refusal(NAME)


def test_a_name_on_the_hub_is_told_from_a_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  os.makedirs('weights/t5')
  assert hub.is_name('google-t5/t5-small')
  assert not hub.is_name('weights/t5')
  assert not hub.is_name('/weights/t5')
  assert not hub.is_name('weights')


def test_a_hub_out_of_reach_is_one_sentence(monkeypatch):
  reason = 'fetches from the Hub'
  constants = pytest.importorskip('huggingface_hub.constants', reason=reason)
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  with pytest.raises(ValueError) as error:
    hub.download('google-t5/no-such-model')
  assert 'google-t5/no-such-model is not a local folder, and it' in str(
    error.value
  )
  assert '\n' not in str(error.value)


def test_without_its_package_the_hub_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(ValueError, match=r'l2s_jax\[hub\]'):
    hub.download('google-t5/t5-small')
