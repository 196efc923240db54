"""multipart/form-data taken apart in memory: text fields and files by name, each kind within its limit (RFC 7578)."""

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.errors import BodyTooLarge, MalformedBody
from models.errors import InvalidRequest

Form = tuple[dict[str, str], dict[str, list[bytes]]]  # text fields, files


def parse(body: bytes, content_type: str, max_parts: int, max_field_bytes: int) -> Form:
    """The text fields, each of which may be given once, and the files in the order in which they came.

    Raises MalformedBody, BodyTooLarge (too many parts, too long a field) or InvalidRequest naming the field. How long
    a file may be is up to the limit on the whole body.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise MalformedBody("body", "must be multipart/form-data with a boundary")
    reader = _Reader(max_parts, max_field_bytes)
    try:
        parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": reader.begin,
                "on_header_field": reader.header_name,
                "on_header_value": reader.header_value,
                "on_header_end": reader.header_end,
                "on_headers_finished": reader.headers_end,
                "on_part_data": reader.data,
                "on_part_end": reader.end,
                "on_end": reader.finish,
            },
        )
        parser.write(body)
    except FormParserError as malformed:
        raise MalformedBody("body", f"is not valid multipart/form-data: {malformed}") from malformed
    if not reader.finished:
        raise MalformedBody("body", "ends before its last boundary")
    return reader.fields, reader.files


class _Reader:
    """Hears what the parser finds, one part after another."""

    def __init__(self, max_parts: int, max_field_bytes: int):
        self.fields: dict[str, str] = {}
        self.files: dict[str, list[bytes]] = {}
        self.finished = False
        self._max_parts, self._max_field_bytes = max_parts, max_field_bytes
        self._parts = 0

    def begin(self) -> None:
        self._parts += 1
        if self._parts > self._max_parts:
            raise BodyTooLarge("body", f"must have at most {self._max_parts} parts")
        self._header, self._value, self._disposition = b"", b"", b""
        self._pieces: list[bytes] = []
        self._size = 0

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def headers_end(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise MalformedBody("body", "has a part without a name")
        self._name = options[b"name"].decode("utf-8", "replace")
        self._is_file = b"filename" in options or b"filename*" in options

    def data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if not self._is_file and self._size > self._max_field_bytes:
            message = (
                f"must have at most {self._max_field_bytes} bytes; what is longer has to be a file, with a filename"
            )
            raise BodyTooLarge(self._name, message)
        self._pieces.append(data[start:end])

    def end(self) -> None:
        content = b"".join(self._pieces)
        if self._is_file:
            self.files.setdefault(self._name, []).append(content)
        elif self._name in self.fields:
            raise InvalidRequest(self._name, "is given twice")
        else:
            self.fields[self._name] = self._text(content)

    def finish(self) -> None:
        self.finished = True

    def _text(self, content: bytes) -> str:
        try:
            return content.decode()
        except UnicodeDecodeError as binary:
            raise InvalidRequest(self._name, "must be UTF-8 text; a picture needs a filename") from binary
