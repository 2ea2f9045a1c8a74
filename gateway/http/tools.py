"""The tools of sessions: each session's work in its own directory."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final

from understudy.actors.tools.context import ToolContext
from understudy.actors.tools.shell import MAX_TIMEOUT_S
from understudy.actors.tools.tool import Tool, ToolResult
from understudy.actors.tools.workspace import workspace
from understudy.errors import InvalidInput, ToolError
from understudy.gateway.http.wire import USER_SHELL

_WORKSPACES: Final = 256
_SECRETS: Final = ("OPENCODE_SERVER_PASSWORD", "UNDERSTUDY_SERVER_PASSWORD")


class Workspaces:
    """The workspace of each directory, made when first needed. Safe from any thread."""

    def __init__(self, directory: str) -> None:
        self._default = directory
        self._lock = threading.Lock()
        self._made: OrderedDict[str, dict[str, Tool]] = OrderedDict()
        self.allow_shell: Callable[[ToolContext], bool] = lambda _: False

    def tool(self, name: str, directory: str) -> Tool:
        """One tool of a directory's workspace. Raises ``ToolError`` if there is no such place."""
        key = directory or self._default
        with self._lock:
            tools = self._made.get(key)
            if tools is None:
                environment = {k: v for k, v in os.environ.items() if k not in _SECRETS}
                try:
                    made = workspace(key, environment=environment)
                except InvalidInput as error:
                    raise ToolError(str(error)) from error
                tools = self._made[key] = {each.name: each for each in made}
                if len(self._made) > _WORKSPACES:
                    self._made.popitem(last=False)
            self._made.move_to_end(key)
        return tools[name]

    def tools(self) -> list[Tool]:
        """Every tool, each working where the session that calls it does."""
        shell = Tool(
            self._shell,
            name=USER_SHELL,
            description="Run a command that the user gave.",
            timeout_s=MAX_TIMEOUT_S + 30,
        )
        return [*(InDirectory(each, self) for each in workspace(self._default)), shell]

    def _shell(self, command: str, ctx: ToolContext) -> ToolResult:
        # It needs no permission, so it is the user's alone: no model may call it.
        if not self.allow_shell(ctx):
            raise ToolError("this tool is the user's; use bash")
        given = {"command": command, "timeout_s": MAX_TIMEOUT_S}
        bash = self.tool("bash", ctx.directory)
        result: ToolResult = bash.invoke(given, ctx)
        return result


class InDirectory(Tool):
    """A workspace tool that works in the directory of the session that calls it."""

    def __init__(self, like: Tool, workspaces: Workspaces) -> None:
        self.__dict__.update(like.__dict__)
        self._workspaces = workspaces

    def at(self, directory: str) -> Tool:
        return self._workspaces.tool(self.name, directory)

    def invoke(self, arguments: Mapping[str, Any], context: ToolContext | None = None) -> Any:
        directory = context.directory if context is not None else ""
        return self.at(directory).invoke(arguments, context)
