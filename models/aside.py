"""Computing outside the engine's thread without slowing it down."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def aside(work: Callable[[], Result]) -> Result:
    """Does torch's work for a thread that is not the engine's. Raises what the work raises.

    Every thread that has computed with torch keeps OpenMP workers. Once these are more than the cores, GNU's OpenMP
    hardly spins between operations any more (its manual, GOMP_SPINCOUNT), and a network of small ones runs at half its
    speed. So the work is done in a thread that ends with it and takes its workers along.
    """
    with ThreadPoolExecutor(1) as worker:
        return worker.submit(work).result()
