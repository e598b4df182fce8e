# SPDX-License-Identifier: Apache-2.0
"""The method and the language models it joins, in `flax.linen`.

`l2s.LlmToSlm` is the frozen LLM, the projector and the SLM as one module;
`language_model.LanguageModel` is an encoder-decoder or a decoder-only model
alone, of any family, built from one `config.TransformerConfig`. Losses are here
too, and what a model costs. Weights, optimizers and decoding loops are not.
"""

# The modules that other packages may import.
__all__ = (
  'batch_keys',
  'cache',
  'config',
  'flops',
  'l2s',
  'language_model',
  'lora',
  'losses',
  'positions',
  'shapes',
  'stored_states',
)
