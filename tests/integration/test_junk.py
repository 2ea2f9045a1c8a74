"""Public calls with what they have no use for: they work, or say so and change nothing."""

import inspect
import math
import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy import Runtime, Session, Turn
from understudy.errors import InvalidInput, SessionNotFound, UnderstudyError

OWNERS = {"runtime": Runtime, "session": Session, "turn": Turn}
NOT_CALLED = {"start", "close"}
GIVEN = {
    "prompt": "Hello",
    "message_id": "msg_none",
    "session_id": "ses_none",
    "ask_id": "per_none",
}
"""Something usable for each argument that has no default."""

CALLS = sorted(
    (owner, name, parameter)
    for owner, kind in OWNERS.items()
    for name, method in inspect.getmembers(kind, inspect.isfunction)
    if not name.startswith("_") and name not in NOT_CALLED
    for parameter in list(inspect.signature(method).parameters)[1:]
)

NESTED = {}
NESTED["again"] = NESTED


class Hostile:
    """What raises when it is looked at."""

    def __repr__(self):
        return "Hostile()"

    def __bool__(self):
        raise ValueError("neither true nor false")

    __hash__ = None


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=5),
    st.lists(st.one_of(st.integers(), st.text(max_size=3)), max_size=3),
    st.dictionaries(st.text(max_size=3), st.one_of(st.none(), st.floats()), max_size=3),
    st.sampled_from(
        [
            *(-1, 0, 10**400, -(2**63), 2**63, math.nan, math.inf, -math.inf),
            *("", " ", "\0", "\ud800", "../..", "x" * 2_000, "a b", "*", "%"),
            *(object, object(), len, b"", set(), frozenset({1}), range(3), 1j, ..., NESTED),
            *([[]], {1: 2}, {"": math.nan}, {"a": [math.inf]}, [NESTED], Hostile()),
        ]
    ),
)


class Stage:
    """One runtime for all examples, with a session that is made again when it was deleted."""

    def __init__(self, path):
        self.runtime = Runtime(path, durability="normal").start()
        self.session = self.runtime.create_session()
        self._connection = sqlite3.connect(path)

    def owners(self):
        try:
            self.session.refresh()
        except SessionNotFound:
            self.session = self.runtime.create_session()
        turn = self.session.prompt("Hello")
        turn.result()
        self.session.wait_idle()
        return {"runtime": self.runtime, "session": self.session, "turn": turn}

    def newest(self):
        """The cursor of the last event: nothing is written without one."""
        return self._connection.execute("SELECT max(cursor) FROM journal").fetchone()

    def close(self):
        self._connection.close()
        assert self.runtime.restarts == 0
        self.owners()
        self.runtime.close()


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    made = Stage(tmp_path_factory.mktemp("junk") / "agent.db")
    yield made
    made.close()


def called(owners, call, junk):
    owner, name, parameter = call
    method = getattr(owners[owner], name)
    arguments = {
        each.name: GIVEN[each.name]
        for each in inspect.signature(method).parameters.values()
        if each.default is each.empty
    }
    result = method(**{**arguments, parameter: junk})
    if hasattr(result, "close"):
        result.close()


@settings(max_examples=250, deadline=None, database=None)
@given(call=st.sampled_from(CALLS), junk=JUNK)
def test_a_call_with_junk_works_or_is_refused_and_changes_nothing(stage, call, junk):
    owners = stage.owners()
    before = stage.newest()
    try:
        called(owners, call, junk)
    except (InvalidInput, TypeError):
        assert stage.newest() == before
    except UnderstudyError:
        pass  # nothing of that name, or no time
