"""Where a batch job leaves its pictures: a folder, or a prefix of a bucket. Each object is written whole or not at all:
in a folder under another name first, in a bucket by one PUT."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
from obstore import exceptions
from obstore.store import LocalStore, S3Store

from app.stores.store import StoreUnavailable
from models.errors import InvalidRequest

S3 = "s3://"
TIMEOUT_S = 60.0  # of one operation with its retries
RETRIES = 3


class Place:
    """Objects by name. May be used by several threads, and opened in several processes.

    Raises StoreUnavailable where the place does not answer, or takes no more.
    """

    def __init__(self, output: str, endpoint: str | None = None, region: str | None = None):
        """`endpoint` is a server other than Amazon's. Credentials come from the environment (AWS_ACCESS_KEY_ID)."""
        self.output = output
        self._store = _bucket(output, endpoint, region) if output.startswith(S3) else _folder(Path(output))

    def put(self, name: str, data: bytes, content_type: str) -> None:
        """Keeps the object, in the place of an earlier one of that name."""
        try:
            obstore.put(self._store, name, data, attributes=self._attributes(content_type), use_multipart=False)
        except exceptions.BaseError as fault:
            raise self._fault(fault) from fault

    def put_file(self, name: str, file: Path) -> None:
        """The same for a file of any size."""
        try:
            obstore.put(self._store, name, file)
        except exceptions.BaseError as fault:
            raise self._fault(fault) from fault

    def get(self, name: str) -> bytes | None:
        """The object; None where there is none."""
        try:
            return bytes(obstore.get(self._store, name).bytes())
        except FileNotFoundError:
            return None
        except exceptions.BaseError as fault:
            raise self._fault(fault) from fault

    def has(self, name: str) -> bool:
        """Whether there is such an object."""
        try:
            obstore.head(self._store, name)
        except FileNotFoundError:
            return False
        except exceptions.BaseError as fault:
            raise self._fault(fault) from fault
        return True

    def names(self, folder: str) -> list[str]:
        """The names that begin with `folder/`, in order."""
        try:
            return sorted(found["path"] for page in obstore.list(self._store, folder) for found in page)
        except exceptions.BaseError as fault:
            raise self._fault(fault) from fault

    def delete(self, *names: str) -> None:
        """Removes objects; where there is none, nothing happens."""
        for name in names:
            try:
                obstore.delete(self._store, name)
            except FileNotFoundError:
                continue
            except exceptions.BaseError as fault:
                raise self._fault(fault) from fault

    def _attributes(self, content_type: str) -> dict[str, str] | None:
        return {"Content-Type": content_type} if isinstance(self._store, S3Store) else None

    def _fault(self, fault: Exception) -> StoreUnavailable:
        return StoreUnavailable(message=f"{self.output} fails: {str(fault).splitlines()[0]}")


def _folder(path: Path) -> LocalStore:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise InvalidRequest("output", f"cannot be a folder: {fault.strerror}") from fault
    return LocalStore(path.absolute())


def _bucket(output: str, endpoint: str | None, region: str | None) -> S3Store:
    bucket, _, prefix = output.removeprefix(S3).strip("/").partition("/")
    if not bucket:
        raise InvalidRequest("output", "must be a folder, or s3://bucket/prefix")
    options: dict[str, Any] = {"endpoint": endpoint, "region": region}
    return S3Store(
        bucket,
        prefix=prefix or None,
        client_options={
            "allow_http": (endpoint or "").startswith("http://"),
            "timeout": timedelta(seconds=TIMEOUT_S / RETRIES),
        },
        retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=TIMEOUT_S)},
        **{name: value for name, value in options.items() if value is not None},
    )
