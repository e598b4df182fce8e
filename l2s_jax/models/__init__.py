# SPDX-License-Identifier: Apache-2.0
"""Models in `flax.linen`: LLM-to-SLM and the language models it joins.

`l2s.LlmToSlm` joins the frozen LLM, the projector and the SLM in one module.
`language_model.LanguageModel` is a single encoder-decoder or decoder-only
model of any family, built from one `config.TransformerConfig`. Losses and
counts of FLOPs and bytes are also here. Weights, optimizers and decoding
loops are not.
"""

# Modules that other packages may import.
__all__ = (
  'batch_keys',
  'cache',
  'config',
  'flops',
  'int8',
  'l2s',
  'language_model',
  'lora',
  'losses',
  'positions',
  'shapes',
  'stored_states',
)
