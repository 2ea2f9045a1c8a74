"""Everything that has a mailbox, and the pure session logic it runs.

runtime          what an app opens: the public entry point
session, handles what its calls give: sessions, turns, replies, records
given            what callers give, checked at the door
engine           what lies under a runtime, wired together

core/            the pure session logic: decide(state, command) -> decision
session_actor    the shell around it: claim, recover, decide, commit, publish, reply
pool             actors without threads of their own: mailboxes and dispatcher
registry         which sessions are live, and how a command finds its actor
supervisor       what happens when an actor dies
orphans          sessions whose runtime died, made whole many at a time
upkeep           what has to be done every now and then, the watchdog among it

executor         runs effects: model streams, tools, timers
steps, streams   one model call, its retries and its live text
pace             what thousands would do in one moment, a few at a time
calls, workers   one tool call, and the threads of synchronous tools
models/, tools/  one protocol each, and a folder of implementations

publisher, subscription, outcomes   who hears of committed events
tracker, leases, hooks              outside claims, bypasses, and the gate of hooks
recovery_report, pending, clock     what recovery did; answers to come; time
"""
