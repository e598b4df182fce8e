# SPDX-License-Identifier: Apache-2.0
"""Pretrained weights, read one layer at a time, of whatever form.

`opening.open_source` opens a run of ours, a converted folder, a Hugging Face
folder, a T5X checkpoint, a GGUF file or a name on the Hub, as a
`source.Source`; `source.load` reads one into shards. `families` says how each
family of models names its tensors, `formats` how files keep them. Writing the
forms of others is in `interop/`.
"""

# The modules that other packages may import.
__all__ = (
  'converted',
  'finite',
  'hub',
  'manifest',
  'misfits',
  'opening',
  'own_tokenizer',
  'run_format',
  'runs',
  'saved_steps',
  'source',
)
