"""Directories as clients see them: projects and their work trees."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple


class Place(NamedTuple):
    """A directory, the work tree it is in, and the project that names."""

    directory: str
    worktree: str
    project_id: str

    @property
    def path(self) -> str:
        """The directory, from the top of its work tree."""
        path = Path(self.directory).relative_to(self.worktree).as_posix()
        return "" if path == "." else path

    @property
    def vcs(self) -> str | None:
        return "git" if _is_repository(Path(self.worktree)) else None

    def project(self, created: int) -> dict[str, Any]:
        found: dict[str, Any] = {
            "id": self.project_id,
            "worktree": self.worktree,
            "time": {"created": created, "updated": created},
            "sandboxes": [],
        }
        if self.vcs:
            found["vcs"] = self.vcs
        return found


@functools.lru_cache(maxsize=1024)
def place_of(directory: str) -> Place:
    """The place of an absolute directory; without a repository it is a project of its own."""
    path = Path(directory)
    worktree = next((top for top in (path, *path.parents) if _is_repository(top)), path)
    digest = hashlib.sha1(str(worktree).encode(), usedforsecurity=False)
    return Place(directory, str(worktree), digest.hexdigest())


def _is_repository(top: Path) -> bool:
    return os.path.exists(top / ".git")  # noqa: PTH110 - false also for what is too long a name


def branch_of(directory: str) -> str | None:
    """The branch checked out there, as git's own file says."""
    try:
        head = (Path(place_of(directory).worktree) / ".git" / "HEAD").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    name = head.strip().removeprefix("ref: refs/heads/")
    return name if name != head.strip() else None
