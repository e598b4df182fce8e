# SPDX-License-Identifier: Apache-2.0
"""How each family of models names its tensors and says its sizes."""

# The modules that other packages may import.
__all__ = (
  'config_json',
  'gpt_names',
  'llama_names',
  'name_table',
  't5_names',
  'wrappers',
)
