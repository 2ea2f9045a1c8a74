"""A server for clients to be driven against: ``python served.py DATABASE DIRECTORY [PORT]``.

Its model does what the last prompt says: see ``play``.
"""

import sys

from understudy.actors.models.acts import Call, Fail, Say, Think, Wait
from understudy.actors.models.protocol import UserText, UserTurn
from understudy.actors.models.scripted import ScriptedModel, steps_taken
from understudy.errors import ModelError
from understudy.gateway.http.serve import build, run


def asked(request):
    """The last thing a person said."""
    for turn in reversed(request.turns):
        if isinstance(turn, UserTurn):
            return "\n".join(each.text for each in turn.content if isinstance(each, UserText))
    return ""


def play(request):
    """Answer by ``ANSWERS`` if one of its words was said, else with what was said."""
    if request.purpose == "summary":
        return Say("A summary of what was said.")
    text = asked(request)
    for word, answer in ANSWERS.items():
        if word in text:
            return answer(steps_taken(request))
    return Say(f"You said: {text}")


def run_bash(step):
    if step == 0:
        return [Say("I will run a command"), Call("bash", {"command": "echo hi-from-tool"})]
    return Say("The tool printed hi-from-tool")


def ask_bash(step):
    return Say("I was allowed to") if step else Call("bash", {"command": "echo ask-first"})


def sleep_bash(step):
    if step == 0:
        return [Say("I will wait"), Call("bash", {"command": "sleep 60"})]
    return Say("I have waited")


ANSWERS = {
    "run-bash": run_bash,
    "ask-bash": ask_bash,
    "sleep-bash": sleep_bash,
    "long-stream": lambda _: stream(400, 0.05),
    "slow": lambda _: [Say("Let me see. "), Wait(1.0), Say("It is done.")],
    "think": lambda _: [Think("Thinking about it"), Say("A thoughtful answer")],
    "llm-error": lambda _: Fail(ModelError("mock provider exploded")),
}


async def stream(count, pause_s):
    for number in range(count):
        yield Say(f"word{number} ", chunks=1)
        yield Wait(pause_s)


def main(database, directory, port="0"):
    models = [ScriptedModel(play, provider_id="mock", model_id=name) for name in ("fast", "slow")]
    asks = {"bash": {"echo ask-first": "ask"}}
    run(build(database, models=models, directory=directory, permissions=asks), port=int(port))


if __name__ == "__main__":
    main(*sys.argv[1:])
