"""Models: one small protocol, and a folder of implementations.

``protocol`` is the seam; ``scripted`` is built in; ``openai`` and ``anthropic`` need their extras.
"""
