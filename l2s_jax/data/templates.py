# SPDX-License-Identifier: Apache-2.0
"""Prompt templates: text with columns in braces.

Importing this module does not import TensorFlow.
"""

import string
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  import tensorflow as tf


class Template:
  """A prompt with columns in braces, such as 'summarize: {source}'.

  Attributes:
    columns: names of its columns, in order.
  """

  def __init__(
    self,
    text: str,
    source_column: str = 'source',
    *,
    placeholder: str = 'source',
  ):
    """Parses the template.

    Args:
      text: `{source}` stands for the source column, any other name in braces
        for the column of that name; a literal brace is doubled.
      source_column: name of the column for `{source}`.
      placeholder: name in braces for the source column, instead of `source`.

    Raises:
      ValueError: if it names no column, or anything but a name is in braces.
    """
    # Pairs of literal text and the column after it, or None.
    self._parts: list[tuple[str, str | None]] = []
    try:
      for literal, name, spec, conversion in string.Formatter().parse(text):
        if name is not None and (spec or conversion or not name.strip()):
          raise ValueError('braces may only contain the name of a column')
        column = source_column if name == placeholder else name
        self._parts.append((literal, column))
      self.columns = [column for _, column in self._parts if column]
      if not self.columns:
        raise ValueError('it has no column')
    except ValueError as error:
      raise ValueError(
        f'template={text!r}: {error}. Write a column as {{name}} and a '
        'literal brace as {{ or }}.'
      ) from error

  def fill_text(self, row: Mapping[str, str]) -> str:
    """Returns the prompt of a row with text in all `columns`."""
    return ''.join(
      literal + (row[column] if column else '')
      for literal, column in self._parts
    )

  def fill(self, example: Mapping[str, 'tf.Tensor']) -> 'tf.Tensor':
    """Returns the prompt of one or several examples, in `tf.data`."""
    from l2s_jax.data.features import tf

    return tf.strings.join(
      [
        piece
        for literal, column in self._parts
        for piece in (literal, example[column] if column else '')
      ]
    )


def text_to_text(
  template: Template, fallback: Template, target_column: str
) -> Callable[..., Any]:
  """Returns a SeqIO preprocessor from columns to `inputs` and `targets`.

  A column `references` is kept. Examples are mapped in batches: one call per
  example takes twenty times as long. The attribute `gives_one_for_one` marks
  that output n depends on input n alone.

  Args:
    template: template of the prompt.
    fallback: template for rows without text in a column of `template` that
      `fallback` lacks; the same template if there is no such column.
    target_column: column of the answer.
  """
  optional = sorted(set(template.columns) - set(fallback.columns))

  def fill(example: Mapping[str, 'tf.Tensor']) -> dict[str, 'tf.Tensor']:
    from l2s_jax.data.features import tf

    prompt = template.fill(example)
    if optional:
      has_all = tf.reduce_all(
        [tf.strings.strip(example[column]) != '' for column in optional],
        axis=0,
      )
      prompt = tf.where(has_all, prompt, fallback.fill(example))
    filled = {'inputs': prompt, 'targets': example[target_column]}
    if 'references' in example:
      filled['references'] = example['references']
    return filled

  def fill_all(dataset: 'tf.data.Dataset') -> 'tf.data.Dataset':
    from l2s_jax.data import features

    columns = dataset.element_spec.keys()
    missing = {*template.columns, target_column} - columns
    if missing:
      raise ValueError(
        f'the template names {", ".join(sorted(missing))}, but the columns '
        f'are {", ".join(sorted(columns))}.'
      )
    read = {*template.columns, *fallback.columns, target_column, 'references'}
    names = sorted(read & columns)
    return features.map_batches(
      dataset.map(lambda example: {name: example[name] for name in names}), fill
    )

  fill_all.gives_one_for_one = True  # type: ignore[attr-defined]
  return fill_all


def with_references(
  text: str,
  *,
  example: Mapping[str, Any] | None = None,
  is_target: bool = False,
) -> str | list[str]:
  """Returns a target together with its references; a prediction unchanged.

  A SeqIO `postprocess_fn`.
  """
  if not is_target or example is None:
    return text
  return [text, *(reference.decode() for reference in example['references'])]
