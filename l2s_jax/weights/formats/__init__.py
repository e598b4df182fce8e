# SPDX-License-Identifier: Apache-2.0
"""How files of others keep tensors: safetensors, T5X, GGUF."""

# The modules that other packages may import.
__all__ = ('gguf_file', 'gguf_tokenizer', 'huggingface', 't5x', 'tensor_files')
