# SPDX-License-Identifier: Apache-2.0
"""Conversion to other frameworks' formats, and checks against these frameworks.

`convert` implements the verb `convert`; the package `exports` implements
`export`. `weights/formats/` reads weights in other formats. Only `t5x`, the
LLM-to-SLM model for T5X, imports the package t5x.
"""

# Public modules.
__all__ = (
  'convert',
  'destination',
  'parity',
  'scale_folding',
  't5x_state',
  'to_huggingface',
  'to_t5x',
)
