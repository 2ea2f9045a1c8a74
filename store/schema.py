"""The tables, as peewee models.

The models are not bound to a database: two stores may be open in one process, so every query is
executed on one given explicitly. ``data`` columns hold a record as JSON in its wire shape, the
journal's a line for each event; the other columns are what queries need. ``open`` marks what is
unfinished, and each partial index on it keeps recovery flat, however long the history grows.

Keys begin with what grows with time where they can: a commit of many sessions' rows then adds to
the end of an index, instead of changing one page of it for every session.
"""

from __future__ import annotations

from typing import Final

from peewee import (
    SQL,
    BigIntegerField,
    BlobField,
    BooleanField,
    CompositeKey,
    IntegerField,
    Model,
    TextField,
)

QUEUED: Final = 1 << 62  # the turn of a message that has none yet: it sorts last


class Session(Model):
    id = TextField(primary_key=True)
    parent_id = TextField(null=True)
    title = TextField()
    directory = TextField()
    created_ms = BigIntegerField()
    updated_ms = BigIntegerField()
    archived_ms = BigIntegerField(null=True)
    internal = BooleanField()
    data = BlobField()

    class Meta:
        table_name = "session"


class Claim(Model):
    """Who may write a session: the fence. ``seq`` is the number of its last event."""

    session_id = TextField(primary_key=True)
    owner = TextField(null=True)
    epoch = BigIntegerField()
    seq = BigIntegerField()

    class Meta:
        table_name = "claim"


class RuntimeLease(Model):
    """A runtime that has the store open, and until when it is believed without asking."""

    id = TextField(primary_key=True)
    host = TextField()
    pid = IntegerField()
    started_ms = BigIntegerField()
    until_ms = BigIntegerField()

    class Meta:
        table_name = "runtime"


class Message(Model):
    session_id = TextField()
    id = TextField()
    turn = BigIntegerField()
    seq = BigIntegerField()
    role = TextField()
    open = BooleanField()
    data = BlobField()

    class Meta:
        table_name = "message"
        primary_key = CompositeKey("id", "session_id")


class Part(Model):
    session_id = TextField()
    id = TextField()
    message_id = TextField()
    seq = BigIntegerField()
    kind = TextField()
    open = BooleanField()
    data = BlobField()

    class Meta:
        table_name = "part"
        primary_key = CompositeKey("id", "session_id")


class Inbox(Model):
    """Accepted prompts. Open until their one outcome is written."""

    session_id = TextField()
    message_id = TextField()
    seq = BigIntegerField()
    open = BooleanField()
    data = BlobField()

    class Meta:
        table_name = "inbox"
        primary_key = CompositeKey("message_id", "session_id")


class Ask(Model):
    session_id = TextField()
    id = TextField()
    seq = BigIntegerField()
    open = BooleanField()
    data = BlobField()

    class Meta:
        table_name = "ask"
        primary_key = CompositeKey("session_id", "id")


class Journal(Model):
    """Every event, in the order it was committed, those of a change in a row: see ``journal``."""

    cursor = BigIntegerField(primary_key=True)
    session_id = TextField()
    seq = BigIntegerField()
    time_ms = BigIntegerField()
    type = TextField()
    data = BlobField()
    size = IntegerField()

    class Meta:
        table_name = "journal"


class Restart(Model):
    """What the supervisor remembers of a session, written before it acts on it.

    ``consecutive`` counts crashes without progress in between; ``culprit`` is the prompt that
    was being started at the last crash and ``culprit_count`` how often in a row.
    """

    session_id = TextField(primary_key=True)
    total = IntegerField()
    consecutive = IntegerField()
    last_ms = BigIntegerField()
    reason = TextField()
    culprit = TextField(null=True)
    culprit_count = IntegerField()
    quarantined_ms = BigIntegerField(null=True)

    class Meta:
        table_name = "restart"


class Tombstone(Model):
    """A deleted session: nothing below its epoch may ever write again."""

    session_id = TextField(primary_key=True)
    epoch = BigIntegerField()
    seq = BigIntegerField()
    deleted_ms = BigIntegerField()

    class Meta:
        table_name = "tombstone"


class TrackerClaim(Model):
    key = TextField(primary_key=True)
    expires_at_ms = BigIntegerField()
    data = BlobField()

    class Meta:
        table_name = "tracker_claim"


class TrackerBypass(Model):
    key = TextField(primary_key=True)
    expires_at_ms = BigIntegerField()
    data = BlobField()

    class Meta:
        table_name = "tracker_bypass"


MODELS: Final = (
    Session,
    Claim,
    RuntimeLease,
    Message,
    Part,
    Inbox,
    Ask,
    Journal,
    Restart,
    Tombstone,
    TrackerClaim,
    TrackerBypass,
)

_OPEN = SQL("open = 1")

_LISTED = SQL("archived_ms IS NULL AND internal = 0")
_DESCENDING = (Session.updated_ms.desc(), Session.id)
Session.add_index(*_DESCENDING, name="session_listed", where=_LISTED)
Session.add_index(*_DESCENDING, name="session_updated")
Session.add_index(Session.created_ms.desc(), Session.id, name="session_created")
Session.add_index(Session.directory, *_DESCENDING, name="session_directory")
Session.add_index(Session.parent_id, name="session_parent", where=SQL("parent_id IS NOT NULL"))
Claim.add_index(Claim.owner, name="claim_owner", where=SQL("owner IS NOT NULL"))
Message.add_index(Message.session_id, Message.turn, Message.seq, name="message_order")
Message.add_index(Message.session_id, name="message_open", where=_OPEN)
Part.add_index(Part.session_id, Part.message_id, Part.seq, name="part_message")
Part.add_index(Part.session_id, name="part_open", where=_OPEN)
Part.add_index(Part.session_id, Part.seq, name="part_compaction", where=SQL("kind = 'compaction'"))
Inbox.add_index(Inbox.session_id, Inbox.open, Inbox.seq, name="inbox_session")
Inbox.add_index(Inbox.message_id, Inbox.session_id, name="inbox_open", where=_OPEN)
Ask.add_index(Ask.session_id, Ask.seq, name="ask_open", where=_OPEN)
Ask.add_index(Ask.id, name="ask_id")
Journal.add_index(Journal.session_id, Journal.cursor, name="journal_session")
Restart.add_index(
    Restart.session_id, name="restart_quarantined", where=SQL("quarantined_ms IS NOT NULL")
)
