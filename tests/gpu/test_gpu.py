"""On a GPU: bfloat16 beside float32, neighbours, memory, and steps that nobody waits for.

`python -m pytest tests/gpu` on a machine with one. `--device cpu` tries the tests that ask for no GPU's memory or
queue, on small networks in float32.
"""

import time

import numpy as np
import pytest
import torch

from bench.drift import exact_float32, nearest, recorded_latents
from models.events import Event
from models.request import GenerationRequest
from tests.gpu.conftest import Subject
from tests.models.conftest import drawn

pytestmark = pytest.mark.gpu

DRIFT = {torch.bfloat16: 1e-2, torch.float32: 1e-4}  # relative L2 distance of the final latents
SAME_DB = 40.0
PICTURES, SETTLED = 500, 100
GROWTH = 16 * 2**20  # bytes


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Decibels; infinite where they are equal."""
    error = np.mean((ours - theirs).astype(float) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def neighbours(subject: Subject) -> list[GenerationRequest]:
    """As unlike the request as the model allows."""
    samplers = ("dpmpp_2m", "ddim", "euler_ancestral", "unipc", "heun", "lms", "ddpm")
    return [
        subject.request(seed, sampler=name, steps=5 + 3 * seed, guidance_scale=(1.0, 4.0)[seed % 2], prompt=f"a {name}")
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


def test_a_picture_hardly_shows_its_neighbours(subject: Subject):
    subject.settle()
    engine, request = subject.engine(), subject.request()
    [[alone]] = engine.generate([request])
    *_, [among] = engine.generate([*neighbours(subject), request])
    assert psnr(drawn(alone.data), drawn(among.data)) >= SAME_DB


def test_hundreds_of_pictures_leave_no_memory_behind(subject: Subject, gpu: str):
    subject.settle()
    engine = subject.engine()
    few = {"steps": 2, "width": subject.side // 2, "height": subject.side // 2}
    engine.generate([subject.request(seed, **few) for seed in range(SETTLED)])
    before = torch.cuda.memory_allocated()
    engine.generate([subject.request(seed, **few) for seed in range(SETTLED, PICTURES)])
    assert torch.cuda.memory_allocated() - before < GROWTH


def test_a_batch_that_does_not_fit_is_drawn_in_smaller_ones(subject: Subject, gpu: str):
    subject.settle()
    engine = subject.engine(cap=64)
    few = [subject.request(seed, steps=2) for seed in range(32)]
    used, whole = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1.15 * used / whole))
    try:
        pictures = engine.generate(few)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(len(each) == 1 for each in pictures)
    assert engine.batcher.cap((4, subject.side // 8, subject.side // 8)) < 64


def test_no_step_waits_for_the_gpu(subject: Subject, gpu: str):
    """Steps are queued; where the denoiser waited for one, the GPU would be idle until the next is queued."""
    subject.settle()
    engine = subject.engine()
    heard: list[Event] = []
    engine.submit(subject.request(steps=6), heard.append, progress=False)
    engine.step()  # its prompt is encoded
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not heard  # a step that fails fails the request


def test_a_step_takes_the_host_as_long_as_the_gpu(subject: Subject, gpu: str):
    """Else all steps would be queued at once, and nobody could join them."""
    subject.settle()
    engine = subject.engine()
    engine.submit(subject.request(steps=40), lambda _: None, progress=False)
    for _ in range(4):
        engine.step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        engine.step()
    queued = time.perf_counter() - began
    torch.cuda.synchronize()
    assert queued > 0.8 * (time.perf_counter() - began)
