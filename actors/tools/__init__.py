"""Tools: typed Python functions a model may call.

``tool`` makes one from a function; ``workspace`` is the opt-in set of real ones.
"""
