"""The opt-in set of real tools: files, search and a shell in one directory."""

from __future__ import annotations

import os
from collections.abc import Mapping

from understudy.actors.tools.files import FileTools
from understudy.actors.tools.root import Root
from understudy.actors.tools.search import SearchTools
from understudy.actors.tools.shell import ShellTools
from understudy.actors.tools.tool import Tool
from understudy.errors import InvalidInput


def workspace(
    root: str | os.PathLike[str],
    *,
    permissions: Mapping[str, str | None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[Tool]:
    """read, write, edit, list, glob, grep and bash for the directory ``root``.

    All but bash are confined to it: bash starts there and may go anywhere its user may.

    Args:
        root: an existing directory; it may be a link.
        permissions: another permission key for a tool, by name; None never asks. By default
            write and edit need ``edit``, every other tool the permission of its own name.
        environment: the variables that commands see, instead of this process's.

    Raises:
        InvalidInput: there is no such directory, or no such tool.
    """
    confined = Root(root)
    files = FileTools(confined)
    search = SearchTools(confined)
    shell = ShellTools(confined, environment=environment)
    found = (files.read, files.write, files.edit, search.list_, search.glob, search.grep)
    tools = {tool.name: tool for tool in (*found, shell.bash)}
    for name, permission in (permissions or {}).items():
        if name not in tools:
            raise InvalidInput(f"a workspace has no tool called {name}, only {', '.join(tools)}")
        tools[name].permission = permission
    return list(tools.values())
