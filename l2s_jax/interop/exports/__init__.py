# SPDX-License-Identifier: Apache-2.0
"""Exports of a run or a pretrained model as one self-contained folder.

`export_command` implements the verb `export`. It writes a bundle, or opens one,
and writes the other formats from the bundle. Each format is a module with the
functions `check`, `write` and `compare`. Files that are copied into an export,
and programs that run in a process of their own, do not import l2s_jax.
"""

# Public modules.
__all__ = (
  'export_command',
  'gguf_form',
  'hf_form',
  'onnx_form',
  'savedmodel_form',
  'stablehlo_form',
)
