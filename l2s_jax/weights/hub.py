# SPDX-License-Identifier: Apache-2.0
"""Downloading weights from the Hugging Face Hub by model name."""

import pathlib
import re

from l2s_jax.runtime import extras, os_errors
from l2s_jax.vocabularies import tokenizer_files
from l2s_jax.weights.formats import tensor_files

_CONFIG = 'config.json'
# Not every *.bin: optimizer states and training arguments end in .bin, too.
_PICKLES = ('pytorch_model*.bin', tensor_files.PICKLE_INDEX)


def is_name(text: str) -> bool:
  """Returns whether `text` has the form ORGANISATION/NAME and is not a path."""
  return (
    re.fullmatch(r'[\w.-]+/[\w.-]+', text) is not None
    and not pathlib.Path(text).exists()
  )


def download(name: str) -> pathlib.Path:
  """Downloads a model from the Hugging Face Hub and returns its folder.

  Only config.json, the tokenizer files and one weights format are downloaded:
  safetensors if present, else pytorch_model.bin.

  Args:
    name: ORGANISATION/NAME on the Hub.

  Raises:
    ValueError: if huggingface_hub is not installed, the Hub is unreachable, the
      model does not exist or is gated, or it has neither safetensors nor
      pytorch_model.bin.
  """
  extras.require(
    f'{name} is not a local folder, and a download from the Hugging Face Hub',
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
          ignore_patterns=['*/*'],  # Subfolders hold other formats.
        )
      )
      if any(folder.glob(weights[0])):
        return folder
  except huggingface_hub.errors.GatedRepoError as error:
    raise ValueError(
      f'{name} is a gated model. Request access on its page on the Hugging '
      'Face Hub, log in (hf auth login, or HF_TOKEN) and start again, or '
      'download the files elsewhere and give their folder.'
    ) from error
  except (
    OSError,
    huggingface_hub.errors.HTTPError,  # from the HTTP client in use
    huggingface_hub.errors.HFValidationError,
  ) as error:
    raise ValueError(
      f'{name} is not a local folder, and it could not be downloaded from the '
      f'Hugging Face Hub: {os_errors.first_line(error)}. Check the name and '
      'the network, or download the files elsewhere and give their folder.'
    ) from error
  raise ValueError(
    f'{name} has neither *.safetensors nor pytorch_model*.bin on the Hugging '
    'Face Hub. Choose a model that has one of them.'
  )
