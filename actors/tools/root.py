"""A directory that tools may not leave.

A path is resolved first, links and ``..`` included, and refused when it ends outside. It is then
opened one name at a time without following any link, so that a directory swapped for a link in
between is an error and not a way out. POSIX only.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from understudy.errors import InvalidInput, ToolError


class Root:
    """Reads and writes below one directory. What it refuses raises ``ToolError``."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.realpath(directory))
        if not os.path.isdir(self.path):  # noqa: PTH112 - false also for too long a name
            raise InvalidInput(f"the workspace {os.fspath(directory)!r} is not a directory")

    def resolve(self, path: str) -> Path:
        """The real path that ``path``, relative to the root or absolute, stands for."""
        try:
            real = Path(os.path.realpath(self.path / path))
        except (OSError, ValueError) as error:
            raise ToolError(f"{path!r} is not a usable path: {error}") from error
        if not real.is_relative_to(self.path):
            raise ToolError(f"{path} is outside the workspace; only paths inside it can be used")
        return real

    def relative(self, path: str) -> str:
        """Where ``path`` really is, from the root, with ``/``: what permission rules see."""
        return self.resolve(path).relative_to(self.path).as_posix()

    @contextmanager
    def directory(self, real: Path, *, create: bool = False) -> Iterator[int]:
        """An open descriptor of a resolved directory, made with its parents if ``create``."""
        flags = os.O_RDONLY | os.O_DIRECTORY
        descriptor = os.open(self.path, flags)
        try:
            for name in real.relative_to(self.path).parts:
                if create:
                    with suppress(FileExistsError):
                        os.mkdir(name, dir_fd=descriptor)
                inner = os.open(name, flags | os.O_NOFOLLOW, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = inner
            yield descriptor
        finally:
            os.close(descriptor)

    def open(self, path: str) -> BufferedReader:
        """Open an existing regular file for reading."""
        real = self._file(path)
        with explained(path), self.directory(real.parent) as directory:
            return open_regular(real.name, directory)

    def write(self, path: str, data: bytes) -> None:
        """Replace a file, or make it and its parents: whole or not at all, its mode kept.

        A process that dies here may leave a ``.….tmp`` beside the file, never half a file.
        """
        real = self._file(path)
        with explained(path), self.directory(real.parent, create=True) as directory:
            _replace(real.name, directory, data)

    def _file(self, path: str) -> Path:
        real = self.resolve(path)
        with explained(path):
            if real == self.path or real.is_dir():
                raise ToolError(f"{path or '.'} is a directory")
        return real


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turn the system's refusals into errors that a model understands."""
    try:
        yield
    except OSError as error:
        raise ToolError(f"{path}: {(error.strerror or str(error)).lower()}") from error


def open_regular(name: str, directory: int) -> BufferedReader:
    """Open a file of an open directory. Raises ``OSError``; never follows, never blocks."""
    # Without O_NONBLOCK a named pipe would wait for a writer for ever.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(name, flags, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "not a regular file")
    return os.fdopen(descriptor, "rb")


def _replace(name: str, directory: int, data: bytes) -> None:
    mode = _writable_mode(name, directory)
    temporary = f".{secrets.token_hex(8)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    descriptor = os.open(temporary, flags, 0o666, dir_fd=directory)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if mode is not None:
                os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=directory)
        raise


def _writable_mode(name: str, directory: int) -> int | None:
    """The mode of the file to be replaced, or None when it is new."""
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise OSError(0, "not a regular file")
    if not os.access(name, os.W_OK, dir_fd=directory):
        raise PermissionError(0, "the file is read-only")
    return stat.S_IMODE(found.st_mode)
