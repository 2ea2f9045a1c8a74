"""The store's rows: what is refused leaves none, who may write them, and what is read of them."""

import functools
import gc
import random
import threading

import pytest

from understudy import errors
from understudy.store.changes import Change
from understudy.store.events import (
    MessageRemoved,
    MessageUpdated,
    PartRemoved,
    PartUpdated,
    PermissionAsked,
    PromptAccepted,
    SessionCreated,
    SessionIdle,
)
from understudy.store.journal import Retention
from understudy.store.records import (
    Ask,
    MessageTime,
    Prompt,
    Session,
    SessionTime,
    TextPart,
    UserMessage,
)
from understudy.store.store import Store
from understudy.store.tracker_entries import BypassEntry
from understudy.store.tracker_rows import TrackerRows

ID = "ses_1"
INFO = Session(id=ID, title="t", time=SessionTime(created=1, updated=1))


def open_store(path, runtime_id, clock):
    store = Store(
        path,
        runtime_id=runtime_id,
        wall_ms=lambda: clock[0],
        published=lambda events: None,
        durability="normal",
    )
    store.open()
    return store


@pytest.fixture
def clock():
    return [1_000_000]


@pytest.fixture
def stored(tmp_path, clock):
    store = open_store(tmp_path / "a.db", "rtm_1", clock)
    wait(functools.partial(store.create, INFO, (SessionCreated(session_id=ID, info=INFO),)))
    yield store
    store.close()


@pytest.fixture
def other(stored, clock):
    store = open_store(stored.path, "rtm_2", clock)
    yield store
    store.close()


def wait(begin):
    """Begin work of a store and wait for its result, or for what it failed with."""
    outcome, over = [], threading.Event()

    def done(result, _, error):
        outcome.extend((result, error))
        over.set()

    begin(done)
    assert over.wait(15)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def commit(store, *facts, epoch=1, seq=1):
    change = Change(ID, store.runtime_id, epoch, seq, 1, facts)
    wait(functools.partial(store.commit, change))


def release(store):
    store.release([(ID, 1)])
    store.run(lambda tx: None)  # which is written after it


def claim_of(store):
    with store.read.connection() as c:
        return c.execute("SELECT owner, epoch, seq FROM claim").fetchone()


# --- changes -----------------------------------------------------------------------------------


def held_group(store, *begins):
    """Begin work of a store as one group; what became of each: its result, or its error's type."""
    held, go, told = threading.Event(), threading.Event(), threading.Semaphore(0)
    outcome = {}

    def hold():
        held.set()
        assert go.wait(15)

    store.between_commits(hold)
    assert held.wait(15)
    for number, begin in enumerate(begins):

        def done(result, _, error, number=number):
            outcome[number] = result if error is None else type(error)
            told.release()

        begin(done)
    go.set()
    for _ in begins:
        assert told.acquire(timeout=15)
    return [outcome[number] for number in range(len(begins))]


def changing(store, session_id, *, epoch=1, seq=1, owner="rtm_1"):
    change = Change(session_id, owner, epoch, seq, 1, (SessionIdle(session_id=session_id),))
    return functools.partial(store.commit, change)


def creating(store, session_id):
    info = Session(id=session_id, title="t", time=SessionTime(created=1, updated=1))
    facts = (SessionCreated(session_id=session_id, info=info),)
    return functools.partial(store.create, info, facts)


@pytest.mark.parametrize("stale", [{"epoch": 2}, {"epoch": 0}, {"owner": "rtm_2"}])
def test_of_changes_that_commit_together_those_are_refused_whose_claim_is_another(stored, stale):
    ids = [f"ses_{number:02}" for number in range(70)]
    held_group(stored, *(creating(stored, each) for each in ids))
    refused = {0, 17, 63, 64, 69}
    told = held_group(
        stored,
        *(
            changing(stored, each, **(stale if number in refused else {}))
            for number, each in enumerate(ids)
        ),
        changing(stored, "ses_nobody_has"),
    )
    expected = [errors.SessionFenced if number in refused else None for number in range(70)]
    assert told == [*expected, errors.SessionFenced]
    with stored.read.connection() as c:
        numbers = dict(c.execute("SELECT session_id, seq FROM claim"))
        written = c.execute("SELECT session_id FROM journal WHERE type = 'session.idle'").fetchall()
    kept = {each for number, each in enumerate(ids) if number not in refused}
    assert {each for each in ids if numbers[each] == 2} == kept
    assert {each for (each,) in written} == kept
    assert "ses_nobody_has" not in numbers


def test_two_changes_of_one_session_may_commit_together(stored):
    others = [f"ses_{number:02}" for number in range(6)]
    held_group(stored, *(creating(stored, each) for each in others))
    changes = [changing(stored, each) for each in others]
    told = held_group(stored, changing(stored, ID), *changes, changing(stored, ID, seq=2))
    assert told == [None] * 8
    assert [event.seq for event in stored.read.events(after=0, session_id=ID)] == [1, 2, 3]
    assert stored.read.claims([ID]) == {ID: ("rtm_1", 1)}
    commit(stored, SessionIdle(session_id=ID), seq=3)


def test_a_stale_change_is_refused_also_where_its_successors_is_in_another_group(stored):
    """As when an actor that was replaced wakes up beside the one in its place."""
    ids = [f"ses_{number:02}" for number in range(66)]
    held_group(stored, *(creating(stored, each) for each in ids))
    told = held_group(
        stored,
        *(changing(stored, each) for each in ids[:63]),
        changing(stored, ID, epoch=0, seq=5),  # the last of the first 64
        changing(stored, ID),
        *(changing(stored, each) for each in ids[63:]),
    )
    assert told == [*[None] * 63, errors.SessionFenced, *[None] * 4]
    assert [event.seq for event in stored.read.events(after=0, session_id=ID)] == [1, 2]
    commit(stored, SessionIdle(session_id=ID), seq=2)


@pytest.mark.parametrize("seed", range(6))
def test_changes_are_refused_together_as_they_are_alone(tmp_path, clock, seed):
    chance = random.Random(seed)
    ids = [f"ses_{number:03}" for number in range(chance.choice([3, 20, 120]))]
    count = chance.choice([5, 17, 66, 90, 150])
    stale = set(chance.sample(range(count), 1 + count // 30))
    changes = [
        (chance.choice(ids), chance.choice([0, 2]) if number in stale else 1, number)
        for number in range(count)
    ]
    outcomes = []
    for name, at_once in (("together", len(changes)), ("alone", 1)):
        store = open_store(tmp_path / f"{name}.db", "rtm_1", clock)
        held_group(store, *(creating(store, each) for each in ids))
        begins = [changing(store, each, epoch=epoch, seq=seq) for each, epoch, seq in changes]
        told = [
            each
            for start in range(0, len(begins), at_once)
            for each in held_group(store, *begins[start : start + at_once])
        ]
        with store.read.connection() as c:
            seqs = c.execute("SELECT session_id, seq FROM claim ORDER BY session_id").fetchall()
        outcomes.append((told, seqs))
        store.close()
    assert outcomes[0] == outcomes[1]
    assert errors.SessionFenced in outcomes[0][0]


@pytest.mark.parametrize("before", [0, 1])
def test_a_change_after_what_takes_its_claim_away_in_its_group_is_refused(stored, before):
    others = [f"ses_{number:02}" for number in range(7)]
    held_group(stored, *(creating(stored, each) for each in others))
    told = held_group(
        stored,
        *(changing(stored, each) for each in others),
        *[changing(stored, ID)] * before,
        functools.partial(stored.delete_tree, ID, 1),
        *(changing(stored, each, seq=2) for each in others[:4]),  # and one more: a group of four
        changing(stored, ID, seq=1 + before),
    )
    assert told == [*[None] * (7 + before), [ID], *[None] * 4, errors.SessionFenced]
    seqs = [event.seq for event in stored.read.events(after=0, session_id=ID)]
    assert seqs == list(range(1, 3 + before))


def test_what_one_change_puts_and_removes_is_not_there_afterwards(stored):
    message = UserMessage(id="msg_1", session_id=ID, time=MessageTime(created=1), turn=1)
    kept = TextPart(id="prt_1", session_id=ID, message_id="msg_1", text="kept")
    gone = TextPart(id="prt_2", session_id=ID, message_id="msg_1", text="gone")
    commit(
        stored,
        MessageUpdated(session_id=ID, info=message),
        PartUpdated(session_id=ID, part=kept, time=1),
        PartUpdated(session_id=ID, part=gone, time=1),
        PartRemoved(session_id=ID, message_id="msg_1", part_id="prt_2"),
    )
    assert stored.read.messages(ID) == [(message, (kept,))]
    commit(
        stored,
        PartUpdated(session_id=ID, part=gone, time=1),
        MessageRemoved(session_id=ID, message_id="msg_1"),
        seq=5,
    )
    with stored.read.connection() as c:
        assert c.execute("SELECT id FROM message UNION SELECT id FROM part").fetchall() == []


def test_work_that_fails_after_it_has_written_leaves_nothing_of_it(stored):
    def work(tx):
        tx.connection.execute("UPDATE session SET title = 'half'")
        raise errors.InvalidInput("no", field="title")

    with pytest.raises(errors.InvalidInput):
        wait(functools.partial(stored.submit, work))
    with stored.read.connection() as c:
        assert c.execute("SELECT title FROM session").fetchone() == ("t",)


def test_what_is_submitted_to_a_closed_store_is_answered(stored):
    stored.close()
    with pytest.raises(errors.RuntimeClosed):
        wait(functools.partial(stored.submit, lambda tx: (None, [])))


def test_an_id_that_is_there_is_refused_as_such(stored):
    facts = (SessionCreated(session_id=ID, info=INFO),)
    with pytest.raises(errors.SessionExists):
        wait(functools.partial(stored.create, INFO, facts))
    assert claim_of(stored) == ("rtm_1", 1, 1)


def test_an_entry_that_was_put_off_meanwhile_is_not_removed_as_what_it_was(stored):
    rows = TrackerRows(stored)
    sooner, later = (
        BypassEntry(key="k", owner=None, ttl_s=1.0, expires_at_ms=at_ms) for at_ms in (10, 20)
    )
    rows.save([sooner])
    rows.save([later])
    rows.remove([sooner])
    assert rows.load() == [later]
    rows.remove([later])
    assert rows.load() == []


# --- claims ------------------------------------------------------------------------------------


@pytest.mark.parametrize("moved", ["seq = seq + 1", "epoch = epoch + 1", "owner = 'rtm_1'", ""])
def test_an_orphan_that_moved_since_it_was_read_is_told_and_left_alone(stored, moved):
    release(stored)
    orphans = stored.read.orphans([ID])
    if moved:
        stored.run(lambda tx: tx.connection.execute(f"UPDATE claim SET {moved}").rowcount)
    before = claim_of(stored)
    settled = [(orphan, (SessionIdle(session_id=ID),)) for orphan in orphans]
    told = wait(functools.partial(stored.settle_orphans, settled))
    assert told == ([ID] if moved else [])
    assert claim_of(stored) == (before if moved else (None, 2, 2))


def test_a_session_of_a_living_runtime_is_no_orphan(stored, other):
    settled = [(orphan, (SessionIdle(session_id=ID),)) for orphan in other.read.orphans([ID])]
    assert wait(functools.partial(other.settle_orphans, settled)) == [ID]
    assert claim_of(stored) == ("rtm_1", 1, 1)


def test_a_runtime_that_lost_a_session_counts_no_crash_of_it(stored, other):
    release(stored)
    wait(functools.partial(other.acquire, ID))
    crash = functools.partial(stored.record_crash, ID, reason="r", culprit=None, quarantine_at=4)
    with pytest.raises(errors.SessionClaimed):
        wait(lambda done: crash(done=done))
    assert claim_of(stored) == ("rtm_2", 2, 1)
    assert stored.read.restarts(ID) is None


def test_a_runtime_that_lost_a_session_deletes_nothing_of_it_even_once_it_is_let_go(stored, other):
    release(stored)
    wait(functools.partial(other.acquire, ID))
    other.release([(ID, 2)])
    other.run(lambda tx: None)  # which is written after it
    with pytest.raises(errors.SessionClaimed):
        wait(functools.partial(stored.delete_tree, ID, 1))
    assert stored.read.session(ID) == INFO


def test_crashes_are_counted_in_all_and_in_a_row(stored):
    for _ in range(2):
        record = wait(
            lambda done: stored.record_crash(
                ID, reason="r", culprit="msg_1", quarantine_at=4, done=done
            )
        )
    assert (record.total, record.consecutive, record.culprit_count) == (2, 2, 2)


# --- leases ------------------------------------------------------------------------------------


def alive(store, runtime_id):
    return store.run(lambda tx: store.alive(tx, runtime_id))


def renew(store):
    over = threading.Event()
    store.renew_lease(over.set)
    assert over.wait(15)


def test_who_does_not_renew_its_lease_is_dead_to_who_has_renewed_its_own(stored, other, clock):
    for _ in range(4):
        clock[0] += 5_000
        renew(other)
    assert not alive(other, "rtm_1")
    assert wait(functools.partial(other.acquire, ID))[0].epoch == 2


def test_who_slept_takes_nobody_for_dead_until_all_had_time_to_renew(stored, other, clock):
    clock[0] += 3_600_000
    assert alive(other, "rtm_1")
    renew(other)
    assert alive(other, "rtm_1")


def test_a_claim_is_not_proved_once_the_lease_has_lapsed(stored, clock):
    term = stored.lease.term
    assert stored.lease.lasts(term, now_ms=clock[0])
    clock[0] += 15_000
    assert not stored.lease.lasts(term, now_ms=clock[0])
    renew(stored)
    assert not stored.lease.lasts(term, now_ms=clock[0])


def test_a_runtime_without_its_lock_is_dead_whatever_its_lease_says(stored, other):
    assert alive(other, "rtm_1")
    stored.lease.let_go()
    assert not alive(other, "rtm_1")


# --- reads -------------------------------------------------------------------------------------


def accept(store, message_id, *, seq, turn=None):
    """A prompt with its message, as two events."""
    time = MessageTime(created=1)
    message = UserMessage(id=message_id, session_id=ID, time=time, turn=turn)
    prompt = Prompt(message_id=message_id, session_id=ID, digest="d", accepted=1)
    commit(
        store,
        MessageUpdated(session_id=ID, info=message),
        PromptAccepted(session_id=ID, info=prompt),
        seq=seq,
    )


def ids(pairs):
    return [message.id for message, _ in pairs]


def test_prompts_and_messages_are_in_the_order_in_which_they_came(stored):
    accept(stored, "msg_b", seq=1, turn=2)
    accept(stored, "msg_a", seq=3, turn=4)
    accept(stored, "msg_0", seq=5)
    assert [each.message_id for each in stored.read.prompts(ID)] == ["msg_b", "msg_a", "msg_0"]
    assert ids(stored.read.messages(ID)) == ["msg_b", "msg_a", "msg_0"]
    assert ids(stored.read.messages(ID, before="msg_a")) == ["msg_b"]
    assert ids(stored.read.messages(ID, limit=1, before="msg_0")) == ["msg_a"]
    assert ids(stored.read.history(ID)) == ["msg_b", "msg_a"], "one waits for its turn"


def test_a_session_with_a_prompt_alone_is_unfinished(stored):
    assert not stored.read.is_unfinished(ID)
    prompt = Prompt(message_id="msg_1", session_id=ID, digest="d", accepted=1)
    commit(stored, PromptAccepted(session_id=ID, info=prompt))
    assert stored.read.is_unfinished(ID)
    assert stored.read.unfinished_sessions() == [(ID, "rtm_1")]


def test_a_transcript_goes_with_the_cursor_after_which_its_changes_follow(stored):
    accept(stored, "msg_1", seq=1)
    pairs, cursor = stored.read.snapshot(ID, limit=None)
    assert ids(pairs) == ["msg_1"]
    accept(stored, "msg_2", seq=3)
    assert stored.read.events(after=cursor)[0].data.info.id == "msg_2"
    after = stored.read.accepted_after(ID, "msg_1")
    assert stored.read.events(after=after)[0].data.info.id == "msg_1"


def test_what_is_asked_in_one_session_is_not_asked_in_another(stored):
    asked = Ask(id="per_1", session_id=ID, kind="permission", created=1)
    commit(stored, PermissionAsked(session_id=ID, info=asked))
    assert stored.read.asks() == stored.read.asks(ID) == [asked]
    assert stored.read.asks("ses_2") == []


# --- retention ---------------------------------------------------------------------------------


def trim(store, **retention):
    store.trim_journal(Retention(**retention))
    store.run(lambda tx: None)  # which is written after it
    return store.read.cursors()


def test_events_are_kept_by_their_number_and_by_their_age_and_the_newest_always(stored, clock):
    for seq in range(1, 9):
        commit(stored, SessionIdle(session_id=ID), seq=seq)  # at 1 ms
    clock[0] = 100_001
    assert trim(stored, age_s=100.0, events=9) == (1, 9)
    assert trim(stored, age_s=1e6, events=4) == (6, 9)
    clock[0] += 1
    assert trim(stored, age_s=100.0, events=9) == (9, 9)


def test_a_deleted_id_that_is_used_again_goes_on_after_its_last_epoch(stored, clock):
    wait(functools.partial(stored.delete_tree, ID, 1))
    clock[0] += 24 * 3_600_000
    trim(stored)
    facts = (SessionCreated(session_id=ID, info=INFO),)
    claimed = wait(functools.partial(stored.create, INFO, facts))
    assert (claimed.epoch, claimed.seq) == (3, 3)
    with pytest.raises(errors.SessionFenced):
        commit(stored, SessionIdle(session_id=ID), seq=3)


def test_a_commit_leaves_nothing_for_the_collector(stored):
    held_group(stored, creating(stored, "ses_1"))

    def left():
        gc.collect()
        return sum(type(each).__module__ == "builtins" for each in gc.get_objects())

    for number in range(10):
        held_group(stored, changing(stored, "ses_1", seq=1 + number))
    before = left()
    for number in range(10, 110):
        held_group(stored, changing(stored, "ses_1", seq=1 + number))
    assert left() - before < 50
