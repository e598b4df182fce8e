# SPDX-License-Identifier: Apache-2.0
"""LLM-to-SLM generation (arXiv 2402.16844) in JAX and Flax."""

__version__ = '0.1.0'
