"""The demo: hundreds of sessions, crashed and killed on the way, and an audit of what is left.

``conductor`` is the parent process: it prompts, kills, keeps the ledger and judges. ``worker`` is
the child that embeds a runtime and knows nothing of the kills to come.
"""
