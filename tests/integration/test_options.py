"""What an app sets a runtime up with: refused at once, by name, before a file is touched."""

import pathlib
import re
import threading

import pytest

from understudy import CompactionRules, Limits, RestartPolicy, Retention, Runtime, errors
from understudy.testing import ScriptedModel, echo


async def a_coroutine(*_):
    """What nobody would await."""


BAD_OPTIONS = {
    "a model that is none": {"model": object()},
    "a model's class": {"model": ScriptedModel},
    "a word for a limit of tokens": {"model": ScriptedModel("Yes.", context_limit="9000")},
    "a model without room": {"models": [ScriptedModel("Yes.", context_limit=0)]},
    "names for further models": {"models": ["scripted"]},
    "a word for models": {"models": "scripted"},
    "one model for models": {"models": echo()},
    "no tools": {"tools": None},
    "a function for tools": {"tools": print},
    "limits in a dict": {"limits": {"steps": 3}},
    "a limit below zero": {"limits": Limits(steps=-1)},
    "a word for a limit": {"limits": Limits(steps="many")},
    "half a step": {"limits": Limits(steps=1.5)},
    "NaN seconds": {"limits": Limits(tool_s=float("nan"))},
    "a switch for compaction": {"compaction": False},
    "a tail below zero": {"compaction": CompactionRules(tail=-1)},
    "a word for restart": {"restart": "permanent"},
    "an unknown restart": {"restart": RestartPolicy(restart="always")},
    "an intensity below zero": {"restart": RestartPolicy(intensity=-1)},
    "half an intensity": {"restart": RestartPolicy(intensity=0.5)},
    "a period of nothing": {"restart": RestartPolicy(period_s=0)},
    "a period that is no number": {"restart": RestartPolicy(period_s=float("nan"))},
    "a quarantine before the first crash": {"restart": RestartPolicy(quarantine_after=0)},
    "a backoff below zero": {"restart": RestartPolicy(backoff_s=-0.1)},
    "a backoff above its maximum": {"restart": RestartPolicy(backoff_s=9.0, max_backoff_s=3.0)},
    "a backoff without end": {"restart": RestartPolicy(max_backoff_s=float("inf"))},
    "an age below zero": {"retention": Retention(age_s=-1)},
    "an unknown on_restart": {"on_restart": "retry"},
    "hooks in a list": {"hooks": [print]},
    "an unknown hook": {"hooks": {"after_prompt": print}},
    "a number for a hook": {"hooks": {"after_turn": 3}},
    "a hook time below zero": {"hook_s": -1},
    "a number for a recovery hook": {"recovery_hook": 3},
    "a coroutine for a recovery hook": {"recovery_hook": a_coroutine},
    "an unknown durability": {"durability": "fast"},
    "no threads": {"threads": 0},
    "a lease of nothing": {"lease_s": 0},
    "a word for a time": {"command_timeout_s": "60"},
    "no time": {"handler_limit_s": None},
    "a time below zero": {"passivate_after_s": -1},
    "a number for an agent": {"agent": 3},
    "a number for a directory": {"directory": 3},
    "a number for a system prompt": {"system": 3},
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_an_unusable_option_is_refused_by_its_name(tmp_path, case):
    [option] = BAD_OPTIONS[case]
    with pytest.raises(errors.InvalidInput, match=re.escape(option.rstrip("s"))) as refused:
        Runtime(tmp_path / "agent.db", **BAD_OPTIONS[case])
    assert refused.value.field == option
    assert not list(tmp_path.iterdir())


def test_options_at_their_ends_are_taken(tmp_path):
    options = {
        "limits": Limits(turn_s=None, tool_s=float("inf"), retry_s=1),
        "compaction": CompactionRules(reserve=0, tail=0),
        "restart": RestartPolicy(
            restart="permanent",
            intensity=10**30,
            period_s=float("inf"),
            quarantine_after=10**30,
            backoff_s=0,
            max_backoff_s=0,
        ),
        "retention": Retention(age_s=0, events=0),
        "passivate_after_s": float("inf"),
        "hooks": {},
        "threads": 1,
    }
    with Runtime(tmp_path / "agent.db", **options) as runtime:
        assert runtime.create_session().prompt("Hello").result().text == "Hello"


@pytest.mark.parametrize("bad", [{"drain_s": "1"}, {"timeout_s": -1}])
def test_a_close_that_is_refused_closes_nothing(tmp_path, bad):
    with Runtime(tmp_path / "agent.db") as runtime:
        with pytest.raises(errors.InvalidInput):
            runtime.close(**bad)
        assert runtime.create_session().prompt("Hello").result().text == "Hello"


def test_a_time_may_be_longer_than_any_clock_counts(tmp_path):
    with Runtime(tmp_path / "agent.db") as runtime:
        session = runtime.create_session()
        for timeout_s in (threading.TIMEOUT_MAX, 1e300, 10**400, float("inf")):
            turn = session.prompt("Hello", timeout_s=timeout_s)
            assert turn.result(timeout_s=timeout_s).text == "Hello"


def test_a_directory_may_be_a_path(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    with Runtime(tmp_path / "agent.db", directory=here) as runtime:
        session = runtime.create_session()
        other = runtime.create_session(directory=there)
        assert session.record.directory == str(here)
        assert runtime.sessions(directory=there) == [other]
        assert session.update(directory=pathlib.Path("/")).record.directory == "/"


def test_handles_say_what_they_are(tmp_path):
    with Runtime(tmp_path / "agent.db") as runtime:
        session = runtime.create_session()
        assert repr(session.abort()) == "<Done: False>"
        reply = session.prompt("Hello").result()
        assert repr(reply) == "<Reply: 'Hello'>"
        assert repr(runtime) == f"<Runtime {tmp_path / 'agent.db'}>"
        compaction = session.compact()
        assert repr(compaction) == f"<Compaction {compaction.marker_id} of {session.id}>"


def test_a_runtime_starts_once_and_has_no_tracker_before(tmp_path):
    runtime = Runtime(tmp_path / "agent.db")
    with pytest.raises(errors.RuntimeClosed):
        _ = runtime.engine.tracker
    with runtime, pytest.raises(errors.RuntimeClosed, match="starts once"):
        runtime.start()
    with pytest.raises(errors.RuntimeClosed):
        runtime.start()


REFUSED_CALLS = {
    "types": lambda runtime, session: runtime.events(types=["actor.crashed", "no.such"]),
    "buffer": lambda runtime, session: runtime.events(buffer=0),
    "answers": lambda runtime, session: runtime.reply("ask_1", answers=[3]),
    "part_id": lambda runtime, session: session.edit("msg_1", text="new"),
    "part": lambda runtime, session: session.edit(
        session.messages()[1].info.id, part_id=session.messages()[1].parts[0].id, text="new"
    ),
}


@pytest.mark.parametrize("field", REFUSED_CALLS)
def test_an_unusable_argument_is_refused_by_its_name(tmp_path, field):
    with Runtime(tmp_path / "agent.db") as runtime:
        session = runtime.create_session()
        session.prompt("Hello").result()
        before = runtime.cursor
        with pytest.raises(errors.InvalidInput):
            REFUSED_CALLS[field](runtime, session)
        assert runtime.cursor == before


def test_upkeep_goes_on_when_a_duty_fails(tmp_path, monkeypatch):
    done = []
    with Runtime(tmp_path / "agent.db") as runtime:
        upkeep = runtime.engine.upkeep
        upkeep.stop()
        upkeep._due.clear()
        monkeypatch.setattr(type(upkeep), "_renew", lambda self: 1 / 0)
        monkeypatch.setattr(type(upkeep), "_sweep", lambda self: done.append("swept"))
        upkeep.tick()
    assert done == ["swept"]


def test_a_model_that_does_not_close_holds_up_no_runtime(tmp_path):
    class Sticky(ScriptedModel):
        async def aclose(self):
            raise OSError("the connection is gone")

    runtime = Runtime(tmp_path / "agent.db", model=Sticky("Yes.")).start()
    assert runtime.create_session().prompt("Hello").result().text == "Yes."
    assert runtime.close()


def test_a_prompt_for_a_model_that_is_gone_fails_and_says_which(tmp_path):
    other = ScriptedModel("From the other.", model_id="other")
    with Runtime(tmp_path / "agent.db", models=[other]) as runtime:
        session = runtime.create_session(model="other")
        assert session.prompt("Hello").result().text == "From the other."
    with Runtime(tmp_path / "agent.db") as runtime:
        with pytest.raises(errors.TurnFailed, match="other"):
            runtime.session(session.id).prompt("Hello").result()
        assert runtime.create_session().prompt("Hello").result().text == "Hello"
