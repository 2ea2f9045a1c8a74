"""Paths of OpenCode that are not served, and why: clients get words instead of a riddle."""

from __future__ import annotations

import re
from typing import Final

_WHY: Final = (
    (r"/pty(/.*)?", "there are no terminals here"),
    (r"/tui/.*", "no terminal is steered from here"),
    (r"/session/[^/]+/share", "nothing is shared from here"),
    (r"/auth/.*", "keys are given in the environment of the server"),
    (r"/provider/[^/]+/oauth/.*", "keys are given in the environment of the server"),
    (r"/mcp(/.*)?", "there are no MCP servers here; give tools to the runtime"),
    (r"/file/status|/vcs/.*", "version control is left to the tools"),
    (r"/project/.*", "projects are directories, and only read"),
    (r"/global/upgrade", "the server is upgraded where it was installed"),
    (r"/sync/.*", "events are replayed by /event?after="),
    (r"/experimental/.*", "experiments of OpenCode are not served"),
    (r"/api(/.*)?", "the unfinished protocol is not served; use the paths without /api"),
)


def why(path: str) -> str | None:
    """Why a path that OpenCode has is not served; None if it has no such path."""
    return next((words for pattern, words in _WHY if re.fullmatch(pattern, path)), None)
