# SPDX-License-Identifier: Apache-2.0
"""A run or a model as one folder that stands alone, in the forms of others.

`export_command` is the verb. It makes a bundle of the model, or opens one, and
each form is written from that: a module with `check`, `write` and `compare`.
Files that a folder carries along, and programs of their own, import nothing of
this project.
"""

# The modules that other packages may import.
__all__ = (
  'export_command',
  'gguf_form',
  'hf_form',
  'onnx_form',
  'savedmodel_form',
  'stablehlo_form',
)
