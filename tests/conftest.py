"""What all tests share: the machine, with each other."""

import os

import pytest

# Several processes run tests at a time: threads that wait for each other at every barrier would wait for turns too.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cuda", "cpu"), default="cuda", help="Where tests/gpu runs.")
