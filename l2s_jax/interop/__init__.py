# SPDX-License-Identifier: Apache-2.0
"""Out of this project: what others read, and proofs that it is equal.

`convert` is the verb. Reading the forms of others is in `weights/formats/`.
`t5x` is LLM-to-SLM as a model of T5X, and imports that.
"""

# The modules that other packages may import.
__all__ = (
  'convert',
  'parity',
  'scale_folding',
  't5x_state',
  'to_huggingface',
  'to_t5x',
)
