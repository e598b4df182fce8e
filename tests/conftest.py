# SPDX-License-Identifier: Apache-2.0
"""What all tests share: eight CPU devices, checked shapes, real data."""

import atexit
import functools
import gc
import os
import pathlib
import random
import shutil
import signal
import string
import tempfile
from importlib import machinery
from unittest import mock

os.environ['JAX_PLATFORMS'] = 'cpu'  # also of the processes that tests start
os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'  # The user's is not ours.
# Tests run a program once or twice: compiling is most of their time. Fusions by
# way of MLIR are two thirds of that, and parts of a program that are compiled
# side by side another tenth.
os.environ['XLA_FLAGS'] = (
  '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
)
os.environ['L2S_TESTS_XLA_FLAGS'] = os.environ['XLA_FLAGS']  # of `forked.py`
# Programs that the tests and their processes (`forked.py`) compile, for all
# workers.
if 'L2S_TESTS_CACHE' not in os.environ:
  os.environ['L2S_TESTS_CACHE'] = tempfile.mkdtemp(prefix='l2s_tests_')
  atexit.register(
    shutil.rmtree, os.environ['L2S_TESTS_CACHE'], ignore_errors=True
  )

import beartype
import gin
import jax
import jaxtyping
import pytest
from jaxtyping import _import_hook

# A shell that runs this in the background has it ignored, and what is ignored
# stays so in the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Not by XLA_FLAGS, which processes of tests may have: those have one device.
jax.config.update('jax_num_cpu_devices', 8)
# XLA has a thread for each device, and a device that waits for others keeps it.
# With no more than these, a busy machine can leave all of them waiting.
os.environ['PJRT_NPROC'] = '32'
jax.config.update('jax_disable_most_optimizations', True)
# Here alone: what reads the variables is what tests start.
jax.config.update('jax_enable_compilation_cache', True)
jax.config.update('jax_compilation_cache_dir', os.environ['L2S_TESTS_CACHE'])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
jax.devices()
del os.environ['PJRT_NPROC'], os.environ['XLA_FLAGS']


def checked(function):
  """Returns `function` with its annotations checked at every call.

  But not where JAX fills a state's fields with what stands for its arrays:
  shapes, shardings, or None.
  """
  check = beartype.beartype(function)

  @functools.wraps(function)
  def init(self, *args, **kwargs):
    leaves = jax.tree.leaves((args, kwargs), is_leaf=lambda x: x is None)
    is_state = hasattr(type(self), '_flax_dataclass')
    if is_state and not all(isinstance(leaf, jax.Array) for leaf in leaves):
      return function(self, *args, **kwargs)
    return check(self, *args, **kwargs)

  return init if function.__name__ == '__init__' else check


# It has no arrays, and checking its closures takes fifty times their time.
import l2s_jax.data.cldr  # noqa: E402, F401


def get_code(loader, name):
  """Returns a module's code, which has a name of its own among those kept."""
  hash_of_checker = loader._typechecker.get_hash()
  with mock.patch(
    'importlib._bootstrap_external.cache_from_source',
    functools.partial(
      _import_hook._optimized_cache_from_source, hash_of_checker
    ),
  ):
    return machinery.SourceFileLoader.get_code(loader, name)


# jaxtyping's loader has such names while a module runs: then for all that it
# imports, TensorFlow too, of which every process compiled the sources.
_import_hook._JaxtypingLoader.get_code = get_code  # type: ignore[method-assign]
del _import_hook._JaxtypingLoader.exec_module

# Before the rest of the package is imported.
jaxtyping.install_import_hook('l2s_jax', 'conftest.checked')


@pytest.fixture(scope='session')
def shared_data() -> pathlib.Path:
  """Returns the folder of real data, or skips where there is none."""
  default = pathlib.Path(__file__).parents[2] / 'shared' / 'data'
  folder = pathlib.Path(os.environ.get('L2S_SHARED_DATA') or default)
  if not folder.is_dir():
    pytest.skip(f'no data at {folder}; set L2S_SHARED_DATA to its folder')
  return folder


@pytest.fixture(scope='session')
def vocabulary(tmp_path_factory):
  """Returns a T5-like vocabulary of letters and digits, which knows no `ș`."""
  from l2s_jax.vocabularies import sentencepiece

  rng = random.Random(0)
  letters = string.ascii_letters + string.digits
  texts = [' '.join(rng.choices(letters, k=20)) for _ in range(200)]
  path = tmp_path_factory.mktemp('vocabulary') / 'spiece.model'
  return sentencepiece.train(texts, path, vocab_size=100)


# From the longest on: one that began last would leave a core idle.
_FILES_OF_MINUTES = (
  'test_preemption',
  'test_distributed',
  'test_hf_form',
  'test_cached_features',
  'test_cache_task',
  'test_distillation',
  'test_quickstart',
  'test_buckets',
  'test_command_line',
  'test_api',
  'test_cache',
  'test_cache_writer',
  'test_kept_runs',
  'test_teachers',
  'test_infer',
  'test_export',
  'test_gguf_form',
  'test_weights',
  'test_export_systems',
  'test_t5x_state',
  'test_evaluate_verb',
  'test_cache_batches',
  'test_examples',
  'test_damage',
)


def pytest_collection_modifyitems(items):
  """Begins with the files that take longest, see `launch/test.sh`."""
  rank = {name: number for number, name in enumerate(_FILES_OF_MINUTES)}
  items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish():
  """Spares the garbage collector what stays, a tenth of the tests' time."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 50, 1000)


@pytest.fixture(scope='module', autouse=True)
def _starts_anew():
  """Gives every file an empty gin, and lets go of what it has compiled.

  All files' programs take gigabytes.
  """
  with gin.unlock_config():
    gin.clear_config()
  yield
  jax.clear_caches()
  gc.collect()
