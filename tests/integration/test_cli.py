"""The command line, as a process of its own: what it prints, and how it ends."""

import gc
import json
import os
import pty
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest

from understudy import Runtime, ScriptedModel, tool
from understudy.actors.models.scripted import Call, Gate, Wait
from understudy.gateway import cli, display

PATIENCE_S = 30.0


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "understudy", *arguments]


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: PLW1510 - the caller judges the exit status
        command(*arguments), capture_output=True, text=True, timeout=60, **options
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with two finished sessions."""
    path = tmp_path_factory.mktemp("cli") / "a.db"
    with Runtime(path, model=ScriptedModel("The answer.")) as runtime:
        for name in ("one", "two"):
            session = runtime.create_session(session_id=name, title=f"Session {name}")
            session.prompt("The question?").result(timeout_s=PATIENCE_S)
    return path


@pytest.fixture
def database(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(made, tmp_path / "a.db"))


def sql(database: Path, statement: str, *values) -> list:
    with closing(sqlite3.connect(database)) as c:
        rows = c.execute(statement, values).fetchall()
        c.commit()
    return rows


def newest_cursor(database: Path) -> int:
    [(cursor,)] = sql(database, "SELECT max(cursor) FROM journal")
    return cursor


# --- the command itself ------------------------------------------------------------------------


def test_help_names_the_program_and_every_command():
    done = run("--help")
    assert done.returncode == 0
    assert "understudy" in done.stdout
    for name in ("demo", "run", "sessions", "show", "events", "doctor"):
        assert name in done.stdout
        assert run(name, "--help").returncode == 0


def test_importing_it_does_not_import_rich():
    script = "import sys, understudy.gateway.cli, understudy; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [(), ("nonsense",), ("show",), ("demo", "--kills", "-1"), ("events", "--after=x")]
    + [("chaos", "soak", f"--minutes={value}") for value in ("0", "-1", "nan", "x")],
)
def test_wrong_usage_exits_with_2(arguments):
    assert run(*arguments).returncode == 2


@pytest.mark.parametrize(
    "arguments", [("events", "--after=x"), ("serve", "--port=65536"), ("demo", "--kills=-1")]
)
def test_a_wrong_number_is_told_what_would_be_right(arguments):
    value = arguments[1].split("=")[1]
    assert f"'{value}' is not a whole number from 0" in run(*arguments).stderr


@pytest.mark.parametrize(
    "arguments",
    [("chaos", "sim", "--seeds=0"), ("sessions", "--limit=0"), ("chaos", "kill", "--rounds=0")],
)
def test_nothing_is_not_quietly_done_none_times(arguments):
    assert "'0' is not a whole number from 1" in run(*arguments).stderr


def test_who_looks_before_there_is_anything_hears_that_there_is_no_database(tmp_path: Path):
    done = run("sessions", env=os.environ | {"XDG_DATA_HOME": str(tmp_path / "none")})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("understudy: There is no database ")


NO_SEARCH = "searching files needs the extra: pip install 'understudy[workspace]'"


@pytest.mark.parametrize(
    ("arguments", "missing", "words"),
    [
        (["serve"], "starlette", "serving needs the extra: pip install 'understudy[server]'"),
        (["run", "hi"], "regex", NO_SEARCH),
        (["demo"], "regex", NO_SEARCH),
    ],
)
def test_a_command_without_its_extra_says_what_to_install(arguments, missing, words):
    script = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        f"from understudy.gateway import cli; sys.exit(cli.main({arguments}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr == f"understudy: {words}\n"


@pytest.mark.parametrize("option", ["--ask", "--allow"])
def test_a_permission_that_no_tool_needs_is_refused(tmp_path: Path, option):
    done = run("serve", option, "edti", "--port=0", f"--database={tmp_path / 'a.db'}")
    assert done.returncode == 1
    assert done.stderr == (
        "understudy: no tool needs the permission 'edti'; "
        "there is bash, edit, glob, grep, list, read, todowrite\n"
    )


def test_an_error_is_one_line_and_exit_code_1(tmp_path: Path):
    for arguments in (
        ("sessions", "--database", str(tmp_path / "none.db")),
        ("show", "nobody", "--database", str(tmp_path)),
        ("run", "hello", "--model", "nonsense", "--database", str(tmp_path / "b.db")),
        ("demo", "--root", str(tmp_path / "none")),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("understudy: ")
        assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_events_of_a_session_that_never_was_are_no_empty_page(database: Path):
    arguments = ("events", "--database", str(database), "--session")
    nobody = run(*arguments, "nobody")
    assert (nobody.returncode, nobody.stderr) == (1, "understudy: No session nobody\n")
    with Runtime(database) as runtime:
        runtime.session("one").delete()
    assert run(*arguments, "one").stdout.splitlines()[-1].split()[3] == "session.deleted"


def test_a_reader_that_leaves_early_is_no_error(database: Path):
    process = subprocess.Popen(
        command("events", "--follow", "--database", str(database)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    with Runtime(database) as runtime:
        runtime.create_session(title="x" * 1000)
        assert process.wait(PATIENCE_S) == 1
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()


# --- looking -----------------------------------------------------------------------------------


def test_sessions_are_listed_with_their_state(database: Path):
    done = run("sessions", "--database", str(database))
    assert done.returncode == 0
    assert "Session one" in done.stdout
    assert "idle" in done.stdout
    lines = run("sessions", "--json", "--limit", "1", "--database", str(database)).stdout
    assert json.loads(lines)["info"]["title"] == "Session two"


@pytest.mark.parametrize("columns", [40, 66, 200])
def test_a_terminal_of_any_width_shows_whole_ids(capsys, monkeypatch, columns):
    monkeypatch.setattr(display, "is_rich", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    session_id, title = f"ses_{'1' * 26}", "a title that may be cut " * 5
    display.table([(session_id, "idle", "today", title)], heads=("session", "state", "at", "title"))
    shown = capsys.readouterr().out
    assert session_id in shown
    assert ("\u256d" in shown) is (columns > 40)


def test_a_transcript_is_shown(database: Path):
    done = run("show", "one", "--database", str(database))
    assert "The question?" in done.stdout
    assert "The answer." in done.stdout
    shown = json.loads(run("show", "one", "--json", "--database", str(database)).stdout)
    assert [message["info"]["role"] for message in shown["messages"]] == ["user", "assistant"]


def test_what_could_command_a_terminal_is_not_printed(database: Path):
    with Runtime(database) as runtime:
        runtime.session("one").update(title="\x1b[2Jgone")
    assert "\x1b" not in run("sessions", "--database", str(database)).stdout


def test_events_start_after_a_cursor(database: Path):
    lines = run("events", "--json", "--database", str(database)).stdout.splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["cursor"] for event in events] == list(range(1, len(events) + 1))
    rest = run("events", "--after", "5", "--session", "one", "--database", str(database)).stdout
    assert len(rest.splitlines()) == sum(
        event["session_id"] == "one" and event["cursor"] > 5 for event in events
    )


def test_events_are_followed_until_ctrl_c_while_a_runtime_works(database: Path):
    last = str(sql(database, "SELECT max(cursor) FROM journal")[0][0])
    with Runtime(database, model=ScriptedModel("More.")) as runtime:
        process = subprocess.Popen(
            command("events", "--follow", "--after", last, "--json", "--database", str(database)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        runtime.session("one").prompt("Go on?").result(timeout_s=PATIENCE_S)
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["type"] == "session.idle":
                break
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 130


def test_looking_changes_nothing(database: Path):
    before = database.read_bytes()
    for arguments in (("sessions",), ("show", "one"), ("events",), ("doctor",)):
        assert run(*arguments, "--database", str(database)).returncode == 0
    assert database.read_bytes() == before


# --- run ---------------------------------------------------------------------------------------


def test_run_answers_and_a_session_goes_on(tmp_path: Path):
    database = str(tmp_path / "run.db")
    first = run("run", "Say this.", "--database", database, stdin=subprocess.DEVNULL)
    assert (first.returncode, first.stdout) == (0, "Say this.\n")
    session_id = first.stderr.split()[-1]
    again = run(*("run", "-", "--session", session_id, "--database", database), input="And this.\n")
    assert again.stdout.startswith("And this.")
    assert session_id in again.stderr
    assert sql(Path(database), "SELECT count(*) FROM inbox")[0] == (2,)


def test_an_answer_that_the_terminal_cannot_show_is_an_answer(tmp_path: Path):
    place = ("--database", str(tmp_path / "run.db"))
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = run("run", "a \N{SNOWMAN} b", *place, env=env, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (0, "a ? b\n")


def test_run_uses_the_data_folder_of_the_user(tmp_path: Path):
    env = {k: v for k, v in os.environ.items() if k != "UNDERSTUDY_DATABASE"}
    done = run("run", "x", env=env | {"XDG_DATA_HOME": str(tmp_path)}, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "understudy" / "understudy.db").exists()


# A model that calls bash, then says what came of it.
SCRIPT = """
import sys
from understudy.actors.models.scripted import Call, Say, ScriptedModel, Stall, steps_taken
from understudy.gateway import cli, run

def script(request):
    if steps_taken(request) == 0 and "twice" in sys.argv:
        return [Call("bash", {"command": f"echo from-bash {n}"}) for n in (1, 2)]
    if steps_taken(request) == 0 and "long" in sys.argv:
        return Call("bash", {"command": "echo $$ > pid; sleep 600"})
    if steps_taken(request) == 0:
        return [Say("Well."), Call("bash", {"command": "echo from-bash"})]
    if "stall" in sys.argv:
        return [Say("Waiting.\\n"), Stall()]
    call = request.turns[-1].calls[0]
    return Say(f"{call.output} error={call.is_error}")

run.model_from = lambda spec: ScriptedModel(script)
sys.exit(cli.main(sys.argv[1:3] + sys.argv[4:]))
"""


def scripted(tmp_path: Path, *options: str, kind: str = "plain") -> list[str]:
    program = tmp_path / "program.py"
    program.write_text(SCRIPT, encoding="utf-8")
    place = ("--database", str(tmp_path / "run.db"), "--directory", str(tmp_path))
    return [sys.executable, str(program), "run", "Do it.", kind, *place, *options]


def test_without_a_terminal_bash_is_refused_unless_all_is_allowed(tmp_path: Path):
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 60}
    refused = subprocess.run(scripted(tmp_path), check=False, **options)
    assert refused.returncode == 0
    assert "error=True" in refused.stdout
    allowed = subprocess.run(scripted(tmp_path, "--yes"), check=False, **options)
    assert "from-bash\n error=False" in allowed.stdout.replace("\n\n", "\n")
    assert "bash" in allowed.stderr


class Terminal:
    """A process with a terminal for its input, and what it wrote there."""

    def __init__(self, arguments: list[str], **env: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            arguments,
            env=os.environ | {"TERM": "xterm-256color"} | env,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def expect(self, text: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.seen:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self._master], [], [], max(0.0, left))
            assert ready, f"no {text!r} in {self.seen!r}"
            try:
                self.seen += os.read(self._master, 4096).decode()
            except OSError:
                raise AssertionError(f"it ended without {text!r}: {self.seen!r}") from None

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def end(self) -> int:
        code = self.process.wait(PATIENCE_S)
        os.close(self._master)
        return code


def test_on_a_terminal_rich_draws_and_colours(database: Path):
    pytest.importorskip("rich")
    terminal = Terminal(command("doctor", "--database", str(database)))
    terminal.expect("Healthy.")
    assert "╭" in terminal.seen
    assert "\x1b[1;32m" in terminal.seen
    assert terminal.end() == 0


def test_no_color_means_no_colour(database: Path):
    terminal = Terminal(command("doctor", "--database", str(database)), NO_COLOR="1")
    terminal.expect("Healthy.")
    assert "\x1b[1;32m" not in terminal.seen
    assert terminal.end() == 0


def test_without_rich_a_terminal_gets_plain_lines(database: Path, tmp_path: Path):
    (tmp_path / "rich.py").write_text("raise ImportError('hidden')", encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    terminal = Terminal(command("doctor", "--database", str(database)), PYTHONPATH=path)
    terminal.expect("Healthy.")
    assert "\x1b" not in terminal.seen
    assert "╭" not in terminal.seen
    assert terminal.end() == 0


def test_on_a_terminal_bash_is_asked_for(tmp_path: Path):
    terminal = Terminal(scripted(tmp_path))
    terminal.expect("[r]eject?")
    assert "echo from-bash" in terminal.seen
    terminal.type("perhaps\n")
    terminal.type("o\n")
    terminal.expect("error=False")
    assert terminal.end() == 0


def test_a_rejection_ends_the_turn(tmp_path: Path):
    terminal = Terminal(scripted(tmp_path))
    terminal.expect("[r]eject?")
    terminal.type("r\n")
    assert terminal.end() == 1


@pytest.mark.parametrize(("answer", "code"), [("a", 0), ("r", 1)])
def test_an_answer_that_settles_the_other_requests_too_asks_no_more(tmp_path: Path, answer, code):
    terminal = Terminal(scripted(tmp_path, kind="twice"))
    terminal.expect("[r]eject?")
    terminal.type(f"{answer}\n")
    terminal.expect("session ses_")
    assert terminal.end() == code
    assert terminal.seen.count("[r]eject?") == 1
    assert "is closed" not in terminal.seen


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_leaves_no_command_running(tmp_path: Path, number):
    process = subprocess.Popen(
        scripted(tmp_path, "--yes", kind="long"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + PATIENCE_S
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    group = int((tmp_path / "pid").read_text())
    process.send_signal(number)
    process.communicate(timeout=PATIENCE_S)
    try:
        assert process.returncode == 128 + number
        with pytest.raises(ProcessLookupError):
            os.killpg(group, 0)
        assert sql(tmp_path / "run.db", "SELECT count(*) FROM inbox WHERE open = 1") == [(0,)]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def test_ctrl_c_aborts_the_turn_and_leaves_nothing_open(tmp_path: Path):
    process = subprocess.Popen(
        scripted(tmp_path, "--yes", kind="stall"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "Waiting." not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert sql(tmp_path / "run.db", "SELECT count(*) FROM inbox WHERE open = 1") == [(0,)]
    assert run("doctor", "--database", str(tmp_path / "run.db")).returncode == 0


# --- doctor ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--json",), ("--repair",)])
def test_a_damaged_file_is_told_from_damaged_rows_with_what_to_do(tmp_path, options):
    path = tmp_path / "agent.db"
    with Runtime(path) as runtime:
        for _ in range(5):
            runtime.create_session().prompt("Hello " * 1_000).result()
    image = bytearray(path.read_bytes())
    for start in range(4096, len(image), 4096):
        image[start : start + 512] = b"\xff" * 512
    path.write_bytes(image)
    done = run("doctor", "--database", str(path), *options)
    assert done.returncode == 1
    assert "the file itself is damaged" in done.stderr
    assert ".recover" in done.stderr
    assert path.read_bytes() == image


def doctor(database: Path, *options: str) -> tuple[int, dict]:
    done = run("doctor", "--json", *options, "--database", str(database))
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def kinds(report: dict) -> set[str]:
    return {problem["kind"] for problem in report["diagnosis"]["problems"]}


def test_a_healthy_database_is_healthy(database: Path):
    assert doctor(database)[0] == 0
    assert "Healthy." in run("doctor", "--database", str(database)).stdout


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        ("UPDATE part SET data = x'ff' WHERE session_id = 'one' AND kind = 'text'", "damaged"),
        ("UPDATE message SET data = '{}' WHERE session_id = 'one'", "damaged"),
        ("UPDATE session SET data = '[]' WHERE id = 'one'", "damaged"),
        ("UPDATE part SET data = data", ""),
        ("UPDATE journal SET data = x'7b' WHERE session_id = 'one' AND seq > 4", "damaged"),
        ("UPDATE journal SET data = CAST(data AS TEXT)", ""),
        ("UPDATE journal SET type = CAST(type AS BLOB) WHERE seq > 4", "damaged"),
        ("UPDATE journal SET type = replace(type, ' ', '_') WHERE seq > 4", "damaged"),
        ("UPDATE journal SET type = replace(type, 'session.idle', 'message.updated')", "damaged"),
        ("UPDATE journal SET size = 100000 WHERE seq > 4", "damaged"),
        ("UPDATE journal SET size = -3 WHERE seq > 4", "damaged"),
        ("UPDATE part SET data = CAST(replace(data, 'answer', x'ff') AS BLOB)", "damaged"),
        ("UPDATE session SET data = CAST(replace(data, 'one', x'ff') AS BLOB)", "damaged"),
        ("UPDATE journal SET data = CAST(replace(data, 'answer', x'ff') AS BLOB)", "damaged"),
        ("UPDATE journal SET type = 'no.such' WHERE session_id = 'one' AND seq = 1", "damaged"),
        ("UPDATE journal SET type = type || ' session.idle' WHERE seq > 4", "damaged"),
        ("UPDATE journal SET type = CAST(type || x'ff' AS TEXT) WHERE seq > 4", "damaged"),
    ],
)
def test_damaged_rows_are_found_and_repaired(database: Path, damage: str, kind: str):
    sql(database, damage)
    code, report = doctor(database)
    assert (code == 1) is bool(kind)
    assert kinds(report) >= ({kind} if kind else set())
    newest = newest_cursor(database)
    code, report = doctor(database, "--repair")
    assert (code, report["diagnosis"]["problems"]) == (0, [])
    assert newest_cursor(database) >= newest  # no cursor is given again
    aside = report["repair"].get("aside")
    assert bool(aside) is bool(kind)
    if aside:
        assert Path(aside).read_text(encoding="utf-8").splitlines()
    if "journal" not in damage:
        assert "The answer." in run("show", "one", "--database", str(database)).stdout


@pytest.mark.parametrize("deleted", [False, True])
def test_whoever_read_up_to_a_damaged_event_is_told_what_comes_after_a_repair(
    database: Path, deleted: object
):
    if deleted:
        with Runtime(database, model="scripted") as runtime:
            runtime.session("two").delete()
    [(cursor, session_id)] = sql(
        database,
        "UPDATE journal SET data = x'7b' "
        "WHERE cursor = (SELECT max(cursor) FROM journal) RETURNING cursor, session_id",
    )
    assert (doctor(database)[0], doctor(database, "--repair")[0]) == (1, 0)
    with Runtime(database, model="scripted") as runtime, runtime.events(after=0) as events:
        runtime.session("one").update(title="What came after")
        told = [events.next(timeout_s=15)]
        while told[-1].type != "session.updated" or told[-1].data.info.title != "What came after":
            told.append(events.next(timeout_s=15))
    about = "session.deleted" if deleted else "session.updated"
    assert (about, session_id) in [(e.type, e.session_id) for e in told if e.cursor == cursor]
    assert told[-1].cursor > cursor


def test_a_damaged_row_is_left_out_of_a_list_in_one_line(database: Path):
    sql(database, "UPDATE session SET data = '[]' WHERE id = 'one'")
    done = run("sessions", "--database", str(database))
    assert (done.returncode, "Session two" in done.stdout) == (0, True)
    assert done.stderr.startswith("understudy: A damaged session")
    assert done.stderr.count("\n") == 1


def test_a_damaged_session_without_a_journal_is_put_back_from_its_columns(database: Path):
    sql(database, "DELETE FROM journal WHERE session_id = 'one'")
    sql(database, "UPDATE session SET data = '' WHERE id = 'one'")
    assert doctor(database)[0] == 1
    assert doctor(database, "--repair")[0] == 0
    assert "Session one" in run("sessions", "--database", str(database)).stdout


def test_rows_of_nothing_are_found_and_set_aside(database: Path):
    sql(
        database,
        "INSERT INTO part (session_id, id, message_id, seq, kind, open, data) "
        "SELECT session_id, 'foreign', 'nowhere', 1, kind, 0, "
        "replace(replace(data, id, 'foreign'), message_id, 'nowhere') FROM part LIMIT 1",
    )
    code, report = doctor(database)
    assert code == 1
    assert "orphan" in kinds(report)
    code, report = doctor(database, "--repair")
    assert (code, report["repair"]["removed"]) == (0, 1)


def test_unfinished_work_of_a_dead_runtime_is_found_and_recovered(database: Path):
    script = (
        "import os, sys; from understudy import Runtime, ScriptedModel;"
        "from understudy.actors.models.scripted import Gate, Wait;"
        "gate = Gate(); model = ScriptedModel(lambda _: Wait(gate));"
        "runtime = Runtime(sys.argv[1], model=model).start();"
        "runtime.session('one').prompt('Never answered'); gate.wait_reached(); os._exit(9)"
    )
    died = subprocess.run([sys.executable, "-c", script, str(database)], check=False, timeout=60)
    assert died.returncode == 9
    code, report = doctor(database)
    assert code == 1
    assert kinds(report) == {"unfinished", "stale"}
    code, report = doctor(database, "--repair")
    assert (code, report["repair"]["recovered"]) == (0, 1)


def closed_while_waiting(database: Path) -> None:
    """Prompts wait behind one that was running, and a call for a person's permission."""
    gate = Gate()

    @tool(permission="guarded")
    def guarded() -> str:
        """Needs permission."""
        return "done"

    model = ScriptedModel(lambda r: Wait(gate) if r.session_id == "one" else Call("guarded"))
    asking = {"guarded": "ask"}
    with Runtime(database, model=model, tools=[guarded], permissions=asking) as runtime:
        one, two = runtime.session("one"), runtime.session("two")
        with two.events() as events:
            two.prompt("May I?")
            assert any(event.type == "permission.asked" for event in events)
        one.prompt("Cut short.")
        gate.wait_reached()
        one.prompt("Later.")
        one.prompt("Later still.")


def test_what_waits_for_the_next_start_is_healthy_and_no_repair_touches_it(database: Path):
    closed_while_waiting(database)
    before = (sql(database, "SELECT data FROM inbox"), sql(database, "SELECT data FROM part"))
    code, report = doctor(database)
    assert (code, report["diagnosis"]["problems"]) == (0, [])
    assert (report["diagnosis"]["prompts"], report["diagnosis"]["asks"]) == (2, 1)
    said = run("doctor", "--database", str(database)).stdout
    assert "2 prompts for the next start, 1 request for an answer" in said
    code, report = doctor(database, "--repair")
    assert (code, report["repair"]["recovered"]) == (0, 0)
    after = (sql(database, "SELECT data FROM inbox"), sql(database, "SELECT data FROM part"))
    assert after == before
    sql(database, "UPDATE session SET data = '[]' WHERE id = 'one'")
    assert doctor(database)[0] == 1


def test_a_repair_answers_no_prompt_of_those_that_wait_behind_what_it_closes(database: Path):
    script = (
        "import os, sys; from understudy import Runtime, ScriptedModel;"
        "from understudy.actors.models.scripted import Gate, Wait;"
        "gate = Gate(); model = ScriptedModel(lambda _: Wait(gate));"
        "runtime = Runtime(sys.argv[1], model=model).start();"
        "session = runtime.session('one'); session.prompt('Cut short'); gate.wait_reached();"
        "session.prompt('Later'); os._exit(9)"
    )
    died = subprocess.run([sys.executable, "-c", script, str(database)], check=False, timeout=60)
    assert died.returncode == 9
    code, report = doctor(database, "--repair")
    assert (code, report["repair"]["recovered"]) == (0, 1)
    assert report["diagnosis"]["prompts"] == 1
    with Runtime(database, model=ScriptedModel("Here I am.")) as runtime:
        session = runtime.session("one")
        session.wait_idle(timeout_s=15)
        outcomes = [prompt.outcome for prompt in session.prompts()]
        assert outcomes[-2:] == ["interrupted", "answered"]
        assert session.messages()[-1].text == "Here I am."


def test_a_runtime_strikes_out_those_that_died(database: Path):
    sql(
        database,
        "INSERT INTO runtime (id, host, pid, started_ms, until_ms) VALUES ('rtm_x', 'h', 1, 1, 2)",
    )
    assert doctor(database)[0] == 1
    with Runtime(database):
        assert doctor(database)[0] == 0


def test_a_quarantine_is_reported_and_never_lifted(database: Path):
    sql(
        database,
        "INSERT INTO restart (session_id, total, consecutive, last_ms, reason, culprit_count, "
        "quarantined_ms) VALUES ('one', 5, 5, 1, 'it burns', 0, 1)",
    )
    for options in ((), ("--repair",), ()):
        code, report = doctor(database, *options)
        assert code == 1
        assert kinds(report) == {"quarantined"}
    assert "quarantined" in run("sessions", "--database", str(database)).stdout


def test_a_database_in_use_is_examined_and_not_repaired(database: Path):
    gate = Gate()
    with Runtime(database, model=ScriptedModel(lambda _: [Wait(gate), "Late."])) as runtime:
        runtime.session("one").prompt("Take your time.")
        gate.wait_reached()
        code, report = doctor(database)
        assert (code, len(report["diagnosis"]["live"])) == (0, 1)
        refused = run("doctor", "--repair", "--database", str(database))
        assert refused.returncode == 1
        assert "close it first" in refused.stderr
        gate.open()


def test_a_server_spares_its_collector_the_program(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "understudy.gateway.http.serve.serve",
        lambda _: seen.append((gc.isenabled(), gc.get_freeze_count())) or 0,
    )
    try:
        assert cli.main(["serve"]) == 0
    finally:
        gc.unfreeze()
    [(enabled, frozen)] = seen
    assert enabled
    assert frozen > 10_000
