# SPDX-License-Identifier: Apache-2.0
"""Laws of templates: what stands in braces is a column, all else is text."""

import pytest

from l2s_jax.data import templates
from l2s_jax.data.features import tf

ROW = {'document': 'a {b} é', 'style': 'short'}


@pytest.mark.parametrize(
  'text, columns, filled',
  [
    ('{source}', ['document'], 'a {b} é'),
    ('{style}: {source}', ['style', 'document'], 'short: a {b} é'),
    ('{{source}} {document}', ['document'], '{source} a {b} é'),
    ('{source}\n\n{source}?', ['document'] * 2, 'a {b} é\n\na {b} é?'),
  ],
)
def test_text_and_tensors_are_filled_alike(text, columns, filled):
  template = templates.Template(text, 'document')
  assert template.columns == columns
  assert template.fill_text(ROW) == filled
  tensors = {name: tf.constant(value) for name, value in ROW.items()}
  assert template.fill(tensors).numpy().decode() == filled


def test_another_word_may_stand_for_the_source():
  template = templates.Template(
    '{prompt} {source}', 'document', placeholder='prompt'
  )
  assert template.columns == ['document', 'source']


@pytest.mark.parametrize(
  'text, message',
  [
    ('{source', r"template='\{source': expected '\}'"),
    ('{}', 'braces may only contain the name of a column'),
    ('{source!r}', 'braces may only contain the name of a column'),
    ('{source:>9}', 'braces may only contain the name of a column'),
    ('{{source}}', 'it has no column'),
  ],
)
def test_anything_else_in_braces_is_refused(text, message):
  with pytest.raises(ValueError, match=message):
    templates.Template(text)
