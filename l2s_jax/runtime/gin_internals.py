# SPDX-License-Identifier: Apache-2.0
"""Undocumented parts of gin used by this package.

They are gin's parser, registry and references. Without them, an error in a gin
file could name neither its line nor the intended configurable. Only this module
uses them, and a test pins the gin version they were verified with.
"""

from collections.abc import Callable, Iterator
from typing import Any

import gin
from gin import config_parser

# Statements of a gin file, and their parser.
BindingStatement = config_parser.BindingStatement
ImportStatement = config_parser.ImportStatement
IncludeStatement = config_parser.IncludeStatement
ConfigParser = config_parser.ConfigParser
ParserDelegate = config_parser.ParserDelegate

# gin's references to configurables, and the delegate that creates them.
ConfigurableReference = gin.config.ConfigurableReference
ReferenceMaker = gin.config.ParserDelegate
ParsedBindingKey = gin.config.ParsedBindingKey
iterate_references = gin.config.iterate_references
macro = gin.config.macro


def registered() -> Iterator[tuple[str, Callable[..., Any]]]:
  """Yields the full names of all configurables with their functions."""
  for name, entry in gin.config._REGISTRY.items():
    yield name, entry.wrapped


def configurable(name: str) -> Callable[..., Any]:
  """Returns the configurable with a full name."""
  return gin.config._REGISTRY[name].wrapped


def minimal_name(name: str) -> str:
  """Returns the shortest unambiguous name of a configurable."""
  return gin.config._REGISTRY.minimal_selector(name)
