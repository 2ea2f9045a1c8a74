"""The store by itself: files it refuses, work it does in pieces, callbacks it survives."""

import contextlib
import functools
import logging
import sqlite3
import threading
from collections import deque

import pytest

from understudy import Retention, errors
from understudy.store import claims, journal, lease
from understudy.store.changes import Change
from understudy.store.database import SCHEMA_VERSION, _migrate, connect, prepare
from understudy.store.events import SessionCreated, SessionIdle
from understudy.store.reads import cursor_before
from understudy.store.records import Session, SessionTime
from understudy.store.store import Store
from understudy.store.turnstile import OneAtATime
from understudy.store.writer import Job


@pytest.fixture
def stored(tmp_path):
    store = Store(
        tmp_path / "a.db",
        runtime_id="rtm_1",
        wall_ms=lambda: 1_000,
        published=lambda events: None,
        durability="normal",
    )
    store.open()
    yield store
    store.close()


def wait(begin):
    """Begin work of a store and wait for it: (result, events), or what it failed with."""
    outcome, over = [], threading.Event()

    def done(result, events, error):
        outcome.extend((result, events, error))
        over.set()

    begin(done)
    assert over.wait(15)
    if outcome[2] is not None:
        raise outcome[2]
    return outcome[:2]


def new_session(store, session_id="ses_1", *, facts=1, title="t"):
    info = Session(id=session_id, title=title, time=SessionTime(created=1, updated=1))
    created = (SessionCreated(session_id=session_id, info=info),) * facts
    return wait(functools.partial(store.create, info, created))[0]


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [3, None, b"bytes.db", "", ":memory:", "file:a.db", "a\0b.db"])
def test_what_is_no_path_of_a_file_is_refused(path):
    with pytest.raises(errors.InvalidInput) as refused:
        Store(path, runtime_id="rtm_1", wall_ms=lambda: 1, published=print)
    assert refused.value.field == "path"


@pytest.mark.parametrize("path", [".", "missing/a.db", "file.txt/a.db"])
def test_a_place_where_no_file_can_be_is_refused_by_its_name(tmp_path, path):
    (tmp_path / "file.txt").write_text("words")
    with pytest.raises(errors.StoreUnreadable) as refused:
        Store(tmp_path / path, runtime_id="rtm_1", wall_ms=lambda: 1, published=print)
    assert str(tmp_path) in str(refused.value)
    assert [each.name for each in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("pragma", ["application_id = 7", "user_version = 3"])
def test_the_database_of_another_application_is_left_alone(tmp_path, pragma):
    path = tmp_path / "theirs.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE theirs (a)")
        connection.execute(f"PRAGMA {pragma}")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(errors.StoreUnreadable, match="another application"):
        prepare(path)
    assert path.read_bytes() == before


def test_a_file_that_was_migrated_meanwhile_is_not_migrated_again(tmp_path):
    prepare(tmp_path / "a.db").close()
    database = connect(tmp_path / "a.db")
    _migrate(database)
    assert database.pragma("user_version") == SCHEMA_VERSION
    database.close()


def test_an_open_that_fails_half_way_gives_everything_back(tmp_path, monkeypatch):
    def refuse(self):
        raise OSError(13, "Permission denied")

    store = Store(tmp_path / "a.db", runtime_id="r", wall_ms=lambda: 1, published=print)
    monkeypatch.setattr(lease.Lease, "hold", refuse)
    with pytest.raises(errors.StoreUnreadable):
        store.open()
    assert store._database.is_closed()
    monkeypatch.undo()
    store.open()
    assert store.close()


def test_an_sqlite_that_is_too_old_is_named_and_no_file_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    with pytest.raises(errors.StoreError, match=r"SQLite 3\.35 or newer"):
        prepare(tmp_path / "a.db")
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_not_open_says_so(tmp_path):
    store = Store(tmp_path / "a.db", runtime_id="r", wall_ms=lambda: 1, published=print)
    with pytest.raises(errors.StoreError, match="not open"):
        _ = store.read
    with pytest.raises(errors.StoreError, match="not open"):
        store.renew_lease(print)


# --- work --------------------------------------------------------------------------------------


def test_work_that_takes_too_long_is_given_up_by_who_waits_alone(stored):
    hold = threading.Event()
    with pytest.raises(errors.CommandTimeout):
        stored.run(lambda tx: hold.wait(15), timeout_s=0.01)
    hold.set()
    assert stored.run(lambda tx: 7) == 7


def test_a_callback_that_fails_costs_nobody_else_anything(stored, caplog):
    def fail(result, events, error):
        raise ZeroDivisionError("a bug of whoever waits")

    with caplog.at_level(logging.CRITICAL, "understudy"):
        stored.submit(lambda tx: (None, []), fail)
        assert stored.run(lambda tx: 1) == 1


def test_events_are_published_before_who_wrote_them_is_answered(tmp_path):
    told = []
    store = Store(
        tmp_path / "a.db",
        runtime_id="rtm_1",
        wall_ms=lambda: 1_000,
        published=lambda events: told.append("published"),
    )
    store.open()
    with contextlib.closing(store):
        info = Session(id="ses_1", title="t", time=SessionTime(created=1, updated=1))
        created = (SessionCreated(session_id="ses_1", info=info),)
        store.create(info, created, lambda *_: told.append("answered"))
        store.run(lambda tx: None)  # which is written after it
    assert told == ["published", "answered"]


def test_a_checkpoint_that_cannot_be_made_is_put_off(stored):
    def reader(tx):
        # In a transaction SQLite refuses to checkpoint, and says so with an error.
        stored._writer._checkpoint()
        return tx.connection.execute("PRAGMA busy_timeout").fetchone()[0]

    assert stored.run(reader) == 5_000
    new_session(stored)
    assert stored.read.session("ses_1").title == "t"


def test_an_event_is_found_by_its_number_also_in_a_journal_with_gaps(stored):
    for number in (1, 2, 3):
        new_session(stored, f"ses_{number}", facts=number * 3)
    later = Change("ses_1", "rtm_1", 1, 3, 1_000, (SessionIdle(session_id="ses_1"),))
    wait(functools.partial(stored.commit, later))
    stored.run(lambda tx: tx.connection.execute("DELETE FROM journal WHERE cursor = 3"))
    known = stored.read.events(after=0)
    with stored.read.connection() as c:
        found = [cursor_before(c, event.session_id, event.seq) + 1 for event in known]
        assert found == [event.cursor for event in known] == list(range(4, 20))
        missing = [("ses_1", 1), ("ses_1", 3), ("ses_1", 5), ("ses_3", 10), ("ses_4", 1)]
        assert [cursor_before(c, *each) for each in missing] == [0] * 5


# --- the log -----------------------------------------------------------------------------------

MANY = 50  # facts, of a page of text each, of one session


def log_bytes(store):
    return store.path.with_name(store.path.name + "-wal").stat().st_size


def grow(store, *, until_bytes):
    """Create sessions of some 200 kB, and look at the log after each: its largest size."""
    largest = 0
    for number in range(until_bytes // (MANY * 4096)):
        new_session(store, f"ses_{number}", facts=MANY, title="t" * 4096)
        largest = max(largest, log_bytes(store))
    return largest


def test_the_log_is_brought_back_at_16_mb_where_there_is_room(stored):
    assert 14 << 20 < grow(stored, until_bytes=24 << 20) < 18 << 20


def test_the_log_leaves_the_room_that_it_takes_to_bring_it_back(stored, monkeypatch):
    room = 8 << 20
    monkeypatch.setattr(stored._writer, "_room_bytes", lambda: room)
    assert grow(stored, until_bytes=8 << 20) <= room // 4 + (1 << 20)


def test_a_log_that_cannot_grow_is_brought_back_to_begin_anew(tmp_path):
    full = threading.Event()

    def fault(point):
        if point == "commit" and full.is_set():
            raise sqlite3.OperationalError("database or disk is full")

    store = Store(
        tmp_path / "a.db", runtime_id="r", wall_ms=lambda: 1, published=lambda _: None, fault=fault
    )
    store.open()
    new_session(store)
    full.set()
    with pytest.raises(errors.StoreFull):
        new_session(store, "ses_2")
    without_log = tmp_path / "b.db"
    without_log.write_bytes(store.path.read_bytes())
    with contextlib.closing(sqlite3.connect(without_log)) as connection:
        assert connection.execute("SELECT id FROM session").fetchall() == [("ses_1",)]
    before = log_bytes(store)
    full.clear()
    new_session(store, "ses_2")
    assert log_bytes(store) == before
    store.close()


def test_a_group_that_finds_the_disk_full_brings_the_log_back_once(tmp_path, monkeypatch):
    held, hold, full = threading.Event(), threading.Event(), threading.Event()

    def fault(point):
        if point == "begin" and not full.is_set():
            held.set()
            assert hold.wait(15)
        elif point == "commit" and full.is_set():
            raise sqlite3.OperationalError("database or disk is full")

    hold.set()
    store = Store(
        tmp_path / "a.db", runtime_id="r", wall_ms=lambda: 1, published=lambda _: None, fault=fault
    )
    store.open()
    modes, errors_told, told = [], [], threading.Semaphore(0)

    def done(_result, _events, error):
        errors_told.append(error)
        told.release()

    hold.clear()
    held.clear()
    store._writer.submit(Job(done, work=lambda _: (None, [])))
    assert held.wait(15)
    for _ in range(3):
        store._writer.submit(Job(done, work=lambda _: (None, [])))
    monkeypatch.setattr(store._writer, "_checkpoint", modes.append)
    full.set()
    hold.set()
    for _ in range(4):
        assert told.acquire(timeout=15)
    full.clear()
    monkeypatch.undo()
    store.close()
    assert {type(error) for error in errors_told} == {errors.StoreFull}
    # The first was alone, the other three a group.
    assert modes == ["PASSIVE", "PASSIVE"]


def test_the_crash_of_a_session_that_is_gone_is_refused(stored):
    with pytest.raises(errors.SessionNotFound):
        wait(
            lambda done: stored.record_crash(
                "ses_0", reason="no", culprit=None, quarantine_at=3, done=done
            )
        )
    new_session(stored)
    with pytest.raises(errors.SessionClaimed):
        stored.run(
            lambda tx: claims.record_crash(
                tx,
                session_id="ses_1",
                owner="rtm_2",
                reason="no",
                culprit=None,
                quarantine_at=3,
                now_ms=1,
            )
        )
    assert stored.read.restarts("ses_1") is None


def test_only_the_owner_of_a_session_forgives_its_crashes(stored):
    new_session(stored)
    stored.run(lambda tx: claims.put_restart(tx, claims.RestartRecord("ses_1", consecutive=2)))
    _, epoch = stored.read.claims(["ses_1"])["ses_1"]
    for owner, left in (("rtm_2", 2), ("rtm_1", 0)):
        change = Change("ses_1", owner, epoch, 1, 1_000, (), progress=True)
        with contextlib.suppress(errors.SessionFenced):
            wait(functools.partial(stored.commit, change))
        assert stored.read.restarts("ses_1")[2] == left


def test_a_journal_is_trimmed_piece_by_piece_until_it_fits(stored, monkeypatch):
    monkeypatch.setattr(journal, "TRIM_AT_ONCE", 10)
    for number in range(45):
        new_session(stored, f"ses_{number}")
    stored.trim_journal(Retention(events=5))
    for _ in range(10):  # each piece is a job of its own, behind what waits
        stored.run(lambda _: None)
    assert stored.read.cursors() == (41, 45)
    assert [event.cursor for event in stored.read.events(after=0)] == [41, 42, 43, 44, 45]


def test_what_is_stored_in_a_row_stays_in_the_journal_together(stored):
    for number in range(3):
        new_session(stored, f"ses_{number}", facts=4)
    stored.trim_journal(Retention(events=6))
    stored.run(lambda _: None)
    assert stored.read.cursors() == (5, 12)


def test_a_journal_of_large_changes_is_trimmed_piece_by_piece_and_then_left_alone(
    stored, monkeypatch
):
    monkeypatch.setattr(journal, "TRIM_AT_ONCE", 10)
    for number in range(15):
        new_session(stored, f"ses_{number}", facts=4)
    pieces, trim = [], journal.trim
    monkeypatch.setattr(journal, "trim", lambda *a, **how: pieces.append(1) or trim(*a, **how))
    stored.trim_journal(Retention(events=5))
    for _ in range(20):
        stored.run(lambda _: None)
    assert stored.read.cursors() == (53, 60)
    assert len(pieces) < 10


def test_a_row_has_so_many_bytes_unless_one_event_has_more(stored):
    sizes = [10, 200_000, 100_000, 10, 400_000, 10, 10]
    infos = [
        Session(id="ses_1", title="x" * n, time=SessionTime(created=1, updated=1)) for n in sizes
    ]
    facts = tuple(SessionCreated(session_id="ses_1", info=info) for info in infos)
    wait(functools.partial(stored.create, infos[0], facts))
    with stored.read.connection() as c:
        rows = c.execute("SELECT size, length(data) FROM journal ORDER BY cursor").fetchall()
    assert sum(size for size, _ in rows) == len(sizes)
    assert all(size == 1 or held <= journal.MOST_BYTES for size, held in rows)
    assert [len(event.data.info.title) for event in stored.read.events(after=0)] == sizes
    assert [event.seq for event in stored.read.events(after=2, limit=3)] == [3, 4, 5]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("type = CAST(type AS BLOB)", "+++++"),
        ("type = CAST(x'ff' || type AS TEXT)", "-++++"),
        ("type = replace(type, ' ', '_')", "-----"),
        ("type = type || ' session.idle'", "-----"),
        ("type = ''", "-----"),
        ("type = replace(type, 'session.created', 'no.such')", "-----"),
        ("data = x'00'", "-----"),
        ("data = x'7b7d'", "-----"),
        ("data = 7", "-----"),
        ("data = substr(data, 1, length(data) - 9)", "++++-"),
        ("data = CAST(replace(data, 'zwei', x'ff') AS BLOB)", "+-+++"),
        ("data = CAST(replace(data, 'zwei', x'0d') AS BLOB)", "-----"),
        ("data = CAST(data AS TEXT)", "+++++"),
        ("size = 0", "-"),
        ("size = -7", "-"),
        ("size = 9999999", "-"),
        ("size = 'many'", "-"),
        ("size = 6", "------"),
        ("size = 1", "-"),
    ],
)
def test_a_damaged_row_of_the_journal_hides_no_other_and_tells_no_event_twice(stored, damage, told):
    new_session(stored, "ses_0", facts=3)
    titles = ("eins", "zwei", "drei", "vier", "funf")
    infos = [Session(id="ses_1", title=t, time=SessionTime(created=1, updated=1)) for t in titles]
    facts = tuple(SessionCreated(session_id="ses_1", info=info) for info in infos)
    wait(functools.partial(stored.create, infos[0], facts))
    new_session(stored, "ses_2", facts=2)
    stored.run(lambda tx: tx.connection.execute(f"UPDATE journal SET {damage} WHERE cursor = 8"))
    events = stored.read.events(after=0)
    cursors = [event.cursor for event in events]
    assert cursors == sorted(set(cursors))
    assert cursors[:2] == [1, 2]
    assert cursors[-3:] == [8, 9, 10]
    found = ["-" if e.type == "events.damaged" else "+" for e in events if e.session_id == "ses_1"]
    assert "".join(found)[-5:] == told[-5:]
    oldest, newest = stored.read.cursors()
    assert (oldest, newest) == (1, 10)
    for at in range(10):
        assert stored.read.events(after=at, limit=1)[0].cursor > at
    with stored.read.connection() as c:
        assert cursor_before(c, "ses_2", 1) == 8


@pytest.mark.parametrize("after", range(7))
def test_a_journal_is_read_from_any_event_and_upto_any(stored, after):
    new_session(stored, "ses_1", facts=4)
    new_session(stored, "ses_2", facts=3)

    def read(**how):
        return [(event.cursor, event.seq) for event in stored.read.events(after=after, **how)]

    told = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 1), (6, 2), (7, 3)][after:]
    for upto in range(9):
        assert read(upto=upto) == told[: max(0, upto - after)]
        assert read(limit=upto) == told[:upto]
    assert read(session_id="ses_2") == [each for each in told if each[0] > 4]
    assert read(session_id="ses_1", upto=3) == [each for each in told if each[0] < 4]


def test_a_change_of_many_facts_takes_several_rows_of_a_bounded_size(stored):
    new_session(stored, facts=150)
    events = stored.read.events(after=0)
    assert [(event.cursor, event.seq) for event in events] == [(n, n) for n in range(1, 151)]
    with stored.read.connection() as c:
        rows = c.execute("SELECT cursor, seq, size FROM journal").fetchall()
    assert rows == [(37, 37, 37), (75, 75, 38), (112, 112, 37), (150, 150, 38)]


def test_a_read_that_cannot_begin_is_an_error_of_ours_and_gives_its_connection_back(stored):
    with stored.read.connection() as held:
        held.execute("SELECT 1")
    (database,) = list(stored.read._idle)[-1:]
    database.connection().execute("BEGIN")  # as if somebody had left it open
    with pytest.raises(errors.StoreError):
        stored.read.session("ses_1")
    database.connection().rollback()
    for _ in range(20):  # more than there are connections
        assert stored.read.session("ses_1") is None


def test_a_read_that_is_interrupted_as_it_begins_leaves_its_connection_to_others(stored):
    class Interrupted:
        def __init__(self, connection):
            self._connection = connection

        def execute(self, sql):
            self._connection.execute(sql)
            raise KeyboardInterrupt

    assert stored.read.session("ses_1") is None
    database = stored.read._idle[-1]
    connection = database.connection
    database.connection = lambda: Interrupted(connection())
    with pytest.raises(KeyboardInterrupt):
        stored.read.session("ses_1")
    database.connection = connection
    for _ in range(20):  # more than there are connections
        assert stored.read.session("ses_1") is None


def test_an_interrupt_as_a_connection_is_given_back_costs_the_others_no_place(stored):
    class Interrupted(deque):
        def append(self, database):
            super().append(database)
            raise KeyboardInterrupt

    reads = stored.read
    free = reads._slots.qsize()
    reads._idle = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        reads.session("ses_1")
    assert reads._slots.qsize() == free
    assert not OneAtATime._lock.locked()
    reads._idle = deque(reads._idle)


def test_a_close_does_not_wait_for_ever_for_a_reader(stored):
    with stored.read.connection() as held:
        assert not stored.close(timeout_s=0.01)
        assert held.execute("SELECT count(*) FROM session").fetchone() == (0,)
        with pytest.raises(errors.RuntimeClosed):
            stored.read.session("ses_1")
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        held.execute("SELECT 1")
    assert stored.close(timeout_s=15)


def test_a_kept_error_of_a_read_keeps_no_old_state_for_the_reads_after_it(stored):
    new_session(stored, "ses_1")
    held = []

    def fail():
        with stored.read.connection() as reader:
            held.append(reader.execute("SELECT id FROM session UNION SELECT 'other'"))
            held[0].fetchone()  # more would come
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    new_session(stored, "ses_2")
    for _ in range(20):  # more than there are connections
        assert stored.read.session("ses_2") is not None


def test_a_lease_is_due_until_its_renewal_is_committed(tmp_path):
    kept = lease.Lease(tmp_path / "a.db", "rtm_1", lease_s=20.0)
    kept.extend(120_000)
    due = {now_ms: kept.is_due(now_ms=now_ms) for now_ms in (99_999, 100_000, 104_999, 105_000)}
    assert due == {99_999: True, 100_000: False, 104_999: False, 105_000: True}
    assert kept.is_due(now_ms=106_000)
    kept.extend(126_000)
    assert not kept.is_due(now_ms=106_000)


def test_a_lease_whose_renewal_was_not_committed_lasts_no_longer(tmp_path):
    now_ms, failing = [1_000_000], []

    def fault(point):
        if failing and point == "commit":
            raise sqlite3.OperationalError("disk I/O error")

    store = Store(
        tmp_path / "a.db",
        runtime_id="rtm_1",
        wall_ms=lambda: now_ms[0],
        published=lambda events: None,
        fault=fault,
    )
    store.open()
    with contextlib.closing(store):
        now_ms[0] += 10_000
        failing.append(True)
        store.renew_lease(lambda: pytest.fail("it was not renewed"))
        with pytest.raises(errors.StoreError):
            store.run(lambda tx: None)  # which is written after it
        failing.clear()
        ends_ms = 1_000_000 + store.lease.lease_s * 1_000
        assert store.lease.is_due(now_ms=now_ms[0])
        assert store.lease.lasts(store.lease.term, now_ms=ends_ms - 1)
        assert not store.lease.lasts(store.lease.term, now_ms=ends_ms)
