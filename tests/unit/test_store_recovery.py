"""What the store tells a recovery, and where it says that a history begins."""

import functools
import threading

import pytest

from understudy.store.changes import Change
from understudy.store.events import (
    MessageUpdated,
    PartUpdated,
    PermissionAsked,
    PromptAccepted,
    SessionCreated,
)
from understudy.store.records import (
    Ask,
    AssistantMessage,
    CompactionPart,
    Failure,
    MessageTime,
    Prompt,
    Session,
    SessionTime,
    TextPart,
    Tokens,
    UserMessage,
)
from understudy.store.store import Store

ID = "ses_1"
INFO = Session(id=ID, title="t", time=SessionTime(created=1, updated=1))
ERROR = Failure(name="ModelError", data={"message": "no"})
MODEL = {"agent": "build", "mode": "build", "provider_id": "p", "model_id": "m", "tokens": Tokens()}


class Book:
    """A session in a store, to which rows are put one by one."""

    def __init__(self, store):
        self.store = store
        self._seq = 1
        self._wait(
            functools.partial(store.create, INFO, (SessionCreated(session_id=ID, info=INFO),))
        )

    def _wait(self, begin):
        outcome, over = [], threading.Event()

        def done(result, _, error):
            outcome.append(error)
            over.set()

        begin(done)
        assert over.wait(15)
        assert outcome == [None]

    def put(self, *facts):
        change = Change(ID, "rtm_1", 1, self._seq, 1, facts)
        self._seq += len(facts)
        self._wait(functools.partial(self.store.commit, change))

    def prompt(self, message_id, turn, *, message=True):
        info = Prompt(message_id=message_id, session_id=ID, digest="d", accepted=1, turn=turn)
        if message:
            self.user(message_id, turn)
        self.put(PromptAccepted(session_id=ID, info=info))
        return info

    def user(self, message_id, turn):
        time = MessageTime(created=1)
        info = UserMessage(id=message_id, session_id=ID, time=time, turn=turn)
        self.put(MessageUpdated(session_id=ID, info=info))

    def answer(self, message_id, turn, parent_id, *, text="", **options):
        """A finished one, with a text or none."""
        time = MessageTime(created=1, completed=2)
        info = AssistantMessage(
            id=message_id,
            session_id=ID,
            time=time,
            turn=turn,
            parent_id=parent_id,
            **MODEL,
            **options,
        )
        part = TextPart(id=f"prt_{message_id}", session_id=ID, message_id=message_id, text=text)
        self.put(
            MessageUpdated(session_id=ID, info=info),
            PartUpdated(session_id=ID, part=part, time=1),
        )

    def marker(self, message_id, turn, **options):
        """A compaction on its own message."""
        self.user(message_id, turn)
        part = CompactionPart(
            id=f"prt_{message_id}", session_id=ID, message_id=message_id, **options
        )
        self.put(PartUpdated(session_id=ID, part=part, time=1))
        return part

    def open(self):
        return self.store.read.unfinished([ID])[ID]


@pytest.fixture
def book(tmp_path):
    store = Store(
        tmp_path / "a.db",
        runtime_id="rtm_1",
        wall_ms=lambda: 1_000,
        published=lambda events: None,
        durability="normal",
    )
    store.open()
    yield Book(store)
    store.close()


def test_steps_of_a_turn_are_what_it_has_answered_with_and_no_failure_or_summary(book):
    book.prompt("msg_1", 1)
    book.answer("msg_2", 1, "msg_1", text="first")
    book.answer("msg_3", 1, "msg_1", error=ERROR)
    book.answer("msg_4", 1, "msg_1", text="summed up", summary=True)
    book.answer("msg_5", 9, "msg_8", text="of another turn")
    assert book.open().steps == {1: 1}


def test_a_prompt_whose_message_is_gone_is_lost_and_no_other(book):
    there = book.prompt("msg_1", 1)
    lost = book.prompt("msg_2", 2, message=False)
    found = book.open()
    assert [prompt for prompt, _ in found.prompts] == [there]
    assert found.lost == (lost,)


@pytest.mark.parametrize(
    ("options", "summarised", "later"),
    [
        ({"parent_id": "msg_1", "summary": True, "text": "it"}, True, False),
        ({"parent_id": "msg_1", "summary": True, "error": ERROR}, False, False),
        ({"parent_id": "msg_0", "summary": True, "text": "it"}, False, False),
        ({"parent_id": "msg_0", "text": "an answer"}, False, True),
    ],
)
def test_a_marker_knows_its_own_summary_and_whether_an_answer_came_after_it(
    book, options, summarised, later
):
    part = book.marker("msg_1", 3)
    book.answer("msg_2", 4, **options)
    found = book.open()
    assert [each for each, _ in found.markers] == [part]
    assert found.summarised == ({"msg_1": "msg_2"} if summarised else {})
    assert found.later == ({"msg_1"} if later else set())


def history(book):
    return [message.id for message, _ in book.store.read.history(ID)]


def test_a_history_begins_at_the_last_compaction_that_took_effect(book):
    for number in (1, 2, 3):
        book.user(f"msg_{number}", number)
        state = "failed" if number == 3 else "committed"
        book.answer(f"msg_s{number}", number, f"msg_m{number}", text="said", summary=True)
        book.marker(f"msg_m{number}", number, state=state, summary_id=f"msg_s{number}")
    assert history(book)[0] == "msg_m2"


def test_a_history_keeps_the_tail_that_its_compaction_kept(book):
    book.user("msg_1", 1)
    book.user("msg_2", 2)
    book.answer("msg_s", 3, "msg_m", text="said", summary=True)
    book.marker("msg_m", 3, state="committed", summary_id="msg_s", tail_start_id="msg_2")
    assert history(book) == ["msg_2", "msg_s", "msg_m"]


@pytest.mark.parametrize("table", ["message", "part", "inbox", "ask"])
def test_a_row_that_nobody_can_read_is_told_of_and_then_given_up(book, table):
    asked = Ask(id="per_1", session_id=ID, kind="permission", created=1)
    book.prompt("msg_1", 1)
    book.marker("msg_2", 2)
    book.put(PermissionAsked(session_id=ID, info=asked))
    book.answer("msg_3", 1, "msg_1")
    book.store.run(
        lambda tx: tx.connection.execute(f"UPDATE {table} SET open = 1, data = '{{'").rowcount
    )
    assert book.open().damaged
    book.store.give_up_damaged(ID)
    book.store.run(lambda tx: None)  # which is written after it
    assert not book.open().damaged
    with book.store.read.connection() as c:
        left = c.execute(f"SELECT count(*) FROM {table} WHERE open = 1").fetchone()
    assert left == (0,)
