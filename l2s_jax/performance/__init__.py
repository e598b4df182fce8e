# SPDX-License-Identifier: Apache-2.0
"""Benchmarks, and cost estimates of programs compiled for TPU pods.

`benchmark` times generation, training and data, in comparison with other
engines. The package `pods` compiles for TPUs that are not attached.
"""

# The modules that other packages may import.
__all__ = ('benchmark', 'timing')
