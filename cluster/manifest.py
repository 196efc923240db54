"""The manifest of a batch job: which row has come to what. It makes the job one that can be killed and taken up again.

`job.json` says what the job is, and is written first. Whenever some rows are done, a part of the manifest is written,
at once or not at all, after their pictures: what stands in a part is not drawn again. In the end the parts become
`manifest.parquet`. Ray Data's own checkpoints know rows that left through a sink of its own: neither how a row failed
nor which pictures it brought, which would need a second record beside them.
"""

import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.place import Place
from models.errors import InvalidRequest

Record = Mapping[str, Any]

JOB, WHOLE, PARTS = "job.json", "manifest.parquet", "parts"
AT_ONCE = 32  # parts that are read or removed: a million rows have tens of thousands, each a request to a bucket

# A line for each picture, and for each row that came to none: with an error, and index 0.
SCHEMA = pa.schema(
    [
        pa.field("number", pa.int64()),  # of the row in the input, from 0
        pa.field("id", pa.string()),
        pa.field("index", pa.int32()),
        pa.field("path", pa.string()),  # below the output
        pa.field("seed", pa.int64()),
        pa.field("sha256", pa.string()),  # of the file
        pa.field("format", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("model", pa.string()),
        pa.field("revision", pa.string()),
        pa.field("parameters", pa.string()),  # JSON
        pa.field("timings", pa.string()),  # JSON, seconds by stage
        pa.field("warnings", pa.string()),  # JSON
        pa.field("error", pa.string()),  # JSON
    ]
)


class Manifest:
    """What is known of a job in its place."""

    def __init__(self, place: Place):
        self._place = place

    def begin(self, job: Mapping[str, Any]) -> None:
        """Claims the place for a job. Raises InvalidRequest where it holds another one's."""
        written = self._place.get(JOB)
        if written is not None and (differences := _differences(_said(orjson.loads(written)), _said(job))):
            other = ", ".join(differences)
            raise InvalidRequest(
                "output",
                f"{self._place.output} holds another job, which differs in: {other}. Go on with that one's input and "
                "options, or choose another output",
            )
        if written is None and (self._place.has(WHOLE) or self._place.names(PARTS)):
            raise InvalidRequest("output", f"{self._place.output} holds a manifest without {JOB}; choose another one")
        self._place.put(JOB, orjson.dumps(job, option=orjson.OPT_INDENT_2), "application/json")

    @property
    def whole(self) -> bool:
        """Whether the job is done."""
        return self._place.has(WHOLE)

    def part(self, first: int) -> set[int]:
        """The rows of the part that begins with that row; none where there is no such part."""
        return {record["number"] for record in self._records(_part(first))}

    def add(self, first: int, records: Iterable[Record]) -> None:
        """Writes a part: all records of some rows, of which that is the first. Their pictures are there by now."""
        self._place.put(_part(first), b"".join(orjson.dumps(r) + b"\n" for r in records), "application/jsonl")

    def recorded(self) -> set[int]:
        """The rows that are done, by number."""
        return {record["number"] for part in self._parts() for record in part}

    def finish(self, numbers: Collection[int] = ()) -> set[int]:
        """Makes the whole of the parts, in the order of the input, and removes them; unless some of the rows with these
        numbers stand in none, which it gives."""
        if not self.whole:
            table = pa.concat_tables([SCHEMA.empty_table(), *self._tables()])
            if missing := set(numbers).difference(table["number"].to_pylist()):
                return set() if self.whole else missing  # another run may have made it meanwhile
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, WHOLE)
                pq.write_table(table.sort_by([("number", "ascending"), ("index", "ascending")]), file)
                self._place.put_file(WHOLE, file)
        with ThreadPoolExecutor(AT_ONCE) as removers:
            list(removers.map(self._place.delete, self._place.names(PARTS)))
        return set()

    def counts(self) -> tuple[int, int]:
        """How many pictures the finished job has, and how many errors."""
        whole = self._place.get(WHOLE)
        assert whole is not None
        # In this thread alone: `pq.read_table` leaves it to threads of Arrow's own to let go of these bytes, for which
        # they need Python's lock, and a process that ends meanwhile is aborted.
        with pq.ParquetFile(pa.BufferReader(whole), pre_buffer=False) as file:
            errors = file.read(["error"], use_threads=False)["error"]
        return errors.null_count, len(errors) - errors.null_count

    def _tables(self) -> Iterator[pa.Table]:
        """The parts, each row in the first that has it: a driver that was thought dead may have written it, too."""
        told: set[int] = set()
        for part in self._parts():
            yield pa.Table.from_pylist([r for r in part if r["number"] not in told], SCHEMA)
            told |= {record["number"] for record in part}

    def _parts(self) -> Iterator[Sequence[Record]]:
        with ThreadPoolExecutor(AT_ONCE) as readers:
            yield from readers.map(self._records, self._place.names(PARTS))

    def _records(self, part: str) -> Sequence[Record]:
        return [orjson.loads(line) for line in (self._place.get(part) or b"").splitlines()]


def _part(first: int) -> str:
    """A row is the first of one part only: what stands in a part is in no later one."""
    return f"{PARTS}/{first:09d}.jsonl"


def _said(value: Any) -> Any:
    """What a document says, without what is null, false or empty: a version without such a field did not write it."""
    if not isinstance(value, Mapping):
        return value
    said = {name: _said(each) for name, each in value.items()}
    return {name: each for name, each in said.items() if each not in (None, False, {})}


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
