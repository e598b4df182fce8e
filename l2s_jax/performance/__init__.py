# SPDX-License-Identifier: Apache-2.0
"""How fast, how large, how far from the best: measured, or compiled for.

`benchmark` times generation, training and data beside other engines; the
package `pods` compiles for TPUs that are not here.
"""

# The modules that other packages may import.
__all__ = ('benchmark', 'timing')
