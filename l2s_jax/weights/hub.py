# SPDX-License-Identifier: Apache-2.0
"""Fetches weights from the Hugging Face Hub by name, where it is reachable."""

import pathlib
import re

from l2s_jax.runtime import extras, os_errors
from l2s_jax.vocabularies import tokenizer_files
from l2s_jax.weights.formats import tensor_files

_CONFIG = 'config.json'
# Not *.bin in general: optimizer states and training arguments end so, too.
_PICKLES = ('pytorch_model*.bin', tensor_files.PICKLE_INDEX)


def is_name(text: str) -> bool:
  """Returns whether `text` may be ORGANISATION/NAME and not a folder."""
  return (
    re.fullmatch(r'[\w.-]+/[\w.-]+', text) is not None
    and not pathlib.Path(text).exists()
  )


def download(name: str) -> pathlib.Path:
  """Returns the folder that a model of the Hub was fetched to.

  Raises:
    ValueError: if the package is absent, the Hub out of reach, or has no such
      model, not for everyone, or not as safetensors or pytorch_model.bin.
  """
  extras.require(
    f'{name} is no folder here, and a download from the Hugging Face Hub',
    'huggingface_hub',
  )
  import huggingface_hub
  import huggingface_hub.errors

  common = (_CONFIG, *tokenizer_files.ALL_FILES)
  try:
    for weights in (('*.safetensors', tensor_files.INDEX), _PICKLES):
      folder = pathlib.Path(
        huggingface_hub.snapshot_download(
          name,
          allow_patterns=[*common, *weights],
          ignore_patterns=['*/*'],  # Copies for other uses are in subfolders.
        )
      )
      if any(folder.glob(weights[0])):
        return folder
  except huggingface_hub.errors.GatedRepoError as error:
    raise ValueError(
      f'{name} is not given to everyone. Ask for access on its page on the '
      'Hugging Face Hub, log in (hf auth login, or HF_TOKEN) and start again, '
      'or download the files elsewhere and name their folder.'
    ) from error
  except (
    OSError,
    huggingface_hub.errors.HTTPError,  # Of whichever package it speaks with.
    huggingface_hub.errors.HFValidationError,
  ) as error:
    raise ValueError(
      f'{name} is no folder here, and could not be fetched from the Hugging '
      f'Face Hub: {os_errors.first_line(error)}. Check the name and the '
      'network, or download the files elsewhere and name their folder.'
    ) from error
  raise ValueError(
    f'{name} has neither *.safetensors nor pytorch_model*.bin on the Hugging '
    'Face Hub. Name a model that has.'
  )
