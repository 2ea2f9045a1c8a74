"""The public modules of events and models. What type checkers make of them: tests/typing."""

import importlib
from typing import get_args, get_type_hints

import pytest

from understudy import events, models
from understudy.actors.models.acts import Say
from understudy.actors.subscription import ALWAYS_TOLD
from understudy.store.events import FACTS, Event


def test_what_an_event_carries_is_one_of_what_there_is():
    told = set(get_args(get_type_hints(Event)["data"]))
    assert {each.type for each in told} == {*FACTS, *ALWAYS_TOLD}


def test_every_event_has_its_payload_in_the_public_module():
    public = {
        each.type for name in events.__all__ if hasattr(each := getattr(events, name), "type")
    }
    public = {name for name in public if isinstance(name, str)}
    assert public == {*FACTS, *ALWAYS_TOLD}


@pytest.mark.parametrize("module", ["understudy.events", "understudy.models"])
def test_a_public_module_has_what_it_says(module):
    loaded = importlib.import_module(module)
    assert [name for name in loaded.__all__ if getattr(loaded, name, None) is None] == []
    assert loaded.__all__ == sorted(loaded.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = loaded.Nothing


def test_the_scripted_model_is_one_whichever_door_it_comes_through():
    assert models.model_from("scripted").provider_id == "scripted"
    assert isinstance(models.ScriptedModel([Say("Hello")]), models.Model)
