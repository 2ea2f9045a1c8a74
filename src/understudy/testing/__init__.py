"""Testing: the runtime without its threads, for tests of your own and for finding what is wrong.

from understudy.testing import Simulation

result = Simulation(seed=7).run()
assert not result.findings
"""

from understudy.testing.doubles import (
    Call,
    Clock,
    DetachedContext,
    Done,
    End,
    Fail,
    Gate,
    Say,
    ScriptedModel,
    Stall,
    SystemClock,
    Think,
    Use,
    VirtualClock,
    Wait,
    crash,
    echo,
)
from understudy.testing.script import Act
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
]
