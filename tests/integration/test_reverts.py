"""Reverts: what they hide stays hidden until it is gone, whatever is edited meanwhile."""

from understudy import Runtime
from understudy.testing import echo


def said(session):
    return [part.text for each in session.messages() if each.role == "user" for part in each.parts]


def test_what_a_revert_hides_goes_although_its_first_message_was_edited_out(tmp_path):
    with Runtime(tmp_path / "agent.db", model=echo()) as runtime:
        session = runtime.create_session()
        for words in ("one", "two", "three"):
            session.prompt(words).result()
        second = session.messages()[2]
        session.revert(second.id)
        session.edit(second.id)
        session.prompt("four").result()
        assert said(session) == ["one", "four"]


def test_a_revert_ends_when_all_that_it_hides_is_edited_out(tmp_path):
    with Runtime(tmp_path / "agent.db", model=echo()) as runtime:
        session = runtime.create_session()
        session.prompt("one").result()
        session.revert(session.messages()[1].id)
        session.edit(session.messages()[1].id)
        assert session.refresh().record.revert is None
        assert said(session) == ["one"]
