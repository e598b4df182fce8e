# SPDX-License-Identifier: Apache-2.0
"""`python -m l2s_jax` that writes a part in a bucket for each few answers."""

import runpy

from l2s_jax.inference import output_parts

if __name__ == '__main__':
  output_parts.PART_SECS = 0.0
  runpy.run_module('l2s_jax', run_name='__main__', alter_sys=True)
