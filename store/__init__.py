"""Everything durable: schema, writer, journal, claims, queries, migrations.

records     sessions, messages, parts, prompts, asks: frozen structs in wire shape
events      facts: what changes are made of and the journal keeps
ids         identifiers from a time, a counter and entropy
schema      the tables, as peewee models
migrations  how a file gets from one version to the next
database    opening a file, and what may be wrong with it
changes     facts to rows: fencing and projection
writer      the one writer thread: group commit, checkpoints
claims      who may write a session: create, acquire, delete, crash counts
lease       whether a runtime that holds claims is alive
reads       every query
journal     retention
damage      rows that cannot be read
store       the door to all of it
"""
