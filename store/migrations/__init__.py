"""Migrations: numbered, applied in order, recorded by name. Each stands alone for ever.

A migration declares its own frozen copy of what it needs, never the current models.
"""
