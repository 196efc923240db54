"""The samplers by name: which diffusers scheduler each one is, and what people call it elsewhere. No torch here.

To add a sampler, add one line to SAMPLERS; every dialect's list and the parity tests pick it up.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from models.errors import InvalidRequest

# What a schedule means in diffusers' scheduler options. `default` leaves the model's own spacing alone.
SCHEDULES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "sgm_uniform": {"timestep_spacing": "trailing"},
}

# What A1111 calls them. Its `Automatic` is another thing for every sampler; `Uniform` is a model's own spacing.
SCHEDULE_LABELS: Mapping[str, str] = {
    "default": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "beta": "Beta",
    "sgm_uniform": "SGM Uniform",
}

_SIGMAS = ("default", "karras", "exponential", "beta", "sgm_uniform")
_SPACED = ("default", "sgm_uniform")


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """One named solver: diffusers' class, A1111's name, the class's options, the schedules it allows, other names.

    It evaluates the network `order` times in each step but the last, in which it does once, and `extra` times besides.
    """

    scheduler: str
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    schedules: tuple[str, ...] = _SIGMAS
    aliases: tuple[str, ...] = ()
    order: int = 1
    extra: int = 0


_MULTISTEP = "DPMSolverMultistepScheduler"

SAMPLERS: Mapping[str, Sampler] = {
    "euler": Sampler(scheduler="EulerDiscreteScheduler", label="Euler", aliases=("k_euler",)),
    "euler_a": Sampler(
        scheduler="EulerAncestralDiscreteScheduler",
        label="Euler a",
        schedules=_SPACED,
        aliases=("k_euler_a", "k_euler_ancestral", "euler ancestral"),
    ),
    "heun": Sampler(scheduler="HeunDiscreteScheduler", label="Heun", aliases=("k_heun",), order=2),
    "lms": Sampler(scheduler="LMSDiscreteScheduler", label="LMS", aliases=("k_lms",)),
    "ddim": Sampler(scheduler="DDIMScheduler", label="DDIM", schedules=_SPACED),
    "ddpm": Sampler(scheduler="DDPMScheduler", label="DDPM", schedules=_SPACED),
    "pndm": Sampler(
        scheduler="PNDMScheduler",
        label="PLMS",
        options={"skip_prk_steps": True},
        schedules=_SPACED,
        aliases=("plms",),
        extra=1,
    ),
    "dpmpp_2m": Sampler(
        scheduler=_MULTISTEP,
        label="DPM++ 2M",
        options={"algorithm_type": "dpmsolver++", "solver_order": 2},
        aliases=("dpm++ 2m", "k_dpmpp_2m", "dpmsolver++", "dpmsolvermultistep"),
    ),
    "dpmpp_2m_sde": Sampler(
        scheduler=_MULTISTEP,
        label="DPM++ 2M SDE",
        options={"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
        aliases=("dpm++ 2m sde", "k_dpmpp_2m_sde"),
    ),
    "dpmpp_3m": Sampler(
        scheduler=_MULTISTEP,
        label="DPM++ 3M",
        options={"algorithm_type": "dpmsolver++", "solver_order": 3},
        aliases=("dpm++ 3m",),
    ),
    "dpmpp_2s": Sampler(
        scheduler="DPMSolverSinglestepScheduler",
        label="DPM++ 2S",
        options={"algorithm_type": "dpmsolver++", "solver_order": 2},
        schedules=("default", "karras", "exponential", "beta"),
        aliases=("dpm++ 2s", "dpmsolversinglestep"),
    ),
    "dpm2": Sampler(scheduler="KDPM2DiscreteScheduler", label="DPM2", aliases=("k_dpm_2", "dpm 2", "kdpm2"), order=2),
    "dpm2_a": Sampler(
        scheduler="KDPM2AncestralDiscreteScheduler",
        label="DPM2 a",
        aliases=("k_dpm_2_a", "k_dpm_2_ancestral", "dpm2 ancestral"),
        order=2,
    ),
    "unipc": Sampler(scheduler="UniPCMultistepScheduler", label="UniPC", aliases=("uni_pc",)),
    "deis": Sampler(scheduler="DEISMultistepScheduler", label="DEIS", options={"algorithm_type": "deis"}),
    "lcm": Sampler(scheduler="LCMScheduler", label="LCM", schedules=_SPACED),
    "tcd": Sampler(scheduler="TCDScheduler", label="TCD", schedules=_SPACED),
}


def _plain(name: str) -> str:
    """`DPM++ 2M` and `dpmpp_2m` are the same name: lower case, `++` is `pp`, separators do not count."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))


_BY_NAME = {_plain(n): name for name, s in SAMPLERS.items() for n in (name, *s.aliases)}
_SCHEDULE_WORDS = {_plain(s): s for s in SCHEDULES} | {
    "automatic": "default",
    "normal": "default",
    "uniform": "default",
    "trailing": "sgm_uniform",
}


def find_schedule(name: str) -> str:
    """The canonical schedule for a name people use. Raises InvalidRequest naming `schedule`."""
    found = _SCHEDULE_WORDS.get(_plain(name))
    if found is None:
        raise InvalidRequest("schedule", f"unknown schedule {name!r}; one of: {', '.join(SCHEDULES)}")
    return found


def find_sampler(name: str) -> tuple[str, str | None]:
    """The canonical (sampler, schedule) for a name people use, e.g. `DPM++ 2M Karras` -> (`dpmpp_2m`, `karras`).

    The schedule is None where the name says nothing of it. Raises InvalidRequest naming `sampler`.
    """
    plain = _plain(name)
    if plain in _BY_NAME:
        return _BY_NAME[plain], None
    for word, schedule in _SCHEDULE_WORDS.items():
        if plain.endswith(word) and plain.removesuffix(word) in _BY_NAME:
            return _BY_NAME[plain.removesuffix(word)], schedule
    raise InvalidRequest("sampler", f"unknown sampler {name!r}; one of: {', '.join(SAMPLERS)}")


def check_pair(sampler: str, schedule: str) -> None:
    """Raises InvalidRequest where diffusers has no such schedule for the sampler."""
    allowed = SAMPLERS[sampler].schedules
    if schedule not in allowed:
        raise InvalidRequest("schedule", f"{sampler} has no schedule {schedule!r}; one of: {', '.join(allowed)}")


def evaluations(sampler: str, steps: int, denoise_strength: float | None = None) -> int:
    """How many forwards a sampler takes: the length of its tape (models.tapes), told without compiling it."""
    named = SAMPLERS[sampler]
    done = steps if denoise_strength is None else min(int(steps * denoise_strength), steps)
    extra = named.extra if steps > 1 else 0
    return max(0, named.order * (done - 1) + 1 + extra)
