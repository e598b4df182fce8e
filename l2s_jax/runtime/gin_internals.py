# SPDX-License-Identifier: Apache-2.0
"""What this package uses of gin that gin does not document.

Its parser, its registry and its references: reading files without them could
name neither the line nor what was meant. Nothing else uses them, and a test
says in which version they were seen.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gin
from gin import config_parser

# Statements of a file, and what parses it.
BindingStatement = config_parser.BindingStatement
ImportStatement = config_parser.ImportStatement
IncludeStatement = config_parser.IncludeStatement
ConfigParser = config_parser.ConfigParser
ParserDelegate = config_parser.ParserDelegate

# References as gin looks them up, and the delegate that makes them.
ConfigurableReference = gin.config.ConfigurableReference
ReferenceMaker = gin.config.ParserDelegate
ParsedBindingKey = gin.config.ParsedBindingKey
iterate_references = gin.config.iterate_references
macro = gin.config.macro


def registered() -> Iterator[tuple[str, Callable[..., Any]]]:
  """Yields all configurables by their full names."""
  for name, entry in gin.config._REGISTRY.items():
    yield name, entry.wrapped


def configurable(name: str) -> Callable[..., Any]:
  """Returns the configurable of a full name."""
  return gin.config._REGISTRY[name].wrapped


def minimal_name(name: str) -> str:
  """Returns the shortest name that stands for a configurable alone."""
  return gin.config._REGISTRY.minimal_selector(name)


def record(name: str, arguments: Mapping[str, Any]) -> None:
  """Puts a call's arguments into the operative config; drops earlier ones.

  Args:
    name: full name of the configurable, which was not called by gin.
    arguments: by parameter. The text of the config leaves out those that gin
      cannot write.
  """
  gin.config._OPERATIVE_CONFIG[('', name)] = dict(arguments)
