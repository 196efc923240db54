"""Whose turn it is in the lobby, and that nobody is forgotten there."""

import asyncio

from app.hint import Hint, Party
from app.lobby import Lobby, Waiter

ANN, BOB = Party("ann", batch=False), Party("bob", batch=False)
ANNS_BATCH = Party("ann", batch=True)


async def order(lobby: Lobby, under_way: dict[Party, float]) -> list[Waiter]:
    """The waiters in their turns, each of whom brings its work to a replica."""
    turns = []
    while (waiter := lobby.next(lambda party: under_way.get(party, 0.0))) is not None:
        lobby.call(waiter)
        under_way[waiter.hint.party] = under_way.get(waiter.hint.party, 0.0) + waiter.hint.work
        turns.append(waiter)
    return turns


async def test_of_one_party_who_came_first_goes_first():
    lobby = Lobby()
    with lobby.place(Hint(work=9.0, party=ANN)) as first, lobby.place(Hint(work=1.0, party=ANN)) as second:
        assert await order(lobby, {}) == [first, second]


async def test_a_flood_lets_others_through():
    lobby = Lobby()
    places = [lobby.place(Hint(work=1.0, party=ANN)) for _ in range(10)]
    anns = [place.__enter__() for place in places]
    with lobby.place(Hint(work=2.0, party=BOB)) as bobs, lobby.place(Hint(work=2.0, party=BOB)) as bobs_other:
        turns = await order(lobby, {ANN: 5.0})
    assert turns[:2] == [bobs, bobs_other]
    assert turns[2:] == anns
    for place in places:
        place.__exit__(None, None, None)


async def test_interactive_calls_go_before_batch_work_whatever_they_have_under_way():
    lobby = Lobby()
    with lobby.place(Hint(work=1.0, party=ANNS_BATCH)) as batch, lobby.place(Hint(work=1.0, party=ANN)) as mine:
        assert await order(lobby, {ANN: 100.0}) == [mine, batch]


async def test_a_call_waits_until_it_is_called_or_its_time_is_over():
    lobby = Lobby()
    with lobby.place(Hint()) as waiter:
        assert not await waiter.called(0.01)
        assert len(lobby) == 1
        asyncio.get_running_loop().call_later(0.01, lobby.call, waiter)
        assert await waiter.called(5.0)
    assert not lobby


async def test_who_gives_up_is_nobodys_turn_any_more():
    lobby = Lobby()

    async def wait() -> None:
        with lobby.place(Hint()) as waiter:
            await waiter.called(60.0)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    assert len(lobby) == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert lobby.next(lambda _: 0.0) is None
