# SPDX-License-Identifier: Apache-2.0
"""File formats of pretrained weights: safetensors, PyTorch, T5X and GGUF."""

# The modules that other packages may import.
__all__ = ('gguf_file', 'gguf_tokenizer', 'huggingface', 't5x', 'tensor_files')
