"""Chaos: failures on purpose.

``sim`` simulates the runtime by seed, ``kill`` works real processes hard and kills, freezes and
starves them, ``soak`` looks for what grows.
"""
