"""Testing: the runtime without its threads, for tests of your own and for finding what is wrong.

    from understudy.testing import Simulation

    result = Simulation(seed=7).run()
    assert not result.findings

A failing seed is the report: run it again and the same happens, step by step. ``shrink`` leaves out
of its script what the failure does not need.

What tests of an app need is here too: the acts of a ``ScriptedModel``, a ``Gate`` to hold it at, a
``DetachedContext`` to call a tool with, ``crash`` for a session's actor.
"""

from understudy.actors.clock import Clock, SystemClock, VirtualClock
from understudy.actors.handles import Done
from understudy.actors.models.scripted import (
    Call,
    End,
    Fail,
    Gate,
    Say,
    ScriptedModel,
    Stall,
    Think,
    Use,
    Wait,
    echo,
)
from understudy.actors.tools.context import DetachedContext
from understudy.testing.doubles import crash
from understudy.testing.script import Act
from understudy.testing.shrinking import shrink
from understudy.testing.simulation import Result, Simulation

__all__ = [
    "Act",
    "Call",
    "Clock",
    "DetachedContext",
    "Done",
    "End",
    "Fail",
    "Gate",
    "Result",
    "Say",
    "ScriptedModel",
    "Simulation",
    "Stall",
    "SystemClock",
    "Think",
    "Use",
    "VirtualClock",
    "Wait",
    "crash",
    "echo",
    "shrink",
]
