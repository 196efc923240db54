"""The input of a batch job: a file of rows, each a request in the fields of `POST /v1/generate`, and an `id`.

JSONL has an object in each line. In CSV and Parquet, columns are fields; what is left empty is left out. Text stands as
it is, any other field of CSV as in JSON; in Parquet, fields with parts are structs or JSON.
"""

import csv
import hashlib
import math
import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from app.dialects.native import GenerateBody, forms
from app.dialects.native.bodies import Delivered
from app.errors import envelope
from models.errors import HeliographError, InvalidRequest

Columns = dict[str, Any]

_NOT_HERE = {*Delivered.model_fields, "stream", "preview_every", "priority"}  # there is no answer, and no other traffic
FIELDS = ("id", *(name for name in GenerateBody.model_fields if name not in _NOT_HERE))
BATCH_ROWS = 1024  # of Parquet that are decoded at a time

# What `_default_id` gives is nobody's own.
_ID = re.compile(r"(?!\d{8}-[0-9a-f]{8}$)[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_FOOTER_BYTES = 8  # at the end of a Parquet file: the length of the footer before them, and the magic word
_PLAIN = (
    *(pa.types.is_null, pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating),
    *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Row `number` of the input, from 0, and the request in it; or the `error` that stands in its place."""

    number: int
    id: str
    body: Mapping[str, Any]
    error: Mapping[str, Any] | None = None

    def columns(self) -> Columns:
        """The row as a table of Ray Data holds it."""
        texts = {"body": orjson.dumps(self.body).decode(), "error": orjson.dumps(self.error).decode()}
        return {"number": self.number, "id": self.id} | texts

    @classmethod
    def of(cls, columns: Columns) -> "Row":
        """What `columns` has made."""
        parsed = {name: orjson.loads(columns[name]) for name in ("body", "error")}
        return cls(number=columns["number"], id=columns["id"], **parsed)

    def digest(self) -> bytes:
        """The SHA-256 of the id and the request: what is left to chance is made of it, the same each time."""
        return hashlib.sha256(f"{self.id}\n".encode() + _sorted(self.body)).digest()


def check(path: Path) -> None:
    """Raises InvalidRequest for a file that is not there, or of a kind that is not read."""
    if path.suffix not in _READERS:
        raise InvalidRequest("input", f"must end in one of {', '.join(_READERS)}, not {path.suffix!r}")
    if not path.is_file():
        raise InvalidRequest("input", f"there is no file {path}")


def rows(path: Path) -> Iterator[Row]:
    """The rows of a file. Those that are none have an error, and so have all but the first of one id.

    Raises InvalidRequest for a file that cannot be read as a whole: another kind, columns that nobody knows.
    """
    seen: dict[str, int] = {}
    check(path)
    for number, found in enumerate(_READERS[path.suffix](path)):
        row = _row(number, found)
        if row.id in seen:
            row = _faulty(number, row.body, InvalidRequest("id", f"is that of row {seen[row.id]}, too"))
        seen[row.id] = number
        yield row


def _row(number: int, found: Columns | HeliographError) -> Row:
    if isinstance(found, HeliographError):
        return _faulty(number, {}, found)
    try:
        _sorted(found)
    except orjson.JSONEncodeError:  # which nests less deeply than what is read may
        return _faulty(number, {}, InvalidRequest("input", "the row has values within values too deep to be a request"))
    body = {name: value for name, value in found.items() if name != "id" and value is not None}
    id = found.get("id")
    if id is None:
        return Row(number=number, id=_default_id(number, body), body=body)
    if not _ID.fullmatch(str(id)):
        return _faulty(number, body, InvalidRequest("id", "must be 1 to 100 of A-Z, a-z, 0-9, '.', '_' and '-'"))
    return Row(number=number, id=str(id), body=body)


def _faulty(number: int, body: Mapping[str, Any], error: HeliographError) -> Row:
    return Row(number=number, id=_default_id(number, body), body=body, error=envelope(error)["error"])


def _default_id(number: int, body: Mapping[str, Any]) -> str:
    return f"{number:08d}-{hashlib.sha256(_sorted(body)).hexdigest()[:8]}"


def _sorted(body: Mapping[str, Any]) -> bytes:
    return orjson.dumps(body, option=orjson.OPT_SORT_KEYS)


def _jsonl(path: Path) -> Iterator[Columns | HeliographError]:
    with path.open("rb") as lines:
        for line in lines:
            if line.strip():
                yield _parsed_line(line)


def _parsed_line(line: bytes) -> Columns | HeliographError:
    try:
        values = orjson.loads(line)
    except orjson.JSONDecodeError as malformed:
        return InvalidRequest("input", f"the line is not valid JSON: {malformed}")
    if not isinstance(values, dict):
        return InvalidRequest("input", "the line must be a JSON object")
    unknown = sorted(values.keys() - set(FIELDS))
    return _unknown(unknown[0]) if unknown else values


def _csv(path: Path) -> Iterator[Columns | HeliographError]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            reader = csv.DictReader(file, strict=True)
            _check_columns(reader.fieldnames or ())
            for texts in reader:
                yield _parsed_texts(texts)
        except (csv.Error, UnicodeDecodeError) as malformed:
            raise InvalidRequest("input", f"{path} is not CSV in UTF-8: {malformed}") from malformed


def _parsed_texts(texts: dict[Any, Any]) -> Columns | HeliographError:
    if None in texts:  # where DictReader puts what has no column
        return InvalidRequest("input", "the row has more values than there are columns")
    try:
        return forms.from_form({name: text for name, text in texts.items() if text}, {}, GenerateBody)
    except InvalidRequest as wrong:
        return wrong


def _parquet(path: Path) -> Iterator[Columns | HeliographError]:
    _refuse_extensions(path)
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names)
            for field in file.schema_arrow:
                _check_type(field.name, field.type)
            for batch in file.iter_batches(BATCH_ROWS):
                for values in batch.to_pylist():
                    yield _parsed_values(values)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as malformed:
        raise InvalidRequest("input", f"{path} is not Parquet: {malformed}") from malformed


def _parsed_values(values: Columns) -> Columns | HeliographError:
    told = {name: _told(value) for name, value in values.items()}
    given = {name: value for name, value in told.items() if value is not None}
    texts = {name: value for name, value in given.items() if isinstance(value, str)}
    try:
        return given | forms.from_form(texts, {}, GenerateBody)
    except InvalidRequest as wrong:
        return wrong


def _told(value: Any) -> Any:
    """A value as JSON has it. pandas has NaN in the gaps of a column, and fractions for the whole numbers beside."""
    if isinstance(value, dict):
        return {name: _told(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_told(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)  # a text is refused where a number belongs
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refuse_extensions(path: Path) -> None:
    """Raises InvalidRequest for a file with extension types, before it is opened.

    Libraries register classes for such types, and opening a file would have them read what its author wrote; in Ray
    that was unpickling (GHSA-mw35-8rx3-xf9r). The types stand in the footer, in base64: in one of three ways, by where
    the word begins.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _FOOTER_BYTES))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(0, size - _FOOTER_BYTES - length))
        footer = file.read()
    word = b"ARROW:extension:name"
    if word in footer or any(_encoded(word, before) in footer for before in range(3)):
        raise InvalidRequest("input", f"{path} has extension types, which are not read; give plain columns")


def _encoded(word: bytes, before: int) -> bytes:
    """How a word stands in base64 after so many bytes, less the characters that its neighbours have a part in."""
    text = b64encode(b"\0" * before + word)
    return text[(0, 2, 3)[before] : len(text) - (0, 3, 2)[(before + len(word)) % 3]]


def _check_columns(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name not in FIELDS:
            raise _unknown(name)
        if name in seen:
            raise InvalidRequest(name, "is the name of two columns")
        seen.add(name)


def _unknown(name: str) -> InvalidRequest:
    return InvalidRequest(name, f"unknown field; the fields are: {', '.join(FIELDS)}")


def _check_type(name: str, kind: pa.DataType) -> None:
    """Raises InvalidRequest for a column of what JSON does not have."""
    if pa.types.is_dictionary(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        _check_type(name, kind.value_type)
    elif pa.types.is_struct(kind):
        for part in kind:
            _check_type(f"{name}.{part.name}", part.type)
    elif not any(is_plain(kind) for is_plain in _PLAIN):
        raise InvalidRequest(name, f"is a column of type {kind}; it must have texts, numbers, booleans, lists, structs")


_READERS: Mapping[str, Callable[[Path], Iterable[Columns | HeliographError]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}
