# SPDX-License-Identifier: Apache-2.0
"""Reading pretrained weights from any supported format, one layer at a time.

`opening.open_source` opens a run of this package, a converted folder, a Hugging
Face folder, a T5X checkpoint, a GGUF file or a model name on the Hugging Face
Hub. It returns a `source.Source`, which `source.load` reads into sharded
arrays. `families` maps tensor names and configs of model families; `formats`
reads the file formats. The writers of foreign formats are in `interop/`.
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
