"""Load: how busy an engine is."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Load:
    """`seconds_left` estimates when all that the engine holds now will be done. `batches` are the rows alive as
    multiples of a full forward: below 1 there is room in the next one."""

    waiting: int
    running: int
    rows: int
    batches: float
    forwards: int
    work_left: float
    seconds_per_work: float
    seconds_left: float
