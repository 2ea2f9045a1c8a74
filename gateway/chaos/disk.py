"""A disk that can be full: a small file system over the database's folder, where one may mount."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOM: Final = 6 * 1024 * 1024
_BLOCK: Final = b"\0" * 65_536


class SmallDisk:
    """A ``tmpfs`` over a folder, with what was in it; taken away again, what is in it stays."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ballast = folder / "ballast"

    @staticmethod
    def possible() -> bool:
        return sys.platform == "linux" and os.geteuid() == 0 and shutil.which("mount") is not None

    def mount(self) -> bool:
        """False where mounting is not permitted. Nobody may have the database open."""
        files = {each.name: each.read_bytes() for each in self._folder.iterdir()}
        size = 2 * sum(map(len, files.values())) + ROOM
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self._folder)]
        if subprocess.run(command, check=False, capture_output=True).returncode:  # noqa: S603
            return False
        for name, data in files.items():
            (self._folder / name).write_bytes(data)
        return True

    def fill(self) -> None:
        """Leave no room at all."""
        with contextlib.closing(_Raw(self._ballast)) as ballast:
            for size in (65_536, 4_096):
                ballast.write_all(_BLOCK[:size])

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def unmount(self) -> None:
        """Nobody may have the database open."""
        self.free()
        files = {each.name: each.read_bytes() for each in self._folder.iterdir()}
        # A process that was killed a moment ago may still hold a file of it.
        subprocess.run(["umount", "--lazy", str(self._folder)], check=True)  # noqa: S603, S607
        for each in self._folder.iterdir():
            each.unlink()
        for name, data in files.items():
            (self._folder / name).write_bytes(data)


class _Raw:
    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write_all(self, block: bytes) -> None:
        """Until nothing fits."""
        try:
            while os.write(self._file, block):
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise

    def close(self) -> None:
        os.close(self._file)
