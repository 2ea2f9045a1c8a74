"""The pure session logic: ``decide(state, command, moment, rules) -> Decision``.

No threads, no clock, no randomness, no I/O. Time and entropy come in with the command; what is to
be written comes out as facts, what is to be done as effects.

    state       what a live session remembers
    commands    what can happen to it
    effects     what it can ask the outside to do
    draft       a decision in the making
    decide      the one entrance: a command to its handler
    prompts     accept, queue, steer, interrupt, settle
    turns       steps and ends of turns
    calls       tool calls
    open_parts  what may still be written to, and how it ends
    asks        permissions and questions
    compaction  markers, summaries, tails
    recovery    what makes a session whole again
    context     what the model sees
"""
