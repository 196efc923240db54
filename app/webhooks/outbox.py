"""The outbox, as the deliverer sees it: webhooks that were written down with the change that they tell of."""

from collections.abc import Collection, Sequence
from typing import Protocol


class Delivery(Protocol):
    """One webhook that is due. Its id is the same in every attempt: by it, receivers know what they have seen."""

    @property
    def id(self) -> str: ...

    @property
    def url(self) -> str: ...

    @property
    def body(self) -> bytes: ...

    @property
    def secrets(self) -> tuple[str, ...]:
        """The newest first; several while one replaces another."""
        ...

    @property
    def attempts(self) -> int:
        """How many there are with this one."""
        ...


class Outbox(Protocol):
    """Deliveries are pending, then delivered or dead. Every method raises HeliographError when its database is away."""

    async def claim_due(self, limit: int, lease_s: float, busy: Collection[str]) -> Sequence[Delivery]:
        """The deliveries longest due; none whose scheme and authority, as its url has them, are in `busy`.

        These look like `https://example.com:8443`. What is claimed is nobody else's for `lease_s` seconds; what is not
        reported on by then is due again.
        """
        ...

    async def delivered(self, id: str, status: int) -> None:
        """The receiver has taken it."""
        ...

    async def failed(self, id: str, status: int | None, error: str, retry_in_s: float | None) -> None:
        """An attempt failed, with that HTTP status if any; the next is due in so many seconds. None: it is dead."""
        ...

    async def disable(self, id: str) -> None:
        """The receiver wants no more: this delivery and whatever is pending for its url are dead, and nothing new goes
        there until its owner says so."""
        ...
