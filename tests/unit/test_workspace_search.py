"""list, glob and grep: what they find, what they skip, where they stop."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from understudy.actors.tools import search as search_module
from understudy.actors.tools.context import DetachedContext
from understudy.actors.tools.root import Root
from understudy.actors.tools.search import SearchTools, compiled, glob_pattern
from understudy.errors import ToolError, TurnAborted


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for number, name in enumerate(
        (
            "a.py",
            "src/b.py",
            "src/deep/c.ts",
            "src/deep/d.txt",
            ".git/config.py",
            "node_modules/e.py",
        )
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"import {path.stem}\nvalue = {number}\n")
        os.utime(path, (1000 + number, 1000 + number))
    (tmp_path / "outside.py").write_text("import outside\n")
    (root / "link.py").symlink_to("../outside.py")
    (root / "linked").symlink_to("..")
    return root


@pytest.fixture
def search(root: Path) -> SearchTools:
    return SearchTools(Root(root))


# --- list --------------------------------------------------------------------------------------


def test_list_shows_a_tree_of_limited_depth(search: SearchTools) -> None:
    assert search.list_().output.splitlines() == [
        ".git/",
        "a.py",
        "link.py -> ../outside.py",
        "linked -> ..",
        "node_modules/",
        "src/",
        "  b.py",
        "  deep/",
    ]
    assert search.list_("src", depth=2).output.splitlines()[-2:] == ["  c.ts", "  d.txt"]


def test_list_is_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "LIST_ENTRIES", 3)
    result = SearchTools(Root(root)).list_()
    assert result.output.endswith("link.py -> ../outside.py\n[Only the first 3 entries.]")
    assert result.metadata == {"count": 3, "more": True}


@pytest.mark.parametrize("path", ["..", "linked", "/", "link.py", "a.py", "none"])
def test_only_directories_inside_are_listed_and_searched(search: SearchTools, path: str) -> None:
    with pytest.raises(ToolError):
        search.list_(path)
    with pytest.raises(ToolError):
        search.glob("*", path)
    if path != "a.py":
        with pytest.raises(ToolError):
            search.grep("import", path)


# --- glob --------------------------------------------------------------------------------------


def test_glob_sorts_by_time_and_skips_junk(search: SearchTools) -> None:
    assert search.glob("**/*.py").output.splitlines()[1:] == ["src/b.py", "a.py"]
    assert search.glob("*.py", "src").output == "src/b.py"
    assert search.glob("*.py", "node_modules").output == "node_modules/e.py"
    assert search.glob("nothing*").output == "No file matches."


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("*.py", "a.py", "src/a.py"),
        ("**/*.py", "a.py", "a.pyc"),
        ("**/*.py", "x/y/a.py", "x/y/apy"),
        ("src/**", "src/a/b", "srcs/a"),
        ("**/a/*.py", "x/a/y.py", "xa/y.py"),
        ("a?[0-9].{ts,tsx}", "ab1.tsx", "ab1.js"),
        ("[!a]*", "b", "a"),
        ("./a+(b).py", "a+(b).py", "aab.py"),
        ("{src,lib}/*.{a,b*}", "lib/x.bcd", "lib/x.c"),
        ("a[", "a[", "a"),
        ("[]", "[]", "a"),
    ],
)
def test_glob_patterns(pattern: str, yes: str, no: str) -> None:
    assert glob_pattern(pattern).fullmatch(yes)
    assert not glob_pattern(pattern).fullmatch(no)


@pytest.mark.parametrize("pattern", ["../*", "/etc/*", "a/../../b", "[z-a]"])
def test_impossible_glob_patterns_are_refused(search: SearchTools, pattern: str) -> None:
    with pytest.raises(ToolError):
        search.glob(pattern)


def test_glob_is_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = SearchTools(Root(root))
    monkeypatch.setattr(search_module, "GLOB_FILES", 2)
    result = search.glob("**/*.*")
    assert result.metadata == {"count": 2, "more": True}
    assert "only the 2 newest files" in result.output
    monkeypatch.setattr(search_module, "VISITED_FILES", 1)
    assert "stopped after 1 files" in search.glob("**/*.*").output


# --- grep --------------------------------------------------------------------------------------


def test_grep_finds_lines_with_their_places(search: SearchTools) -> None:
    assert search.grep(r"^import [bc]$").output.splitlines() == [
        "src/b.py:1: import b",
        "src/deep/c.ts:1: import c",
    ]
    assert search.grep("(?i)IMPORT", include="*.ts").output == "src/deep/c.ts:1: import c"
    assert search.grep("value", "src/b.py").output == "src/b.py:2: value = 1"
    assert search.grep("value", "src", include="deep/*.txt").output == "src/deep/d.txt:2: value = 3"
    assert search.grep("nowhere").output == "No line matches."


def test_grep_leaves_out_what_is_linked_binary_or_very_large(
    root: Path, search: SearchTools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "GREP_FILE_BYTES", 1000)
    (root / "data.bin").write_bytes(b"needle\0")
    (root / "large.txt").write_text("needle\n" * 1000)
    (root / "latin.txt").write_bytes(b"caf\xe9 needle\n")
    os.mkfifo(root / "pipe")
    assert search.grep("needle").output == "latin.txt:1: caf\ufffd needle"
    assert "outside" not in search.grep("import").output


def test_grep_is_bounded_in_matches_and_in_the_length_of_a_line(
    root: Path, search: SearchTools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "GREP_MATCHES", 3)
    assert search.grep("a").output.endswith("[Incomplete: only the first 3 matches.]")
    (root / "wide.txt").write_text("x" * 5000 + "needle" + "y" * 5000)
    line = search.grep("needle").output
    assert "needle" in line
    assert len(line) < 400


@pytest.mark.parametrize("pattern", ["(", "[z-a]", "a{1000000000}", "(?:a{999}){999}", "(" * 5000])
def test_an_impossible_expression_is_refused(pattern: str) -> None:
    with pytest.raises(ToolError, match="regular expression"):
        compiled(pattern)


def test_an_expression_that_never_ends_is_stopped_and_lets_other_threads_run(root: Path) -> None:
    (root / "evil.txt").write_text("a" * 60 + "b\n")
    search = SearchTools(Root(root), time_limit_s=0.5)
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.01):
            ticks.append(time.monotonic())

    ticker = threading.Thread(target=tick)
    ticker.start()
    begun = time.monotonic()
    result = search.grep("(a|aa)+$", include="evil.txt")
    took_s = time.monotonic() - begun
    done.set()
    ticker.join(5)
    assert "stopped after 0.5 s" in result.output
    assert took_s < 5
    assert len(ticks) > 5


def test_a_cancelled_search_stops(search: SearchTools) -> None:
    context = DetachedContext()
    context.cancel()
    with pytest.raises(TurnAborted):
        search.grep("import", ctx=context)
    with pytest.raises(TurnAborted):
        search.glob("**", ctx=context)
