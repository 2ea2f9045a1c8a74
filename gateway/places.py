"""Where things are when nobody says: the database of the command line."""

from __future__ import annotations

import os
from pathlib import Path

from understudy.errors import StoreUnreadable

VARIABLE = "UNDERSTUDY_DATABASE"


def database_path(given: str | None) -> Path:
    """What was given, else UNDERSTUDY_DATABASE, else ``understudy.db`` in the user's data folder.

    That is ``$XDG_DATA_HOME/understudy`` or ``~/.local/share/understudy``.
    """
    name = given or os.environ.get(VARIABLE)
    if name:
        return Path(name).absolute()
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data, "understudy", "understudy.db")


def make_room(path: Path) -> Path:
    """The path again, with its folder made. Raises ``StoreUnreadable``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreUnreadable(f"{path.parent}: {error.strerror}", path=str(path)) from error
    return path
