"""Rows shared out among threads: the same numbers, in the same order, and the process left as it was."""

import threading

import pytest
import torch

from models.rowwise import RowThreads, part
from tests.models.conftest import loaded_family

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def parts_of(rows: int, side: int, threads: int, device: str = "cpu") -> list[tuple[int, int]]:
    """Which rows each call got."""
    seen = []

    def note(rows: slice) -> tuple[torch.Tensor]:
        seen.append((rows.start, rows.stop))
        return (torch.zeros(rows.stop - rows.start),)

    RowThreads(torch.device(device), threads)(note, torch.zeros(rows, 4, side, side))
    return sorted(seen)


@pytest.mark.parametrize(
    ("rows", "side", "threads", "parts"),
    [
        (16, 16, 2, [(0, 8), (8, 16)]),
        (19, 16, 2, [(0, 10), (10, 19)]),
        (2, 64, 2, [(0, 1), (1, 2)]),
        (24, 32, 3, [(0, 8), (8, 16), (16, 24)]),
        (8, 16, 2, [(0, 8)]),  # too little for each
        (3, 64, 2, [(0, 3)]),  # one thread would wait for the other
        (24, 16, 16, [(0, 24)]),
        (64, 64, 1, [(0, 64)]),
    ],
)
def test_rows_are_shared_out_where_every_thread_gets_enough(rows, side, threads, parts):
    assert parts_of(rows, side, threads) == parts


def test_a_gpu_gets_all_rows_at_once():
    assert parts_of(24, 64, 2, "cuda") == [(0, 24)]


def test_each_part_is_called_in_a_thread_of_its_own_that_knows_its_rows():
    told, threads = [], set()
    meet = threading.Barrier(2, timeout=20)  # neither gets on without the other

    def note(rows: slice) -> tuple[torch.Tensor]:
        meet.wait()
        told.append((rows, part(), torch.get_num_threads(), torch.is_inference_mode_enabled()))
        threads.add(threading.get_ident())
        return (torch.arange(rows.start, rows.stop),)

    [answer] = RowThreads(CPU, 2)(note, torch.zeros(16, 4, 16, 16))
    assert answer.tolist() == list(range(16))
    assert len(threads) == 2
    assert all(given == known and count == 1 and inference for given, known, count, inference in told)
    assert part() == slice(None)
    assert torch.get_num_threads() == 2


def test_what_fails_in_any_thread_is_raised_and_leaves_the_process_as_it_was():
    shared = RowThreads(CPU, 2)
    for first in (0, 8):

        def fail(rows: slice, first: int = first) -> tuple[torch.Tensor]:
            if rows.start == first:
                raise torch.OutOfMemoryError("no room")
            return (torch.zeros(8),)

        with pytest.raises(torch.OutOfMemoryError):
            shared(fail, torch.zeros(16, 4, 16, 16))
        assert torch.get_num_threads() == 2
        assert part() == slice(None)


@torch.inference_mode()
def test_a_network_answers_the_same_in_parts():
    unet = loaded_family("sd15").networks["unet"]
    latents = torch.randn(17, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    context = torch.randn(17, 77, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    timesteps = torch.linspace(0, 900, 17)
    calls = []

    def predict(rows: slice) -> tuple[torch.Tensor]:
        calls.append(rows)
        return (unet(latents[rows], timesteps[rows], context[rows]).sample,)

    [whole] = predict(slice(0, 17))
    [shared] = RowThreads(CPU, 2)(predict, latents)
    assert len(calls) == 3
    torch.testing.assert_close(shared, whole, atol=2e-5, rtol=0)
