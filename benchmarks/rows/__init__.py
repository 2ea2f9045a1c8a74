"""What is measured: one module for a group of rows, in the order of the table."""

# ruff: noqa: F401, I001 - importing enters the rows, in this order

from benchmarks.rows import actors
from benchmarks.rows import prompts
from benchmarks.rows import turns
from benchmarks.rows import sessions
from benchmarks.rows import history
from benchmarks.rows import events
from benchmarks.rows import footprint
from benchmarks.rows import gateway
