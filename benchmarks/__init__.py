"""Benchmarks: ``python -m benchmarks [name …]`` from a checkout; see docs/performance.md.

__main__  the command: every row in a process of its own, one table at the end
measure   rows, figures, targets and interleaved rounds
peers     what we are measured against, where it is installed
stage     runtimes, models and stores for the rows to measure
report    the table, the JSON and the chart
rows/     what is measured: one module for a group of rows
"""
