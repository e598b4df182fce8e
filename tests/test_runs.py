# SPDX-License-Identifier: Apache-2.0
"""A run's folder says in words what is wrong with it.

What a run's weights are is in `test_weights.py` and `test_convert.py`.
"""

import pytest

from l2s_jax.weights import runs


def test_a_torn_description_is_named(tmp_path):
  path = tmp_path / 'model.json'
  path.write_text('{"kind": "langua')
  with pytest.raises(ValueError, match=f'{path} is not JSON'):
    runs.Run(tmp_path)
