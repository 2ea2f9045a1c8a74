"""read, write and edit, and the root that no path may leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from understudy.actors.tools import files as files_module
from understudy.actors.tools.context import DetachedContext
from understudy.actors.tools.files import FileTools, replaced
from understudy.actors.tools.root import Root
from understudy.actors.tools.tool import toolbox
from understudy.actors.tools.workspace import workspace
from understudy.errors import InvalidInput, ToolError, TurnAborted


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "outside").mkdir()
    made = tmp_path / "root"
    made.mkdir()
    return made


@pytest.fixture
def files(root: Path) -> FileTools:
    return FileTools(Root(root))


# --- workspace ---------------------------------------------------------------------------------


def test_a_workspace_has_seven_tools_with_permissions(root: Path) -> None:
    box = toolbox(workspace(root))
    assert {name: tool.permission for name, tool in box.items()} == {
        "read": "read",
        "write": "edit",
        "edit": "edit",
        "list": "list",
        "glob": "glob",
        "grep": "grep",
        "bash": "bash",
    }
    assert not box["bash"].idempotent and box["read"].idempotent
    assert all("ctx" not in tool.parameters["properties"] for tool in box.values())
    assert all(tool.description for tool in box.values())


def test_permissions_are_chosen_per_workspace(root: Path) -> None:
    box = toolbox(workspace(root, permissions={"read": None, "bash": "shell"}))
    assert (box["read"].permission, box["bash"].permission) == (None, "shell")
    assert toolbox(workspace(root))["read"].permission == "read"
    with pytest.raises(InvalidInput, match="rm"):
        workspace(root, permissions={"rm": None})


def test_a_workspace_needs_a_directory(root: Path) -> None:
    with pytest.raises(InvalidInput, match="not a directory"):
        workspace(root / "none")


# --- confinement -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["../secret.txt", "a/../../secret.txt", "link", "out/x", "/etc/hosts"]
)
def test_a_path_outside_is_refused(files: FileTools, root: Path, path: str) -> None:
    (root / "link").symlink_to("../secret.txt")
    (root / "out").symlink_to(root.parent / "outside")
    for call in (
        lambda: files.read(path),
        lambda: files.write(path, "x"),
        lambda: files.edit(path, "secret", "x"),
        lambda: files.read.patterns({"path": path}),
    ):
        with pytest.raises(ToolError, match="outside the workspace"):
            call()
    assert (root.parent / "secret.txt").read_text() == "secret"
    assert not list((root.parent / "outside").iterdir())


def test_a_dangling_link_out_makes_no_file(files: FileTools, root: Path) -> None:
    (root / "dangling").symlink_to(root.parent / "outside" / "new")
    with pytest.raises(ToolError, match="outside"):
        files.write("dangling", "x")
    assert not (root.parent / "outside" / "new").exists()


def test_a_link_that_stays_inside_is_followed_and_kept(files: FileTools, root: Path) -> None:
    (root / "real.txt").write_text("one\n")
    (root / "alias").symlink_to("real.txt")
    files.edit("alias", "one", "two")
    assert (root / "alias").is_symlink()
    assert (root / "real.txt").read_text() == "two\n"
    assert files.read.patterns({"path": "alias"}) == ("real.txt",)


def test_a_root_that_is_a_link_takes_both_spellings(root: Path) -> None:
    (root / "a.txt").write_text("hello")
    spelled = root.parent / "spelled"
    spelled.symlink_to(root)
    files = FileTools(Root(spelled))
    for path in ("a.txt", str(spelled / "a.txt"), str(root / "a.txt"), "./b/../a.txt"):
        assert "hello" in files.read(path).output
        assert files.edit.patterns({"path": path}) == ("a.txt",)


def test_a_directory_swapped_for_a_link_after_the_check_is_not_followed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    confined = Root(root)
    (root / "sub").mkdir()
    (root / "sub" / "secret.txt").write_text("mine")
    resolve = confined.resolve

    def resolve_then_swap(path: str) -> Path:
        real = resolve(path)
        (root / "sub").rename(root / "moved")
        (root / "sub").symlink_to(root.parent)
        monkeypatch.undo()
        return real

    for act in (
        lambda: confined.open("sub/secret.txt"),
        lambda: confined.write("sub/secret.txt", b"x"),
    ):
        monkeypatch.setattr(confined, "resolve", resolve_then_swap)
        with pytest.raises(ToolError):
            act()
        (root / "sub").unlink()
        (root / "moved").rename(root / "sub")
    assert (root.parent / "secret.txt").read_text() == "secret"


@pytest.mark.parametrize(
    "path", ["", ".", "sub", "loop", "none", "a.txt/x", "nul\0", "x" * 300, "pipe"]
)
def test_unusable_paths_are_refused_without_blocking(
    files: FileTools, root: Path, path: str
) -> None:
    (root / "sub").mkdir()
    (root / "loop").symlink_to("loop")
    (root / "a.txt").write_text("x")
    os.mkfifo(root / "pipe")
    with pytest.raises(ToolError):
        files.read(path)
    if path != "none":
        with pytest.raises(ToolError):
            files.write(path, "x")


# --- read --------------------------------------------------------------------------------------


def test_read_numbers_lines_and_says_where_to_go_on(files: FileTools, root: Path) -> None:
    (root / "a.txt").write_bytes("\ufeffone\r\ntwo\nthreé".encode())
    assert files.read("a.txt").output == "     1\tone\n     2\ttwo\n     3\tthreé\n"
    part = files.read("a.txt", offset=2, limit=1)
    assert part.output == "     2\ttwo\n\n[There is more. Go on with offset=3.]"
    assert part.metadata == {"lines": 1, "more": True}
    assert not files.read("a.txt", offset=3).metadata["more"]
    with pytest.raises(ToolError, match="ends before line 9"):
        files.read("a.txt", offset=9)


def test_an_empty_file_says_so(files: FileTools, root: Path) -> None:
    (root / "a.txt").touch()
    assert files.read("a.txt").output == "[The file is empty.]"


@pytest.mark.parametrize(
    "data", [b"a\0b", b"\x89PNG\r\n\x1a\n\0", b"caf\xe9", "utf".encode("utf-16")]
)
def test_what_is_not_text_is_refused(files: FileTools, root: Path, data: bytes) -> None:
    (root / "data").write_bytes(data)
    for call in (lambda: files.read("data"), lambda: files.edit("data", "a", "b")):
        with pytest.raises(ToolError, match=r"binary|not UTF-8"):
            call()


def test_long_lines_and_long_files_are_cut(files: FileTools, root: Path) -> None:
    long = files_module.LINE_CHARS
    (root / "a.txt").write_text(f"{'x' * long}\n{'y' * (3 * long + 3)}\nend")
    lines = files.read("a.txt").output.splitlines()
    assert lines == [f"     1\t{'x' * long}", f"     2\t{'y' * long} [line cut]", "     3\tend"]
    (root / "b.txt").write_text(f"{'z' * 999}\n" * 100)
    result = files.read("b.txt")
    assert result.metadata == {"lines": 50, "more": True}
    assert result.output.endswith("offset=51.]")


def test_a_huge_file_is_never_loaded_whole(files: FileTools, root: Path) -> None:
    with (root / "huge.txt").open("wb") as file:
        file.write(b"first\n" * 10_000)
        file.seek(1 << 40)
        file.write(b"\nlast\n")
    assert files.read("huge.txt", limit=1).output.startswith("     1\tfirst\n")
    assert files.read("huge.txt", offset=9_999, limit=2).metadata["more"]
    with pytest.raises(ToolError, match="larger than"):
        files.edit("huge.txt", "first", "second")


def test_a_long_read_stops_when_it_is_cancelled(files: FileTools, root: Path) -> None:
    with (root / "huge.txt").open("wb") as file:
        file.write(b"first\n" * 10_000)
        file.truncate(1 << 40)
    context = DetachedContext()
    errors: list[BaseException] = []

    def read() -> None:
        try:
            files.read("huge.txt", offset=1_000_000, ctx=context)
        except TurnAborted as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    context.cancel()
    thread.join(10)
    assert len(errors) == 1


# --- write -------------------------------------------------------------------------------------


def test_write_makes_parents_and_keeps_the_mode(files: FileTools, root: Path) -> None:
    files.write("a/b/c.sh", "one\r\n")
    made = root / "a" / "b" / "c.sh"
    assert made.read_bytes() == b"one\r\n"
    made.chmod(0o750)
    files.write("a/b/c.sh", "two")
    assert made.read_text() == "two"
    assert made.stat().st_mode & 0o777 == 0o750
    assert list(made.parent.iterdir()) == [made]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    files: FileTools, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "a.txt").write_text("old")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ToolError, match="no space left"):
        files.write("a.txt", "new")
    with pytest.raises(ToolError, match="UTF-8"):
        files.write("a.txt", "\ud800")
    assert [path.name for path in root.iterdir()] == ["a.txt"]
    assert (root / "a.txt").read_text() == "old"


def test_a_killed_writer_leaves_one_whole_version(root: Path) -> None:
    program = """
import sys
from understudy.actors.tools.context import DetachedContext
from understudy.actors.tools.files import FileTools
from understudy.actors.tools.root import Root
files, n = FileTools(Root(sys.argv[1])), 0
while True:
    n += 1
    files.write("a.txt", str(n % 10) * 300_000)
    print(n, flush=True)
"""
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", program, str(root)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            for _ in range(10):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        text = (root / "a.txt").read_text()
        assert len(text) == 300_000
        assert len(set(text)) == 1


# --- edit --------------------------------------------------------------------------------------


def test_edit_replaces_the_only_place_and_shows_the_diff(files: FileTools, root: Path) -> None:
    (root / "a.py").write_text("def f():\n    return 1\n")
    result = files.edit("a.py", "return 1", "return 2")
    assert (root / "a.py").read_text() == "def f():\n    return 2\n"
    assert result.metadata["replacements"] == 1
    assert "-    return 1\n+    return 2" in result.metadata["diff"]
    assert result.metadata["diff"].startswith("--- a.py\n+++ a.py\n@@ -1,2 +1,2 @@")


def test_an_edit_of_a_monotonous_file_takes_no_time(files: FileTools, root: Path) -> None:
    (root / "long").write_text("-" * 5_000_000)
    started = time.monotonic()
    with pytest.raises(ToolError, match="0 matches"):
        files.edit("long", old="-" * 5000 + "x", new="y")
    with pytest.raises(ToolError, match="100 times or more"):
        files.edit("long", old="-" * 5000, new="y")
    assert time.monotonic() - started < 10


def test_edit_says_how_often_the_text_occurs(files: FileTools, root: Path) -> None:
    (root / "a.txt").write_text("x y x y x")
    with pytest.raises(ToolError, match="0 matches"):
        files.edit("a.txt", "z", "w")
    with pytest.raises(ToolError, match="3 times"):
        files.edit("a.txt", "x", "w")
    assert (root / "a.txt").read_text() == "x y x y x"
    assert files.edit("a.txt", "x", "w", replace_all=True).metadata["replacements"] == 3
    assert (root / "a.txt").read_text() == "w y w y w"
    with pytest.raises(ToolError, match="empty"):
        files.edit("a.txt", "", "w")
    with pytest.raises(ToolError, match="same"):
        files.edit("a.txt", "w", "w")


def test_places_that_overlap_are_ambiguous() -> None:
    with pytest.raises(ToolError, match="2 times"):
        replaced("aaa", "aa", "b")
    assert replaced("aaa", "aa", "b", replace_all=True) == ("ba", 1)


def test_line_ends_of_the_file_are_kept(files: FileTools, root: Path) -> None:
    (root / "w.txt").write_bytes(b"one\r\ntwo\r\nthree\r\n")
    files.edit("w.txt", "one\ntwo", "1\n2\n2b")
    files.edit("w.txt", "three", "3\n4")
    assert (root / "w.txt").read_bytes() == b"1\r\n2\r\n2b\r\n3\r\n4\r\n"
    assert replaced("a\r\nb\nc\n", "a\nb", "x\ny") == ("x\r\ny\nc\n", 1)
    assert replaced("a\nb\n", "a\r\nb", "x\r\ny") == ("x\ny\n", 1)


def test_parallel_edits_of_one_file_are_all_kept(root: Path) -> None:
    """B23: no edit is lost when several run at once."""
    (root / "a.txt").write_text("".join(f"<{n}>\n" for n in range(40)))
    (root / "alias").symlink_to("a.txt")
    barrier = threading.Barrier(8)
    errors: list[Exception] = []

    def work(worker: int) -> None:
        files = FileTools(Root(root))
        barrier.wait(10)
        try:
            for n in range(worker, 40, 8):
                files.edit("alias" if n % 2 else "a.txt", f"<{n}>", f"[{n}]")
        except Exception as error:  # noqa: BLE001  told below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []
    assert (root / "a.txt").read_text() == "".join(f"[{n}]\n" for n in range(40))
