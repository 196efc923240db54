"""Actor: what Ray Data runs for a batch job, an engine in a process of its own.

Several blocks are in an actor at a time, each in a thread that waits: the engine has all their rows, so its steps are
as full at a block's end as in its middle.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from app.settings import FetchSettings, ModelSettings
from cluster.drawing import Drawer
from cluster.inputs import Pictures
from cluster.place import Place
from cluster.table import Row

# Of pictures and of seconds that may wait: there is no more than the blocks have, and nobody else to send it to.
_UNBOUNDED = {"max_waiting": 2**31, "max_wait_s": math.inf}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every actor of a job is told: the model, where pictures come from, and where they go."""

    model: ModelSettings
    folder: Path
    fetch: FetchSettings
    output: str
    endpoint: str | None = None
    region: str | None = None

    def place(self) -> Place:
        """Where pictures go. Raises InvalidRequest."""
        return Place(self.output, self.endpoint, self.region)


class Actor:
    """Called with a table of rows, it tells how many there were, how many pictures came of them and how many errors."""

    def __init__(self, work: Work):
        from app.replica import start_engine  # brings Ray, which reads its environment when it is imported

        engine, _ = start_engine(work.model.model_copy(update=_UNBOUNDED))
        self._drawer = Drawer(engine, Pictures(work.folder, work.fetch), work.place())

    def __call__(self, block: pa.Table) -> pa.Table:
        rows = [Row.of(columns) for columns in block.to_pylist()]
        records = self._drawer.draw(rows)
        errors = sum(record["error"] is not None for record in records)
        return pa.table({"rows": [len(rows)], "pictures": [len(records) - errors], "errors": [errors]})
