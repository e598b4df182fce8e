# SPDX-License-Identifier: Apache-2.0
"""A run or a model as one folder that stands alone, in the forms of others.

Each form is a module with `check`, `write` and `compare`. The files that a
folder carries along, and programs of their own, are here too: they import
nothing of this project.
"""

# The modules that other packages may import.
__all__ = (
  'hf_form',
  'onnx_form',
  'savedmodel_form',
  'stablehlo_form',
)
