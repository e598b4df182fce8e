# SPDX-License-Identifier: Apache-2.0
"""Models as pure functions: T5, decoder-only families, and LLM-to-SLM."""
