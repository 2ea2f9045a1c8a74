"""The checkers that read a file along: what they hold a runtime to that has limits of its own."""

import pytest

from understudy import ScriptedModel, tool
from understudy.actors.models.scripted import Call, Say, steps_taken
from understudy.testing.rules import STEPS
from understudy.testing.watch import Watch


@pytest.mark.parametrize("limited", [True, False])
def test_only_a_runtime_with_the_limits_of_the_rules_is_held_to_them(opened, path, limited):
    """A prompt that steers adds its work to the turn it joins: that may be many steps."""

    @tool
    def step() -> str:
        """Step."""
        return "stepped"

    def play(request):
        return Call("step") if steps_taken(request) < STEPS else Say("there")

    runtime = opened(ScriptedModel(play), tools=[step])
    watch = Watch(path, limited=limited)
    runtime.create_session().prompt("go").result(timeout_s=15)
    watch.committed()
    assert [name for name, _ in watch.findings] == (["steps are bounded"] if limited else [])
    watch.close()
