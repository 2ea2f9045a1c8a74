"""The documentation is true: its Python runs, its tables are the code's, its links lead on."""

import inspect
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import get_args

import msgspec
import pytest

import understudy
from understudy import (
    CompactionRules,
    Limits,
    RestartPolicy,
    Retention,
    Runtime,
    Session,
    ToolContext,
    errors,
    signals,
)
from understudy.actors.hooks import HOOKS
from understudy.actors.models import acts
from understudy.actors.tools.tool import Tool
from understudy.store.events import FACTS, NOTES
from understudy.store.records import CompactionPart, Outcome, Status, ToolState, WhenBusy

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_CODE = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
DEADLINE_S = 60


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def read_path(path):
    return path.read_text(encoding="utf-8")


def read(name):
    return read_path(ROOT / name)


def tables(text):
    """Every table as a list of rows, the first one its head; a row is a list of cells."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            found.append([rows[0], *rows[2:]])
            rows = []
    return found


def table(page, *head):
    [found] = [each[1:] for each in tables(read(page)) if each[0][: len(head)] == list(head)]
    return found


def column(page, *head):
    return [names(row[0]) for row in table(page, *head)]


def names(cell):
    return tuple(re.findall(r"`([^`]+)`", cell))


# --- code and links ----------------------------------------------------------------------------


def run_python(program, folder):
    env = {key: value for key, value in os.environ.items() if key != "UNDERSTUDY_MODEL"}
    env |= {"PYTHONPATH": str(Path(understudy.__file__).parents[1]), "PYTHONUTF8": "1"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=folder,
        env=env,
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=DEADLINE_S,
    )


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_the_python_of_a_page_runs(page, tmp_path):
    """A page's blocks make one program, in order."""
    text = read_path(page)
    program = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    done = run_python(program, tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


def test_the_readme_shows_a_turn(tmp_path):
    [program] = re.findall(r"^```python\n(.*?)^```", read("README.md"), re.DOTALL | re.MULTILINE)
    printed = run_python(program, tmp_path).stdout.splitlines()
    assert printed[0] == "message.updated"
    assert printed[-2:] == ["prompt.settled", "What is 2 + 3?"]
    assert len([line for line in program.splitlines() if line]) == 10


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_links_of_a_page_lead_somewhere(page):
    text = read_path(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        assert (page.parent / path).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", read_path(page.parent / path), re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w-]", "", each.lower().replace(" ", "-")) for each in headings
            }


def test_every_page_is_in_the_index():
    linked = set(re.findall(r"\]\((\w+\.md)\)", read("docs/README.md")))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) < 120


# --- events ------------------------------------------------------------------------------------


def documented_events():
    found = {}
    for each in tables(read("docs/events.md")):
        if each[0][:2] == ["event", "signal"]:
            for event, signal, _, payload in each[1:]:
                assert names(event)[0] not in found, f"{event} is there twice"
                found[names(event)[0]] = (names(signal)[0], names(payload))
    return found


def payload_of(fact):
    return tuple(name for name in fact.__struct_fields__ if name != "session_id")


def test_every_event_is_documented_with_its_payload():
    documented = {name: payload for name, (_, payload) in documented_events().items()}
    assert documented == {name: payload_of(fact) for name, fact in {**FACTS, **NOTES}.items()}


def test_every_event_is_documented_with_its_signal():
    for name, (signal, _) in documented_events().items():
        assert getattr(signals, signal) is signals.BY_TYPE[name]


# --- errors ------------------------------------------------------------------------------------


def all_errors(base=errors.UnderstudyError):
    found = {base}
    for each in base.__subclasses__():
        if each.__module__ == errors.__name__:
            found |= all_errors(each)
    return found


def test_the_tree_of_errors_is_the_one_of_the_module():
    [tree] = re.findall(r"```text\n(UnderstudyError\n.*?)```", read("docs/errors.md"), re.DOTALL)
    assert textwrap.indent(tree, "    ") in errors.__doc__
    drawn = set(re.findall(r"^[│├└─ ]*([A-Z]\w+)", tree, re.MULTILINE))
    assert drawn == {each.__name__ for each in all_errors()}


def test_every_error_says_what_to_do():
    listed = [names(row[0])[0] for row in table("docs/errors.md", "error", "attributes")]
    text = read("docs/errors.md")
    [bases] = re.findall(r"The base classes (.*?) are for", text, re.DOTALL)
    assert {*listed, *names(bases)} == {each.__name__ for each in all_errors()}
    assert len(set(listed)) == len(listed)


def test_the_attributes_of_errors_are_those_of_their_classes():
    for row in table("docs/errors.md", "error", "attributes"):
        error = getattr(errors, names(row[0])[0])
        annotated = {
            name for each in error.__mro__ for name in getattr(each, "__annotations__", ())
        }
        assert annotated <= set(names(row[1])), row


# --- lifecycle ---------------------------------------------------------------------------------


def test_every_outcome_of_a_prompt_is_documented():
    documented = {name for (name,) in column("docs/lifecycle.md", "outcome")}
    assert documented == set(get_args(Outcome))


def test_every_way_to_treat_a_prompt_while_busy_is_documented():
    documented = [name for (name,) in column("docs/lifecycle.md", "`when_busy`")]
    assert documented == list(get_args(WhenBusy))


def test_every_state_of_a_tool_call_is_documented():
    documented = [name for (name,) in column("docs/lifecycle.md", "state", "meaning", "event")]
    assert documented == [state.__struct_config__.tag for state in get_args(ToolState)]


def test_every_state_of_a_marker_is_documented():
    rows = table("docs/lifecycle.md", "state", "active")
    states = get_args(inspect.get_annotations(CompactionPart, eval_str=True)["state"])
    assert [names(row[0])[0] for row in rows] == list(states)
    ids = {"id": "prt_1", "session_id": "ses_1", "message_id": "msg_1"}
    for state, row in zip(states, rows, strict=True):
        assert row[1] == ("yes" if CompactionPart(**ids, state=state).active else "no")


def test_every_status_of_a_session_is_documented():
    documented = [name for (name,) in column("docs/lifecycle.md", "session status")]
    assert documented == list(get_args(inspect.get_annotations(Status, eval_str=True)["type"]))


# --- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "head"),
    [
        (Limits(), "limit"),
        (CompactionRules(), "rule"),
        (RestartPolicy(), "rule"),
        (Retention(), "rule"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_documented_defaults_are_the_real_ones(options, head):
    real = {key: str(value) for key, value in msgspec.structs.asdict(options).items()}
    documented = [
        {names(row[0])[0]: row[1] for row in each[1:]}
        for each in tables(read("docs/operations.md"))
        if each[0][:2] == [head, "default"]
    ]
    assert real in documented


def test_the_documented_options_of_a_runtime_have_their_defaults():
    parameters = inspect.signature(Runtime).parameters
    for row in table("docs/operations.md", "option", "default"):
        assert row[1] == str(parameters[names(row[0])[0]].default), row


def test_every_option_of_a_tool_is_documented():
    options = [name for name in inspect.signature(Tool).parameters if name != "function"]
    assert sorted(name for (name,) in column("docs/tools.md", "option")) == sorted(options)


def test_everything_in_a_tool_context_is_documented():
    cells = "".join(cell for row in table("docs/tools.md", "", "") for cell in row)
    documented = set(re.findall(r"[`(]?\b([a-z_]+)\b(?=[`(])", cells))
    members = {name for name in vars(ToolContext) if not name.startswith("_")}
    assert members | set(ToolContext.__annotations__) <= documented


def test_every_act_of_a_script_is_documented():
    [listed] = re.findall(r"^Acts: (.*)$", read("docs/models.md"), re.MULTILINE)
    assert set(names(listed)) == {act.__name__ for act in get_args(acts.Act)}


def test_every_hook_is_documented():
    assert [name for (name,) in column("docs/design.md", "hook")] == list(HOOKS)


def test_every_call_of_a_session_is_documented():
    documented = {
        name.split("(")[0] for found in column("docs/sessions.md", "call") for name in found
    }
    public = {name for name, _ in inspect.getmembers(Session, inspect.isfunction)}
    assert documented == {name for name in public if not name.startswith("_")}


def test_every_command_is_documented():
    told = subprocess.run(
        [sys.executable, "-m", "understudy", "--help"],
        env=os.environ | {"PYTHONPATH": str(Path(understudy.__file__).parents[1])},
        check=True,
        capture_output=True,
        encoding="utf-8",
    ).stdout
    commands = re.findall(r"^    (\w+) ", told, re.MULTILINE)
    documented = [name.split()[1] for (name,) in column("docs/operations.md", "command")]
    assert documented == commands


def test_every_logger_is_documented():
    code = "".join(
        read_path(path)
        for package in ("actors", "store")
        for path in (ROOT / package).rglob("*.py")
    )
    used = set(re.findall(r'getLogger\("(understudy\.\w+)"\)', code))
    assert {name for (name,) in column("docs/operations.md", "logger")} == used
