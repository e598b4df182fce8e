# SPDX-License-Identifier: Apache-2.0
"""What all tests share: eight CPU devices, checked shapes, real data."""

import os
import pathlib

os.environ['JAX_PLATFORMS'] = 'cpu'  # also of the processes that tests start

import jax
import jaxtyping
import pytest

# Not XLA_FLAGS: a process that a test starts has one device, as users have.
jax.config.update('jax_num_cpu_devices', 8)
# Tests run a program once or twice: compiling is most of their time.
jax.config.update('jax_disable_most_optimizations', True)

# Before the first import of the package: every annotation of an array is
# checked at every call of its function.
jaxtyping.install_import_hook('l2s_jax', 'beartype.beartype')


@pytest.fixture(scope='session')
def shared_data() -> pathlib.Path:
  """Returns the folder of real data, or skips where there is none."""
  default = pathlib.Path(__file__).parents[2] / 'shared' / 'data'
  folder = pathlib.Path(os.environ.get('L2S_SHARED_DATA') or default)
  if not folder.is_dir():
    pytest.skip(f'no data at {folder}; set L2S_SHARED_DATA to its folder')
  return folder
