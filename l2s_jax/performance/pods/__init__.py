# SPDX-License-Identifier: Apache-2.0
"""Compiles for TPU pods that are not here, and reads what comes of it.

`precompile` is the verb. `programs` has the programs of training and
inference, `pod_compiler` compiles them for a topology, `hlo` and `hlo_costs`
read memory, collectives and time bounds from the compiled text, and
`precompile_report` makes tables of them.
"""

# The modules that other packages may import.
__all__ = ('precompile',)
