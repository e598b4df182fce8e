# SPDX-License-Identifier: Apache-2.0
"""A converted folder that is not whole is refused in words.

What it holds is in `test_convert.py`.
"""

import json

import gin
import helpers
import pytest

from l2s_jax import __main__ as command_line
from l2s_jax.models import l2s
from l2s_jax.weights import converted


@pytest.fixture
def folder(tmp_path):
  params = helpers.random_params(l2s.build(helpers.T5_1_1))
  converted.save(helpers.Arrays(helpers.T5_1_1, params), tmp_path / 'ours')
  return tmp_path / 'ours'


@pytest.mark.parametrize(
  'key', ['format_version', 'model_type', 'special_ids', 'config', 'digests']
)
def test_what_the_description_lacks_is_named(key, folder):
  path = folder / converted.DESCRIPTION
  converted.ConvertedFolder(folder)
  description = json.loads(path.read_text())
  del description[key]
  path.write_text(json.dumps(description))
  with pytest.raises(ValueError, match=f'{path} lacks {key}. Convert again'):
    converted.ConvertedFolder(folder)


def test_it_has_no_steps(folder, tmp_path, capsys):
  flags = ['--from=l2s', '--to=l2s', '--step=5']
  out = tmp_path / 'out'
  assert command_line.main(['convert', *flags, str(folder), str(out)]) == 2
  gin.clear_config()
  assert '--step=5 applies only to runs and T5X' in capsys.readouterr().err
  assert not out.exists()
