"""Tapes: any diffusers scheduler of this field, run once on random probes and kept as rows of coefficients.

A solver's step is linear in the last few latents x, the last few model outputs m and fresh noise z:

    x' = sum_j a_j x[-j] + sum_j b_j m[-j] + c z,   j = 0 .. HISTORY

so the library's own scheduler is run on independent random vectors instead of latents, and each step's coefficients are
read off by least squares. The mathematics stays diffusers'; a scheduler that is not linear leaves a residual
and is refused.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any

import diffusers
import numpy as np
import torch

from models.errors import InvalidRequest
from models.samplers import SAMPLERS, SCHEDULES

HISTORY = 3
X, M, Z = slice(0, HISTORY + 1), slice(HISTORY + 1, 2 * HISTORY + 2), 2 * HISTORY + 2  # columns of a coefficient row
# Columns of a line of a tape.
TIMESTEP, SCALE, COEFFICIENTS, ESTIMATE, BLEND = 0, 1, slice(2, Z + 3), slice(Z + 3, Z + 5), slice(Z + 5, Z + 7)
_PROBES = 64  # independent equations per step, for at most 9 unknowns
_TOLERANCE = 2e-6  # some schedulers compute in float32
_CACHED = 512


@dataclass(frozen=True)
class Tape:
    """A compiled sampler: one entry per evaluation of the network.

    `timesteps` (n,) is what the network is told; it sees `input_scales` (n,) times the latents. `coefficients` (n, 9)
    makes the next latents from x, m and z as in the module's formula. `draws` (n,) says where diffusers draws noise,
    used or not, so that a seed means the same. `estimates` (n, 2) gives the clean latents expected now: p x + q m.
    `steps` (n,) numbers the step that each evaluation belongs to, from 0: some samplers take two to a step.
    `blends` (n, 2) makes what inpainting keeps as noisy as the next latents: p clean + q unit noise.
    The first latents are `signal` times the clean input latents plus `noise` times unit noise.
    """

    timesteps: torch.Tensor
    input_scales: torch.Tensor
    coefficients: torch.Tensor
    draws: tuple[bool, ...]
    steps: tuple[int, ...]
    estimates: torch.Tensor
    blends: torch.Tensor
    signal: float
    noise: float

    def __len__(self) -> int:
        return len(self.draws)

    @cached_property
    def lines(self) -> torch.Tensor:
        """(n, 15): all numbers of an evaluation side by side, which so reach a device in one copy."""
        parts = (self.timesteps[:, None], self.input_scales[:, None], self.coefficients, self.estimates, self.blends)
        return torch.cat(parts, 1)


class Tapes:
    """The tapes of one model, compiled when first asked for and kept. Safe to use from several threads."""

    def __init__(self, scheduler_config: Mapping[str, Any]):
        self._config = dict(scheduler_config)
        self._tapes: OrderedDict[tuple[Any, ...], Tape] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, sampler: str, schedule: str, steps: int, denoise_strength: float | None = None) -> Tape:
        """The tape for a sampler; `denoise_strength` None starts from noise, else late, from noised clean latents.

        A strength too small for one step gives an empty tape. Raises InvalidRequest where diffusers has no such
        combination.
        """
        key = (sampler, schedule, steps, denoise_strength)
        with self._lock:
            if key in self._tapes:
                self._tapes.move_to_end(key)
                return self._tapes[key]
        tape = compile_tape(self.scheduler(sampler, schedule), steps, denoise_strength)
        with self._lock:
            self._tapes[key] = tape
            while len(self._tapes) > _CACHED:
                self._tapes.popitem(last=False)
        return tape

    def scheduler(self, sampler: str, schedule: str) -> Any:
        """A fresh diffusers scheduler, made from the model's base configuration and nothing a request has touched."""
        named = SAMPLERS[sampler]
        options = {**self._config, **named.options, **SCHEDULES[schedule]}
        return getattr(diffusers, named.scheduler).from_config(options)


def compile_tape(scheduler: Any, steps: int, denoise_strength: float | None) -> Tape:
    """Runs a fresh scheduler once on probes. Raises InvalidRequest where it refuses the steps or is not linear, or has
    no way with what the model predicts."""
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, AssertionError, IndexError, ZeroDivisionError) as refused:
        raise InvalidRequest("steps", f"{type(scheduler).__name__} does not take {steps} steps: {refused}") from refused
    skipped = 0
    if denoise_strength is not None:
        skipped = (steps - min(int(steps * denoise_strength), steps)) * scheduler.order
    timesteps = scheduler.timesteps[skipped:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    if len(timesteps) == 0:
        return _empty_tape()
    signal, noise = 0.0, float(scheduler.init_noise_sigma)
    if denoise_strength is not None:
        signal, noise = _renoised(scheduler, timesteps[:1])
    scales, coefficients, draws, blends = _record(scheduler, timesteps)
    abar = _signals(scheduler, timesteps, np.array(scales))
    if scheduler.config.get("timestep_type") == "continuous":  # the network is told log(sigma) / 4 (arXiv:2206.00364)
        timesteps = torch.from_numpy(np.log(1 / abar - 1) / 8)
    return Tape(
        timesteps=timesteps.to(torch.float32),
        input_scales=torch.tensor(scales),
        coefficients=torch.from_numpy(coefficients).float(),
        draws=tuple(draws),
        steps=_step_numbers(len(timesteps), steps - skipped // scheduler.order, scheduler.order),
        estimates=_estimates(scheduler.config.prediction_type, abar, np.array(scales)),
        blends=torch.tensor(blends),
        signal=signal,
        noise=noise,
    )


def _empty_tape() -> Tape:
    none = torch.empty(0)
    pairs = torch.empty(0, 2)
    return Tape(none, none, torch.empty(0, Z + 1), (), (), estimates=pairs, blends=pairs, signal=1.0, noise=0.0)


def _step_numbers(evaluations: int, steps: int, order: int) -> tuple[int, ...]:
    """Of each evaluation its step; what PNDM takes beyond `order` for each belongs to the first (arXiv:2202.09778)."""
    extra = max(0, evaluations - steps * order)
    return tuple(max(0, evaluation - extra) // order for evaluation in range(evaluations))


def _renoised(scheduler: Any, timestep: torch.Tensor) -> tuple[float, float]:
    """How the scheduler mixes clean latents and unit noise to what belongs to a timestep."""
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    return float(scheduler.add_noise(one, zero, timestep)), float(scheduler.add_noise(zero, one, timestep))


def _record(
    scheduler: Any, timesteps: torch.Tensor
) -> tuple[list[float], np.ndarray, list[bool], list[tuple[float, float]]]:
    """Steps the scheduler through its timesteps; gives input scales, coefficient rows (n, 9), noise draws, blends."""
    probe = torch.Generator().manual_seed(0)
    noise = torch.Generator().manual_seed(1)
    accepted = signature(scheduler.step).parameters
    options: dict[str, Any] = {"return_dict": False}
    options |= {"generator": noise} if "generator" in accepted else {}
    options |= {"eta": 0.0} if "eta" in accepted else {}  # what diffusers' pipelines pass
    xs = [torch.randn(1, _PROBES, 1, 1, generator=probe, dtype=torch.float64)]
    ms: list[torch.Tensor] = []
    scales, rows, draws, blends, name = [], [], [], [], type(scheduler).__name__
    for i, t in enumerate(timesteps):
        scales.append(float(scheduler.scale_model_input(torch.ones_like(xs[0]), t).flatten()[0]))
        ms.append(torch.randn(1, _PROBES, 1, 1, generator=probe, dtype=torch.float64))
        before = noise.get_state()
        try:
            after = scheduler.step(ms[-1], t, xs[-1], **options)[0].double()
        except (NotImplementedError, ValueError) as refused:  # not every solver takes every kind of prediction
            raise InvalidRequest(
                "sampler", f"{name} cannot run with this model's configuration: {refused}"
            ) from refused
        z = _drawn(before, noise, after.shape)
        rows.append(_fit(after, xs, ms, z, name))
        draws.append(z is not None)
        xs.append(after)
        following = timesteps[i + 1 : i + 2]
        blends.append(_renoised(scheduler, following) if len(following) else (1.0, 0.0))
    return scales, np.stack(rows), draws, blends


def _drawn(before: torch.Tensor, generator: torch.Generator, shape: torch.Size) -> torch.Tensor | None:
    """The noise that a step has drawn from the generator, or None."""
    if torch.equal(before, generator.get_state()):
        return None
    for dtype in (torch.float64, torch.float32):
        twin = torch.Generator()
        twin.set_state(before)
        z = torch.randn(shape, generator=twin, dtype=dtype)
        if torch.equal(twin.get_state(), generator.get_state()):
            return z.double()
    raise InvalidRequest("sampler", "draws noise more than once in a step and cannot be compiled")


def _fit(
    target: torch.Tensor, xs: list[torch.Tensor], ms: list[torch.Tensor], z: torch.Tensor | None, name: str
) -> np.ndarray:
    """The coefficient row (9,) that makes `target`, from as little history as explains it."""
    spans = [(1, m) for m in range(1, HISTORY + 2)] + [(h, h) for h in range(2, HISTORY + 2)]
    scale = target.abs().max()
    for x_span, m_span in spans:
        terms = {X.start + j: x for j, x in enumerate(reversed(xs[-x_span:]))}
        terms |= {M.start + j: m for j, m in enumerate(reversed(ms[-m_span:]))}
        terms |= {} if z is None else {Z: z}
        columns = torch.stack([term.flatten() for term in terms.values()], 1).numpy()
        norms = np.linalg.norm(columns, axis=0)
        solution = np.linalg.lstsq(columns / norms, target.flatten().numpy(), rcond=1e-6)[0] / norms
        if np.abs(columns @ solution - target.flatten().numpy()).max() <= _TOLERANCE * float(scale):
            row = np.zeros(Z + 1)
            row[list(terms)] = solution
            return row
    raise InvalidRequest("sampler", f"{name} is not linear with this model's configuration and cannot be compiled")


def _signals(scheduler: Any, timesteps: torch.Tensor, scales: np.ndarray) -> np.ndarray:
    """(n,): abar of sqrt(abar) x0 + sqrt(1 - abar) noise (arXiv:2006.11239, eq. 4), which every scheduler hands the
    network: those that keep latents of another variance scale them by sqrt(abar), for the others the timestep tells."""
    known = scheduler.alphas_cumprod.double().numpy()
    told = np.interp(timesteps.double().numpy(), np.arange(len(known)), known)
    return np.where(scales < 1, scales**2, told).clip(min=1e-6)


def _estimates(prediction: str, abar: np.ndarray, scale: np.ndarray) -> torch.Tensor:
    """(n, 2): the clean latents expected at each evaluation, as p x + q m (for v see arXiv:2202.00512, appendix D)."""
    clean, dirty = np.sqrt(abar), np.sqrt(1 - abar)
    if prediction == "epsilon":
        p, q = scale / clean, -dirty / clean
    elif prediction == "v_prediction":
        p, q = scale * clean, -dirty
    else:
        p, q = np.zeros_like(scale), np.ones_like(scale)
    return torch.from_numpy(np.stack([p, q], 1)).float()
