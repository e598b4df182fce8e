# SPDX-License-Identifier: Apache-2.0
"""A system: a module, its vocabularies, and its parameters.

`builders` makes one from what gin names, `run_folder` from a run's folder,
`bundle` from an export of one, `as_it_came` from a model of others;
`parameters` lays its parameters out on a mesh and reads them. `session` is what
every verb begins with: mesh, system, layout, task and lengths.
"""

# The modules that other packages may import.
__all__ = (
  'as_it_came',
  'builders',
  'bundle',
  'parameters',
  'run_folder',
  'session',
  'system',
)
