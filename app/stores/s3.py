"""Objects in a bucket of S3, or of a server that speaks its language.

One PUT writes an object, whole or not at all, and `If-None-Match: *` lets only the first one through where the server
knows that header. A PUT of which no answer came may have been heard, so it is looked up before it counts as failed. The
hash is kept as user metadata. obstore signs (SigV4), retries what may be retried, and keeps the connections.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
from obstore import exceptions
from obstore.store import S3Store

from app.stores import store
from app.stores.store import Span, StoredObject, StoreUnavailable
from models.errors import NotFound

if TYPE_CHECKING:
    from obstore import GetOptions

T = TypeVar("T")

TIMEOUT_S = 60.0  # of one operation with its retries
RETRIES = 3
SHA256 = "sha256"  # the name of the user metadata


class S3:
    """A store in a bucket."""

    def __init__(
        self,
        bucket: str,
        *,
        prefix: str = "",
        conditional_put: bool = True,
        timeout_s: float = TIMEOUT_S,
        **options: Any,
    ):
        """`conditional_put`: whether the server honours `If-None-Match: *`; else a put looks before it writes.

        `timeout_s` is for one operation with its retries. `options` are obstore's for S3: `endpoint`, `region` and so
        on. What is left out comes from the environment.
        """
        self._conditional, self._timeout_s = conditional_put, timeout_s
        self._bucket = S3Store(
            bucket,
            prefix=prefix or None,
            client_options={
                "allow_http": str(options.get("endpoint", "")).startswith("http://"),
                "timeout": timedelta(seconds=timeout_s / RETRIES),
            },
            retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=timeout_s)},
            **options,
        )

    async def put(self, key: str, data: bytes, content_type: str) -> StoredObject:
        wanted = store.describe(key, data, content_type)
        if not self._conditional and await self._is_there(wanted):
            return wanted
        try:
            await self._answered(self._upload(wanted, data))
        except (exceptions.AlreadyExistsError, StoreUnavailable):  # an attempt before this one may have arrived
            if not await self._is_there(wanted):
                raise
        return wanted

    async def get(self, key: str, span: Span | None = None) -> bytes:
        store.check_key(key)
        if span is not None:
            store.check_span(span, (await self.head(key)).bytes)
        return await self._answered(self._download(key, span), key)

    async def head(self, key: str) -> StoredObject:
        store.check_key(key)
        found = await self._answered(obstore.get_async(self._bucket, key, options={"head": True}), key)
        attributes = found.attributes
        return StoredObject(
            key=key,
            bytes=found.meta["size"],
            sha256=str(attributes.get(SHA256, "")),
            content_type=str(attributes.get("Content-Type", "")),
        )

    async def delete(self, key: str) -> None:
        store.check_key(key)
        await self._answered(obstore.delete_async(self._bucket, key), key)

    async def list(self, older_than_s: float, folder: str = "") -> AsyncIterator[str]:
        before = datetime.now(UTC) - timedelta(seconds=older_than_s)
        pages = obstore.list(self._bucket, prefix=folder or None)
        while page := await self._answered(anext(pages, None)):
            for found in page:
                # What is not named like ours is somebody else's, and must not look like an orphan.
                if found["last_modified"] < before and store.KEY.fullmatch(found["path"]):
                    yield found["path"]

    async def url(self, key: str, expires_s: int) -> str:
        address = await self.sign(key, expires_s)
        await self.head(key)
        return address

    async def sign(self, key: str, expires_s: int) -> str:
        store.check_key(key)
        store.check_expiry(expires_s)
        return await self._answered(obstore.sign_async(self._bucket, "GET", key, timedelta(seconds=expires_s)), key)

    async def _upload(self, wanted: StoredObject, data: bytes) -> None:
        await obstore.put_async(
            self._bucket,
            wanted.key,
            data,
            attributes={
                "Content-Type": wanted.content_type,
                "Content-Disposition": f'inline; filename="{wanted.filename}"',
                SHA256: wanted.sha256,
            },
            mode="create" if self._conditional else "overwrite",
            use_multipart=False,
        )

    async def _download(self, key: str, span: Span | None) -> bytes:
        options: GetOptions = {} if span is None else {"range": span}
        found = await obstore.get_async(self._bucket, key, options=options)
        return bytes(await found.bytes_async())

    async def _is_there(self, wanted: StoredObject) -> bool:
        """Whether the object is there already. Raises KeyTaken where another one is."""
        try:
            store.check_same(await self.head(wanted.key), wanted)
        except NotFound:
            return False
        return True

    async def _answered(self, work: Awaitable[T], key: str = "") -> T:
        """What the server answers, within the deadline, its refusals by our names."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await work
        except TimeoutError as late:
            raise StoreUnavailable(message=f"the store for pictures took over {self._timeout_s:.0f} s") from late
        except FileNotFoundError as gone:
            raise store.missing(key) from gone
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as refused:
            raise StoreUnavailable(message="the store for pictures refuses this server's credentials") from refused
        except exceptions.AlreadyExistsError:
            raise
        except exceptions.BaseError as fault:
            raise StoreUnavailable() from fault
