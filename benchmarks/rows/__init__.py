"""What is measured: one module for a group of rows, in the order of the table."""

from benchmarks.rows import (  # noqa: F401 - importing enters their rows
    actors,
    events,
    footprint,
    history,
    prompts,
    sessions,
    turns,
)
