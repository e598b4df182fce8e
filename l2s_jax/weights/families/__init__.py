# SPDX-License-Identifier: Apache-2.0
"""Tensor names and configs of model families in the package transformers."""

# The modules that other packages may import.
__all__ = (
  'config_json',
  'gpt_names',
  'llama_names',
  'name_table',
  't5_names',
  'wrappers',
)
