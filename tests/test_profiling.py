# SPDX-License-Identifier: Apache-2.0
"""Laws of traces: of the steps that were asked for, or refused."""

import jax.numpy as jnp
import pytest

from l2s_jax.runtime import profiling


def test_the_chosen_steps_are_traced(tmp_path):
  profiler = profiling.Profiler(tmp_path, (2, 3))
  for step in range(1, 6):
    profiler.before(step)
    jnp.sum(jnp.ones(step)).block_until_ready()
    assert profiler.is_last(step) == (step == 3)
    if profiler.is_last(step):
      profiler.close()
      assert list((tmp_path / profiling.FOLDER).rglob('*.xplane.pb'))


def test_nothing_is_traced_unasked(tmp_path):
  profiler = profiling.Profiler(tmp_path, None)
  profiler.before(1)
  assert not profiler.is_last(1)
  profiler.close()
  assert not (tmp_path / profiling.FOLDER).exists()


@pytest.mark.parametrize('steps', [(3, 2), (0, 2), (1,)])
def test_what_is_no_pair_of_steps_is_refused(steps):
  with pytest.raises(ValueError, match='PROFILE_STEPS='):
    profiling.check(steps)
