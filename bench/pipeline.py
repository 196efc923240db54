"""diffusers' own pipeline drawing requests of one class together: what both baselines run."""

import threading
from collections.abc import Sequence
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import StableDiffusionPipeline

from bench.contender import Work
from bench.workloads import RequestClass, class_of
from models.images import encode
from models.request import GenerationRequest
from models.samplers import SAMPLERS, SCHEDULES

SOURCE = Path(__file__).parents[1] / "models" / "embedded" / "sd15"
GroupKey = tuple[RequestClass, float | None, str | None, str | None]


class Pipeline:
    """A StableDiffusionPipeline in float32 on the CPU that counts its network's forwards and rows."""

    def __init__(self, threads: int):
        torch.set_num_threads(threads)
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        self._pipeline = StableDiffusionPipeline.from_pretrained(SOURCE, dtype=torch.float32)
        self._pipeline.set_progress_bar_config(disable=True)
        self._base = dict(self._pipeline.scheduler.config)
        self._lock = threading.Lock()
        self._forwards = self._rows = 0
        self._pipeline.unet.register_forward_hook(self._count)

    @property
    def work(self) -> Work:
        return Work(forwards=self._forwards, rows=self._rows)

    def draw(self, requests: Sequence[GenerationRequest]) -> list[bytes]:
        """The pictures of requests with equal parameters, each from its own generator, encoded as the engine does."""
        first = requests[0]
        assert len({group_key(r) for r in requests}) == 1, "a call of the pipeline has one set of parameters"
        with self._lock:
            self._pipeline.scheduler = self._scheduler(first)
            pictures = self._pipeline(
                [r.prompt for r in requests],
                negative_prompt=[r.negative_prompt for r in requests],
                width=first.width,
                height=first.height,
                num_inference_steps=first.steps,
                guidance_scale=first.guidance_scale,
                generator=[torch.Generator().manual_seed(r.seed) for r in requests],
                output_type="pil",
            ).images
        return [encode(np.asarray(picture), "png") for picture in pictures]

    def _scheduler(self, request: GenerationRequest) -> "diffusers.SchedulerMixin":
        sampler = SAMPLERS[request.sampler]
        options = {**sampler.options, **SCHEDULES[request.schedule]}
        return getattr(diffusers, sampler.scheduler).from_config({**self._base, **options})

    def _count(self, network: torch.nn.Module, inputs: object, output: tuple[torch.Tensor]) -> None:
        self._forwards += 1
        self._rows += output[0].shape[0]


def group_key(request: GenerationRequest) -> GroupKey:
    """What requests must share to be drawn by one call of the pipeline."""
    return class_of(request), request.guidance_scale, request.sampler, request.schedule


def groups_of(requests: Sequence[GenerationRequest]) -> list[list[int]]:
    """The positions of requests that can be drawn together, in order of first appearance."""
    groups: dict[GroupKey, list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(group_key(request), []).append(i)
    return list(groups.values())
