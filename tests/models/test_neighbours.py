"""Acceptance 3: a request does not feel its neighbours, and they do share batches."""

import io
import random

import numpy as np
from PIL import Image

from models.request import GenerationRequest
from models.samplers import SAMPLERS
from tests.models.conftest import new_engine

SIZES = ((128, 128), (128, 128), (128, 128), (96, 128), (192, 128))


def mixed_requests(count: int) -> list[GenerationRequest]:
    """Requests as different from each other as the fields allow, the same at every run."""
    rng = random.Random(5)
    samplers = [*SAMPLERS, *rng.choices(list(SAMPLERS), k=count - len(SAMPLERS))]
    colours = ("red", "green", "blue", "yellow", "purple")
    made = []
    for number, sampler in enumerate(samplers):
        width, height = rng.choice(SIZES)
        guidance_scale, rescale = rng.choice((1.0, 3.0, 5.5, 8.0)), rng.choice((0.0, 0.0, 0.7))
        request = GenerationRequest(
            model="sd15",
            prompt=f"a {rng.choice(colours)} circle on a {rng.choice(colours)} background",
            negative_prompt=rng.choice(("", "blurry")),
            sampler=sampler,
            schedule=rng.choice(SAMPLERS[sampler].schedules),
            steps=rng.randint(3, 9),
            guidance_scale=guidance_scale,
            guidance_rescale=rescale if guidance_scale > 1 else 0.0,
            seed=1000 + number,
            width=width,
            height=height,
        )
        made.append(request)
    return made


def drawn(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def test_24_different_requests_together_equal_each_alone_and_share_forwards():
    requests = mixed_requests(24)
    together = new_engine("sd15")
    shared = together.generate(requests)
    alone = new_engine("sd15")
    singles = [alone.generate([request]) for request in requests]
    for request, [[ours]], [[its_own]] in zip(requests, [[s] for s in shared], singles, strict=True):
        difference = np.abs(drawn(ours.data) - drawn(its_own.data)).max()
        assert difference <= 1, f"{request.sampler} {request.schedule}: {difference}/255 away from its picture alone"
    forwards, evaluations = together.load().forwards, alone.load().forwards
    assert forwards <= evaluations / 3, f"{evaluations} evaluations took {forwards} forwards: hardly a batch was shared"


def test_the_same_request_twice_gives_the_same_bytes():
    request = mixed_requests(24)[3]
    engine = new_engine("sd15")
    assert engine.generate([request])[0][0].data == engine.generate([request])[0][0].data
