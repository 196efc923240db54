"""A router for callers: each has a budget, and nobody reaches another one's requests."""

import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial

from app.events import Admitted, Ending, ModelState, ReplicaEvent, Upscaled
from app.keys.budgets import Budgets, pixel_steps
from app.keys.caller import ANONYMOUS, Caller, current
from app.origin import Needs, Origin
from app.service import Router
from models.images import ImageFormat
from models.parts import Upscale
from models.request import EffectiveRequest

GiveBack = Callable[[], Awaitable[None]]  # what was taken for work that nobody has begun


class Metered:
    """Does what the router does, for the current caller."""

    def __init__(self, router: Router, budgets: Budgets):
        self._router, self._budgets = router, budgets

    async def generate(self, request: EffectiveRequest, progress: bool, id: str) -> AsyncGenerator[ReplicaEvent, None]:
        caller, taken = current.get(), False
        with self._budgets.slot(caller):
            give_back = await self.charge(request)
            try:
                async with aclosing(self._router.generate(request, progress, _own(caller, id))) as events:
                    async for event in events:
                        taken = taken or isinstance(event, Admitted)
                        yield event
            finally:
                if not taken:
                    await give_back()

    async def charge(self, request: EffectiveRequest) -> GiveBack:
        """Takes what a request costs from the current caller's budget, and tells how to give it back.

        Raises BudgetSpent, InvalidRequest.
        """
        caller, field, cost = current.get(), "pixel_steps_per_minute", pixel_steps(request)
        charged = await self._budgets.charge(caller, field, cost)
        return partial(self._budgets.give_back, caller, field, cost, charged)

    async def origin(self, model: str, needs: Needs) -> Origin | None:
        return await self._router.origin(model, needs)

    async def end(self, ending: Ending, id: str) -> bool:
        return await self._router.end(ending, _own(current.get(), id))

    async def state(self, model: str) -> ModelState:
        return await self._router.state(model)

    async def upscaler_state(self) -> ModelState:
        return await self._router.upscaler_state()

    async def check_upscaler(self) -> None:
        await self._router.check_upscaler()

    async def upscale(self, picture: bytes, wanted: Upscale, format: ImageFormat) -> Upscaled:
        with self._budgets.slot(current.get()):
            return await self._router.upscale(picture, wanted, format)


def _own(caller: Caller, id: str) -> str:
    """The name that a caller's request has for the replicas: the same id from another caller names nothing."""
    if caller == ANONYMOUS:
        return id
    return hashlib.sha256(f"{caller.id}:{id}".encode()).hexdigest()[:32]
