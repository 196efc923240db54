"""On a GPU: bfloat16 beside float32, neighbours, memory, and steps that nobody waits for.

`python -m pytest tests/gpu` on a machine with one. `--device cpu` tries the tests that ask for no GPU's memory or
queue, on small networks in float32.
"""

import time
from pathlib import Path

import pytest
import torch

from bench.drift import exact_float32, nearest, recorded_latents
from models.ahead import Ahead
from models.compiled import COMPILING_S
from models.embedded.upscalers.scores import psnr
from models.events import Event
from models.fp8 import check_fp8, quantise
from models.request import GenerationRequest
from tests.gpu.conftest import Subject
from tests.models.conftest import drawn

pytestmark = pytest.mark.gpu

DRIFT = {torch.bfloat16: 1e-2, torch.float32: 1e-4}  # relative L2 distance of the final latents
FP8_DRIFT = 5e-2
SAME_DB = 40.0
PICTURES, SETTLED = 500, 100
GROWTH = 16 * 2**20  # bytes


def neighbours(subject: Subject) -> list[GenerationRequest]:
    """As unlike the request as the model allows."""
    samplers = ("dpmpp_2m", "ddim", "euler_ancestral", "unipc", "heun", "lms", "ddpm")
    return [
        subject.request(
            seed,
            prompt=f"a {name}",
            sampler=name,
            steps=5 + 3 * seed,
            guidance_scale=(1.0, 4.0)[seed % 2],
            deep_cache=1 + seed % 3,
        )
        for seed, name in enumerate(samplers)
    ]


def test_final_latents_lie_near_those_of_diffusers_in_float32(subject: Subject):
    request = subject.request()
    with exact_float32():
        reference = subject.pipeline().latents(request).float().cpu()
    subject.settle()
    engine = subject.engine()
    with recorded_latents(subject.components.modules["vae"]) as alone:
        engine.generate([request])
    with recorded_latents(subject.components.modules["vae"]) as among:
        engine.generate([*neighbours(subject), request])
    allowed = DRIFT[subject.placement.dtype]
    assert nearest(reference, alone) <= allowed
    assert nearest(reference, among) <= allowed


def test_final_latents_of_fp8_lie_near_those_of_diffusers_in_float32_too(gpu: str, subject: Subject):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")
    check_fp8(torch.device(gpu), torch.bfloat16)
    request = subject.request()
    with exact_float32():
        reference = subject.pipeline().latents(request).float().cpu()
    subject.settle()
    quantise(subject.components.modules["unet"])
    engine = subject.engine()
    with recorded_latents(subject.components.modules["vae"]) as alone:
        engine.generate([request])
    with recorded_latents(subject.components.modules["vae"]) as among:
        engine.generate([*neighbours(subject), request])
    assert nearest(reference, alone) <= FP8_DRIFT
    assert nearest(reference, among) <= FP8_DRIFT


@pytest.mark.parametrize("deep_cache", [1, 3])
def test_a_picture_hardly_shows_its_neighbours(subject: Subject, deep_cache: int):
    subject.settle()
    engine, request = subject.engine(), subject.request(deep_cache=deep_cache)
    [[alone]] = engine.generate([request])
    *_, [among] = engine.generate([*neighbours(subject), request])
    [[other]] = engine.generate([subject.request(seed=8)])
    assert psnr(drawn(alone.data), drawn(among.data)) >= SAME_DB > psnr(drawn(alone.data), drawn(other.data))


@pytest.mark.parametrize("graphs", [False, True])
def test_hundreds_of_pictures_leave_no_memory_behind(gpu: str, subject: Subject, graphs: bool):
    subject.settle()
    engine = subject.engine(graphs=graphs)
    few = {"steps": 2, "width": subject.side // 2, "height": subject.side // 2}
    engine.generate([subject.request(seed, **few) for seed in range(SETTLED)])
    before = torch.cuda.memory_allocated()
    engine.generate([subject.request(seed, **few) for seed in range(SETTLED, PICTURES)])
    assert torch.cuda.memory_allocated() - before < GROWTH


@pytest.mark.parametrize("graphs", [False, True])
def test_a_batch_that_does_not_fit_is_drawn_in_smaller_ones(gpu: str, subject: Subject, graphs: bool):
    subject.settle()
    engine = subject.engine(cap=64, graphs=graphs)
    engine.generate([subject.request(steps=2)])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    engine.generate([subject.request(steps=2)])
    one, whole = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1.2 * one / whole))
    try:
        pictures = engine.generate([subject.request(seed, steps=12) for seed in range(32)])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(len(each) == 1 for each in pictures)
    assert engine.batcher.cap((4, subject.side // 8, subject.side // 8)) < 64


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_step_waits_for_the_gpu(gpu: str, subject: Subject):
    """Steps are queued; where the denoiser waited for one, the GPU would be idle until the next is queued."""
    subject.settle()
    engine = subject.engine()
    heard: list[Event] = []
    engine.submit(subject.request(steps=6, deep_cache=2), heard.append, progress=False)
    engine.step()  # its prompt is encoded
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(4):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not heard  # a step that fails fails the request


def test_the_host_is_at_most_one_step_ahead_and_hears_what_each_took(gpu: str):
    told: list[tuple[float, float, bool]] = []
    ahead, began = Ahead(torch.device(gpu), lambda *step: told.append(step)), time.perf_counter()
    lasted = []
    for number in range(5):
        with ahead.step(number, number == 2):
            torch.cuda._sleep(200_000_000 * (1 + number % 2))  # cycles, some tenth of a second
        lasted.append(time.perf_counter() - began)
    torch.cuda.synchronize()
    each = (time.perf_counter() - began) / 7
    starts = [0, 1, 3, 4, 6]
    assert lasted[0] < 0.5 * each  # the first one is not waited for
    assert all(start * each < at + 0.5 * each for start, at in zip(starts, lasted, strict=True))
    assert [breadth for breadth, *_ in told] == [0, 1, 2, 3]
    assert [shallow for *_, shallow in told] == [False, False, True, False]
    assert [round(seconds / each) for _, seconds, _ in told] == [1, 2, 1, 2]


def test_graphs_draw_what_is_drawn_without_them(gpu: str, subject: Subject):
    """The same kernels on the same numbers but for their rows: nearer than neighbours are."""
    subject.settle()
    requests = [*neighbours(subject), subject.request()]
    plain = subject.engine()
    expected = [drawn(one.data) for [one] in plain.generate(requests)]
    faster = subject.engine(graphs=True)
    captured = faster._denoiser.captured
    for _ in range(3):
        found = [drawn(one.data) for [one] in faster.generate(requests)]
    assert captured is not None
    assert captured.rows
    assert all(psnr(ours, theirs) >= SAME_DB for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.timeout(COMPILING_S + 300)
def test_the_compiled_network_draws_what_the_network_draws(gpu: str, subject: Subject, tmp_path: Path):
    subject.settle()
    request = subject.request(steps=50)
    [[plain]] = subject.engine().generate([request])
    engine = subject.engine(graphs=True, compiled=tmp_path)
    captured = engine._denoiser.captured
    assert captured is not None
    until = time.monotonic() + COMPILING_S
    while not captured.compiled_kinds:
        assert time.monotonic() < until
        assert not captured.failed
        [[found]] = engine.generate([request])
    [[found]] = engine.generate([request])
    assert psnr(drawn(found.data), drawn(plain.data)) >= SAME_DB


def test_pictures_decoded_beside_steps_are_those_decoded_alone(gpu: str, subject: Subject):
    subject.settle()
    engine = subject.engine()
    requests = [subject.request(seed, steps=2 + 3 * seed) for seed in range(6)]
    alone = [drawn(engine.generate([request])[0][0].data) for request in requests]
    beside = [drawn(one.data) for [one] in engine.generate(requests)]
    assert all(psnr(ours, theirs) >= SAME_DB for ours, theirs in zip(beside, alone, strict=True))
