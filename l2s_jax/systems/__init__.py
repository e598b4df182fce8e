# SPDX-License-Identifier: Apache-2.0
"""Systems: a module, its vocabularies and its parameters.

`builders` builds a system from gin's settings, `run_folder` from a run's
folder, `bundle` from an exported run, `model_paths` from any CHECKPOINT_PATH.
`parameters` shards its parameters over a mesh and loads them. `session` is the
start of every verb: mesh, system, layout, task and lengths.
"""

# Modules that other packages may import.
__all__ = (
  'builders',
  'bundle',
  'model_paths',
  'parameters',
  'run_folder',
  'session',
  'system',
)
