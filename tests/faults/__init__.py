"""The fault harness: the real application under random kills and outages, and a checker that reads what happened.

`python -m tests.faults --help`; docs/tests.md tells the whole.
"""
