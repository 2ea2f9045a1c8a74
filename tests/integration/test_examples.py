"""Every example runs as its reader would run it, says what it promises, and leaves nothing."""

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import understudy
from understudy import Runtime, ScriptedModel

EXAMPLES = Path(__file__).parents[2] / "examples"
DEADLINE_S = 60


@pytest.fixture
def run(tmp_path):
    """Run an example in an empty directory; gives what it printed."""

    def run(name, *arguments, modules=None):
        here, temporary = tmp_path / "here", tmp_path / "temporary"
        for folder in (here, temporary):
            folder.mkdir(exist_ok=True)
        package = str(Path(understudy.__file__).parents[1])
        path = [str(modules), package] if modules else [package]
        env = {key: value for key, value in os.environ.items() if key != "UNDERSTUDY_MODEL"}
        env |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONUTF8": "1", "TMPDIR": str(temporary)}
        done = subprocess.run(
            [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", *arguments],
            cwd=here,
            env=env,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=DEADLINE_S,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        assert [*here.iterdir(), *temporary.iterdir()] == []
        return done.stdout

    return run


def test_ten_lines_show_a_turn_with_a_tool(run):
    lines = run("ten_lines").splitlines()
    assert lines[-1] == "2 + 3 is 5."
    assert lines[-2] == "prompt.settled"
    assert lines.index("prompt.accepted") < lines.index("prompt.started")


def test_hundreds_of_sessions_answer_on_a_handful_of_threads(run):
    printed = run("many_sessions", "--count", "300")
    assert "300 sessions, 300 answers, 300 of them to their own prompt" in printed
    live, threads = re.search(r"(\d+) live actors on (\d+) threads", printed).groups()
    assert int(live) == 300
    assert int(threads) < 30


def test_a_crashed_actor_is_restarted_and_the_hook_asks_again(run):
    printed = run("supervised_recovery")
    assert "crashed: InjectedCrash" in printed
    assert "the first prompt: The turn was interrupted: crash" in printed
    assert "recovered after a crash; interrupted: move_crates" in printed
    transcript = [
        line.strip() for line in printed.splitlines() if "user:" in line or "ant:" in line
    ]
    assert transcript == [
        "user: Move three crates.",
        "assistant: move_crates error",
        "user: You were interrupted. Look at what is done, and do the rest.",
        "assistant: move_crates completed",
        "assistant: All three moved.",
    ]
    assert "1 restart; the session is idle" in printed


def test_a_cursor_is_all_a_subscriber_has_to_remember(run):
    before, after = run("subscribe").split("--- closed")
    assert "the signal said: answered, answered\n" in before
    first, second = (
        [
            (int(cursor), name)
            for cursor, name in re.findall(r"^ *(\d+) ([a-z.]+)$", part, re.MULTILINE)
        ]
        for part in (before, after)
    )
    assert [name for _, name in first] == ["session.status", "session.status", "session.idle"]
    assert [name for _, name in second if name != "session.updated"] == [
        "prompt.accepted",
        "prompt.settled",
        "session.deleted",
    ]
    cursors = [cursor for cursor, _ in first + second]
    assert cursors == sorted(set(cursors))


def test_conversations_stream_side_by_side_in_an_event_loop(run):
    lines = run("asyncio_host").splitlines()
    for title in ("Oslo", "Lima"):
        mine = [line for line in lines if line.startswith(f"[{title}]")]
        assert len(mine) > 2
        assert re.fullmatch(rf"\[{title}\] One moment, here you are\. \(\d+ tokens\)", mine[-1])
    assert lines[-4:-1] == [
        "[Abort] abort",
        "[Abort] idle, and what was said is kept:",
        "[Abort] To begin with, ",
    ]
    assert lines[-1] == "Abort, Lima, Oslo"


def test_a_person_decides_about_each_tool(run):
    lines = run("approve_tools").splitlines()
    asked = [line.partition("?")[0] for line in lines if line.startswith("May it")]
    assert asked == ["May it drop invoices", "May it drop tmp_one"]
    ends = [line.strip() for line in lines if line.endswith((": completed", ": error"))]
    assert ends == [
        "drop invoices: error",
        "drop tmp_one: completed",
        "drop tmp_two: completed",
    ]
    assert lines[-1] == "Two temporary tables are gone; the invoices are still there."


def test_a_memory_recalls_what_its_own_sessions_wrote_down_and_does_not_loop(run):
    lines = run("memory_hooks").splitlines()
    assert lines == [
        "[recall] for 'I keep bees.': 0 notes",
        "[keep] - You said: I keep bees.",
        "[I keep bees.] You said: I keep bees.",
        "[recall] for 'What do you know about me?': 1 notes",
        "[keep] - You remember: - You said: I keep bees.",
        "[What do you know about me?] You remember:",
        "- You said: I keep bees.",
        "2 sessions, and 2 of the memory's own",
    ]


def test_a_desktop_conversation_needs_no_display(run):
    lines = run("desktop_host", "--headless").splitlines()
    assert lines[0] == "user: What is a stage whisper?"
    assert lines[-1] == "assistant: Loud enough for all to hear."
    assert all(line.startswith("assistant: Loud") for line in lines[1:])


def test_a_conversation_that_is_opened_again_shows_what_was_said(tmp_path):
    spec = importlib.util.spec_from_file_location("desktop_host", EXAMPLES / "desktop_host.py")
    desktop_host = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(desktop_host)
    path, model = tmp_path / "desk.db", ScriptedModel("Yes.")
    with Runtime(path, model=model) as runtime:
        runtime.create_session(session_id="ses_desk").prompt("Anyone there?").result()
    with Runtime(path, model=model) as runtime:
        session = runtime.session("ses_desk")
        conversation = desktop_host.Conversation(session)
        said = ["user: Anyone there?", "assistant: Yes."]
        assert list(conversation.texts.values()) == said
        assert not conversation.busy
        session.prompt("Still?").result()
        conversation.refresh()
        assert list(conversation.texts.values()) == [*said, "user: Still?", "assistant: Yes."]
        conversation.send(" ")
        conversation.close()
        assert "empty" in conversation.problem


STAND_IN = '''
"""As much of tkinter as the desktop example uses, with a person at the keyboard."""
import heapq, itertools, time

class Widget:
    def __init__(self, master=None, **options):
        self.options, self.content = options, ""
    def pack(self, **options): pass
    def focus_set(self): pass
    def see(self, index): pass
    def configure(self, **options): self.options |= options

class Text(Widget):
    def delete(self, first, last):
        assert self.options["state"] == "normal", "a disabled text cannot change"
        self.content = ""
    def insert(self, index, text):
        assert self.options["state"] == "normal", "a disabled text cannot change"
        self.content += text
        if "all to hear." in text:
            print(text)
            Tk.only.over = True

class Entry(Widget):
    def bind(self, key, callback):
        assert key == "<Return>"
        self.content = "  Speak up!  "
        Tk.only.after(1, callback, None)
    def get(self): return self.content
    def delete(self, first, last): self.content = ""

class Button(Widget):
    pass

class Tk:
    only = None
    def __init__(self):
        Tk.only, self.over, self.due, self.order = self, False, [], itertools.count()
    def title(self, text): pass
    def after(self, ms, callback, *arguments):
        due = (time.monotonic() + ms / 1000, next(self.order), callback, arguments)
        heapq.heappush(self.due, due)
    def mainloop(self):
        while not self.over:
            due_s, _, callback, arguments = heapq.heappop(self.due)
            time.sleep(max(0.0, due_s - time.monotonic()))
            callback(*arguments)
'''


def test_the_window_shows_a_conversation(run, tmp_path):
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "tkinter.py").write_text(textwrap.dedent(STAND_IN), encoding="utf-8")
    printed = run("desktop_host", modules=modules)
    assert printed.strip() == "user: Speak up!\n\nassistant: Loud enough for all to hear."


def test_a_client_that_attaches_goes_on_when_its_server_was_away(run):
    assert run("attach_desktop").splitlines() == [
        "the server is gone",
        "the server is back",
        *["Hello"] * 2,
        *["Are you still there?"] * 2,
    ]


def test_the_python_sdk_talks_to_a_server(run):
    assert run("python_sdk").splitlines() == [
        "user: What is 2 + 3?",
        "assistant: What is 2 + 3?",
        "sessions left: 0",
    ]


def test_every_example_is_tested_here():
    tested = set(re.findall(r'run\("(\w+)"', Path(__file__).read_text(encoding="utf-8")))
    assert tested == {path.stem for path in EXAMPLES.glob("*.py")}
