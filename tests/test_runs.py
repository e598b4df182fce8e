# SPDX-License-Identifier: Apache-2.0
"""A run's folder says in words what is wrong with it.

What a run's weights are is in `test_weights.py` and `test_convert.py`.
"""

import dataclasses
import json

import helpers
import pytest

from l2s_jax.systems import run_folder
from l2s_jax.weights import runs


def test_a_torn_description_is_named(tmp_path):
  path = tmp_path / 'model.json'
  path.write_text('{"kind": "langua')
  with pytest.raises(ValueError, match=f'{path} is not JSON'):
    runs.Run(tmp_path)


@pytest.mark.parametrize('name', ['t5_1_1', 'llm_to_gpt2-add-shared'])
def test_what_a_description_lacks_is_named(name, tmp_path):
  system = helpers.system(helpers.MODULES[name])
  run_folder.save(
    dataclasses.replace(system, sources={'llm': 'llms/big'}), tmp_path
  )
  path = tmp_path / 'model.json'
  whole = json.loads(path.read_text())
  assert run_folder.load(tmp_path).module == system.module
  # The ids are for people to read; earlier versions wrote none of these.
  later = {'special_ids', 'llm_layer', 'train_llm', 'llm_prefix_ids'}
  for key in whole.keys() & later:
    path.write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
    assert run_folder.load(tmp_path).module == system.module
  for key in whole.keys() - later:
    path.write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
    for read in (runs.Run, run_folder.load):
      with pytest.raises(ValueError) as error:
        read(tmp_path)
      said = 'kind is None' if key == 'kind' else f'lacks {key}. Copy it'
      assert str(error.value).startswith(f'{path}')
      assert said in str(error.value)
