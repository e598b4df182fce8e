# SPDX-License-Identifier: Apache-2.0
"""Laws of the source tree: who may import whom."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / 'l2s_jax'

# Lower may import higher, never the other way (docs/design.md).
ORDER = (
  'files',
  'run_format',
  'chips',
  'compilation',
  'preemption',
  'os_errors',
  'distributed',
  'integrity',
  'locks',
  'input_files',
  'record_files',
  'text_files',
  'gin_internals',
  'batch_keys',
  'partition',
  'models.config',
  'models.layers',
  'models.positions',
  'models.cache',
  'models.attention',
  'models.transformer',
  'models.language_model',
  'models.t5',
  'models.decoder_only',
  'models.projector',
  'models.l2s',
  'losses',
  'words',
  'corpus_metrics',
  'bleu',
  'rouge',
  'metrics',
  'scores',
  'tokenizer_files',
  'tokenizer_parts',
  'tokenizer_classes',
  'auto_tokenizer',
  'vocabularies',
  'byte_vocabulary',
  'tokenizer_json',
  'cldr',
  'packing',
  'seqio_internals',
  'features',
  'sources',
  'templates',
  'tasks',
  'data',
  'buckets',
  'prompts',
  'predictions',
  'evaluation',
  'adafactor',
  'optim',
  'state',
  'checkpoint',
  'weights.rows',
  'weights.config_json',
  'weights.wrappers',
  'weights.misfits',
  'weights.finite',
  'weights.t5_names',
  'weights.decoder_names',
  'weights.llama_names',
  'weights.tensor_files',
  'weights.huggingface',
  'weights.runs',
  'weights.converted',
  'weights.t5x',
  'weights.gguf_header',
  'weights.gguf_tokenizer',
  'weights.gguf_file',
  'weights.hub',
  'weights.own_tokenizer',
  'weights.to_huggingface',
  'weights.to_t5x',
  'weights',
  'systems',
  'sampling',
  'decode',
  'beam',
  'speculative',
  'generate',
  'as_it_came',
  'parameters',
  'session',
  'answerer',
  'pipeline',
  'metric_writer',
  'gin_types',
  'gin_utils',
  'costs',
  'profiling',
  'progress',
  'report',
  'evaluator',
  'evaluate',
  'train_step',
  'hooks',
  'eval_plan',
  'train',
  'hlo',
  'hlo_costs',
  'programs',
  'precompiler',
  'precompile_report',
  'precompile',
  'infer',
  'random_weights',
  'timing',
  'peers',
  'contenders',
  'speed_report',
  'train_peers',
  'train_benchmark',
  'benchmark',
  'parity',
  'convert',
  '__main__',
  'quickstart',
)
# The kinds of sources know the interface of all sources.
EXCEPTIONS = {
  (f'weights.{kind}', 'weights')
  for kind in (
    'huggingface',
    'runs',
    'converted',
    't5x',
    'to_huggingface',
    'to_t5x',
  )
}
PACKAGES_ONLY = {'', 'models'}

MAY_IMPORT_LINEN = ('models/', 'interop/', 'partition.py')
TENSORFLOW = ('tensorflow', 'tensorflow_datasets', 'tensorflow_text', 'seqio')
MAY_IMPORT_TENSORFLOW = ('features.py', 'evaluation.py')


def modules():
  for path in sorted(PACKAGE.rglob('*.py')):
    name = '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)
    yield name.removesuffix('.__init__').removesuffix('__init__'), path


def imports(path, *, top_level_only):
  """Yields the dotted names that a module imports."""
  tree = ast.parse(path.read_text(encoding='utf-8'))
  nodes = tree.body if top_level_only else ast.walk(tree)
  for node in nodes:
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        yield f'{node.module}.{alias.name}'


def test_every_module_has_its_place():
  names = {name for name, _ in modules()} - PACKAGES_ONLY
  assert names == set(ORDER)


@pytest.mark.parametrize('name,path', list(modules()))
def test_imports_point_upward(name, path):
  if name in PACKAGES_ONLY:
    pytest.skip('a package without code')
  below = ORDER[ORDER.index(name) + 1 :]
  for imported in imports(path, top_level_only=True):
    target = imported.removeprefix('l2s_jax.')
    if target == imported or target not in ORDER:
      continue
    assert target not in below or (name, target) in EXCEPTIONS, (
      f'{name} imports {target}, which is below it'
    )


@pytest.mark.parametrize('name,path', list(modules()))
def test_linen_is_imported_by_models_alone(name, path):
  del name
  place = str(path.relative_to(PACKAGE))
  if place.startswith(MAY_IMPORT_LINEN):
    return
  for imported in imports(path, top_level_only=False):
    assert not imported.startswith('flax.linen'), place


@pytest.mark.parametrize('name,path', list(modules()))
def test_core_imports_no_tensorflow(name, path):
  del name
  place = str(path.relative_to(PACKAGE))
  if place in MAY_IMPORT_TENSORFLOW:
    return
  for imported in imports(path, top_level_only=True):
    assert imported.split('.')[0] not in TENSORFLOW, place
    assert imported not in ('l2s_jax.features', 'l2s_jax.evaluation'), place


def test_no_two_public_classes_share_a_name():
  """Nor does a type alias, but for `Metric = corpus_metrics.Metric`."""
  places: dict[str, list[str]] = {}
  classes = set()
  for name, path in modules():
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
      if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
        classes.add(node.name)
        places.setdefault(node.name, []).append(name)
      elif isinstance(node, ast.Assign):
        imported = getattr(node.value, 'attr', None)
        for target in node.targets:
          if isinstance(target, ast.Name) and target.id != imported:
            places.setdefault(target.id, []).append(name)
  shared = {name: places[name] for name in classes if len(places[name]) > 1}
  assert not shared
