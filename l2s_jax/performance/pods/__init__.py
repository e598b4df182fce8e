# SPDX-License-Identifier: Apache-2.0
"""Compilation for TPU pods that are not attached, and cost analysis.

`precompile` is the verb. `programs` lowers the programs of training and
inference, `pod_compiler` compiles them for a topology, `hlo` and `hlo_costs`
read memory, collectives and time bounds from the optimized HLO, and
`precompile_report` writes tables.
"""

# The modules that other packages may import.
__all__ = ('precompile',)
