"""diffusers' own pipeline drawing requests of one class together: what the baselines run."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import StableDiffusionPipeline

from bench.contender import Work
from bench.workloads import RequestClass, class_of
from models.request import GenerationRequest
from models.samplers import SAMPLERS, SCHEDULES

SOURCE = Path(__file__).parents[1] / "models" / "embedded" / "sd15"
GroupKey = tuple[RequestClass, float | None, str | None, str | None, bool]


class Pipeline:
    """A pipeline of diffusers' that counts its network's forwards and rows. One call at a time."""

    def __init__(self, pipeline: Any):
        self._pipeline = pipeline
        self._pipeline.set_progress_bar_config(disable=True)
        self._base = dict(pipeline.scheduler.config)
        self._lock = threading.Lock()
        self._forwards = self._rows = 0
        self._hook = pipeline.unet.register_forward_hook(self._count)

    def close(self) -> None:
        """Leaves the network as it was: others may run it next."""
        self._hook.remove()

    @property
    def work(self) -> Work:
        return Work(forwards=self._forwards, rows=self._rows)

    def draw(self, requests: Sequence[GenerationRequest]) -> list[np.ndarray]:
        """Pictures (h, w, 3) of requests with equal parameters, each from its own generator."""
        return [np.asarray(picture) for picture in self._call(requests, "pil")]

    def latents(self, request: GenerationRequest) -> torch.Tensor:
        """The final latents of one request, (c, h, w)."""
        return self._call([request], "latent")[0]

    def _call(self, requests: Sequence[GenerationRequest], output_type: str) -> Any:
        first = requests[0]
        assert len({group_key(r) for r in requests}) == 1, "a call of the pipeline has one set of parameters"
        with self._lock:
            self._pipeline.scheduler = self._scheduler(first)
            return self._pipeline(
                [r.prompt for r in requests],
                # None and not "": SDXL's pipeline takes zeros for what was not said, as the engine does.
                negative_prompt=[r.negative_prompt for r in requests] if first.negative_prompt else None,
                width=first.width,
                height=first.height,
                num_inference_steps=first.steps,
                guidance_scale=first.guidance_scale,
                generator=[torch.Generator().manual_seed(r.seed) for r in requests],
                output_type=output_type,
            ).images

    def _scheduler(self, request: GenerationRequest) -> Any:
        sampler = SAMPLERS[request.sampler]
        options = {**sampler.options, **SCHEDULES[request.schedule]}
        return getattr(diffusers, sampler.scheduler).from_config({**self._base, **options})

    def _count(self, network: torch.nn.Module, inputs: object, output: tuple[torch.Tensor]) -> None:
        self._forwards += 1
        self._rows += output[0].shape[0]


def embedded(threads: int) -> Pipeline:
    """The embedded sd15 in float32 on the CPU."""
    torch.set_num_threads(threads)
    hide_progress()
    return Pipeline(StableDiffusionPipeline.from_pretrained(SOURCE, dtype=torch.float32))


def hide_progress() -> None:
    """No bars of the libraries' own while weights are read and written."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def group_key(request: GenerationRequest) -> GroupKey:
    """What requests must share to be drawn by one call of the pipeline."""
    return class_of(request), request.guidance_scale, request.sampler, request.schedule, bool(request.negative_prompt)


def groups_of(requests: Sequence[GenerationRequest]) -> list[list[int]]:
    """The positions of requests that can be drawn together, in order of first appearance."""
    groups: dict[GroupKey, list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(group_key(request), []).append(i)
    return list(groups.values())
