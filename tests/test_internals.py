# SPDX-License-Identifier: Apache-2.0
"""Laws of what libraries do not document: it is there, and used in one place.

A library may change it without a word. The file that uses it, what it uses and
the version that had it stand here, so that whoever updates a library sees what
to look at.
"""

import ast
import importlib.metadata
import pathlib
import re

import gin
import gin.config_parser
import pytest
import sacrebleu
import seqio

PACKAGE = pathlib.Path(__file__).parent.parent / 'l2s_jax'
# By file: the library, the version in which the names were seen, the names.
SEEN = {
  'gin_internals.py': (
    'gin-config',
    '0.5.0',
    ('_OPERATIVE_CONFIG', '_REGISTRY'),
  ),
  'seqio_internals.py': (
    'seqio',
    '0.0.20',
    (
      '_CachedDataSource',
      '_cache_dataset_placerholder',
      '_cache_step_idx',
      '_tasks',
      '_sub_mixtures',
      '_sample_fn',
      '_builder_kwargs',
      '_map_split',
    ),
  ),
  'bleu.py': (
    'sacrebleu',
    '2.6.0',
    ('_compute_score_from_stats', '_extract_corpus_statistics'),
  ),
  'modeling_llm_to_slm.py': (
    'transformers',
    '5.23.0',
    ('_tied_weights_keys',),
  ),
  # The URL of the server, of an emulator too.
  'storage.py': ('gcsfs', '2026.10.1', ('_location',)),
  # Seen in torch 2.13.0, too; `test_peers.py` runs what uses them.
  'peers.py': (
    'transformers',
    '5.23.0',
    ('_dynamo', '_previous_max_cache_length'),
  ),
}
# Documented in spite of their names.
PUBLIC = {'_exit', '_replace', '_asdict', '_fields'}


def private_names(path):
  """Returns the private names that a file uses and does not define."""
  text = path.read_text(encoding='utf-8')
  used = {
    node.attr
    for node in ast.walk(ast.parse(text))
    if isinstance(node, ast.Attribute) and re.match('_[^_]', node.attr)
  }
  own = {
    name
    for name in used
    if re.search(rf'(self|cls)\.{name}\b|(def|class) {name}\b', text)
  }
  return used - own - PUBLIC


@pytest.mark.parametrize(
  'path', sorted(PACKAGE.rglob('*.py')), ids=lambda path: path.name
)
def test_private_names_of_others_stand_in_one_file_each(path):
  _, _, names = SEEN.get(path.name, ('', '', ()))
  assert private_names(path) == set(names)


def has(library, version, owner, name):
  found = importlib.metadata.version(library)
  assert hasattr(owner, name), (
    f'{library} {found} has no {name}, which {version} had: see who uses it.'
  )


def test_gin_has_them():
  library, version, names = SEEN['gin_internals.py']
  for name in names:
    has(library, version, gin.config, name)
  has(library, version, gin.config._REGISTRY, 'minimal_selector')
  for name in (
    'ParsedBindingKey',
    'ParserDelegate',
    'ConfigurableReference',
    'iterate_references',
    'macro',
  ):
    has(library, version, gin.config, name)
  for name in ('ConfigParser', 'ParserDelegate', 'BindingStatement'):
    has(library, version, gin.config_parser, name)


def test_seqio_has_them():
  library, version, _ = SEEN['seqio_internals.py']
  has(library, version, seqio.dataset_providers, '_CachedDataSource')
  task = seqio.Task(
    'internals',
    source=seqio.TextLineDataSource({'train': 'absent.txt'}),
    output_features={},
    preprocessors=[seqio.CacheDatasetPlaceholder()],
  )
  has(library, version, task, '_cache_dataset_placerholder')
  assert task._cache_step_idx == 0
  for name in ('_tasks', '_sub_mixtures', '_sample_fn'):
    has(library, version, seqio.Mixture('internals', [(task, 1)]), name)
  loader = seqio.TfdsDataSource('internals:1.0.0').tfds_dataset
  for name in ('_builder_kwargs', '_map_split'):
    has(library, version, loader, name)


def test_sacrebleu_has_them():
  library, version, names = SEEN['bleu.py']
  for metric in (sacrebleu.metrics.BLEU(), sacrebleu.metrics.CHRF()):
    for name in names:
      has(library, version, metric, name)
