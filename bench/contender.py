"""A contender: something that makes pictures and is measured."""

from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from models.request import GenerationRequest

ROWS = 2  # of a picture with guidance, in each of its steps


@dataclass(frozen=True, kw_only=True)
class Work:
    """Forwards of the denoising network and rows in them, counted where they run; `padded` rows beside those were
    computed for nobody."""

    forwards: int = 0
    rows: int = 0
    padded: int = 0

    def since(self, earlier: "Work") -> "Work":
        return Work(
            forwards=self.forwards - earlier.forwards,
            rows=self.rows - earlier.rows,
            padded=self.padded - earlier.padded,
        )

    @property
    def rows_per_forward(self) -> float:
        return self.rows / self.forwards

    @property
    def padded_share(self) -> float:
        """Of all rows that were computed."""
        return self.padded / (self.rows + self.padded)


class Contender(Protocol):
    """Opened once, measured, closed. `generate` answers with the encoded picture; many may be in flight."""

    name: str
    title: str

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def generate(self, request: GenerationRequest) -> bytes: ...

    async def work(self) -> Work | None:
        """What has been done since opening; None where it cannot be seen from outside."""
        ...
