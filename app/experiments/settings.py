"""What the configuration says of experiments: who is in, which arms there are, and when one is switched off.

An arm holds defaults: a request that says itself what any of the arms would decide is not in the experiment, unless
`force` has the arms decide all the same. So whoever is in draws what the arm says, and nothing else differs.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import Field, StringConstraints, model_validator

from app.strict import Name, Positive, Strict
from models.card import ModelCard
from models.errors import HeliographError, InvalidRequest
from models.parts import AdapterUse, Hires
from models.request import GenerationRequest, PromptSyntax, warm_up_request

Unit = Literal["key", "user", "session"]
UNIT_HEADERS: Mapping[Unit, str] = {"user": "x-user-id", "session": "x-session-id"}
Share = Annotated[float, Field(gt=0, le=1)]
# What makes sense only together: who states one of a pair has stated both.
_PAIRS = (frozenset({"sampler", "schedule"}), frozenset({"width", "height"}))


class Parameters(Strict):
    """The parameters that an arm may decide. What is left out is decided as without the experiment."""

    model: Name | None = None
    negative_prompt: str | None = None
    prompt_syntax: PromptSyntax | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    sampler: str | None = None
    schedule: str | None = None
    clip_skip: int | None = None
    deep_cache: int | None = None
    hires: Hires | None = None
    adapters: tuple[AdapterUse, ...] | None = None

    @property
    def decided(self) -> dict[str, Any]:
        """The parameters that are said, by name."""
        values = {name: getattr(self, name) for name in Parameters.model_fields}
        return {name: value for name, value in values.items() if value is not None}


class ArmSettings(Parameters):
    """One arm: its share of the units, by weight, and its parameters.

    A `shadow` is drawn beside what is answered and shown to nobody; its weight is the share of the units it is drawn
    for.
    """

    weight: Positive = 1.0
    shadow: bool = False

    @model_validator(mode="after")
    def _shadows_have_a_share(self) -> Self:
        if self.shadow and self.weight > 1:
            raise ValueError(f"weight of a shadow is a share of the units, at most 1, not {self.weight}")
        return self


class GuardSettings(Strict):
    """When an arm is switched off: beyond one of the bounds, over its last `window` exposures.

    Nothing is judged by fewer than `least`. After `recover_after_s` seconds the arm is on again, on probation.
    """

    max_error_rate: float | None = Field(default=None, ge=0, lt=1)
    max_p95_s: Positive | None = None
    window: int = Field(default=200, ge=10, le=10_000)
    least: int = Field(default=20, ge=1, le=10_000)
    recover_after_s: Positive = 600.0

    @model_validator(mode="after")
    def _bounds_can_be_met(self) -> Self:
        if self.max_error_rate is None and self.max_p95_s is None:
            raise ValueError("max_error_rate or max_p95_s must be said: what is an arm to be switched off for?")
        if self.least > self.window:
            raise ValueError(f"least must be at most window ({self.window}), not {self.least}")
        return self


class ExperimentSettings(Strict):
    """One experiment. `unit` is what an arm sticks to: the API key, or whom X-User-Id or X-Session-Id names.

    Of the units that `keys` (callers' ids) and `header` (`Name=value`) let in, a `share` is in. Two experiments of one
    `layer` must not let in the same requests; those of different layers are drawn independently. Another `salt` than
    the name draws anew who is where. What is not `enabled` assigns nobody and can be reported still.
    """

    enabled: bool = True
    unit: Unit = "user"
    share: Share = 1.0
    keys: tuple[str, ...] = ()
    header: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]+=.+$")] | None = None
    layer: Name = "default"
    salt: str = ""
    force: bool = False
    control: Name = "control"
    arms: dict[Name, ArmSettings] = Field(min_length=2)
    guard: GuardSettings | None = None

    @model_validator(mode="after")
    def _has_a_control(self) -> Self:
        if self.control not in self.drawn:
            names = ", ".join(self.drawn)
            raise ValueError(f"control must be an arm that is drawn, one of {names}, not {self.control!r}")
        return self

    @property
    def drawn(self) -> dict[str, ArmSettings]:
        """The arms that units are assigned to."""
        return {name: arm for name, arm in self.arms.items() if not arm.shadow}

    @property
    def shadows(self) -> dict[str, ArmSettings]:
        """The arms that are drawn beside them."""
        return {name: arm for name, arm in self.arms.items() if arm.shadow}

    @property
    def decides(self) -> frozenset[str]:
        """The parameters that are up to the arms: those that any of them says."""
        said = frozenset(name for arm in self.arms.values() for name in arm.decided)
        return said.union(*(pair for pair in _PAIRS if pair & said))

    @property
    def version(self) -> str:
        """Changes with whatever decides who draws what: units that were assigned by other rules are not compared.

        Not with the share, nor with who is let in: whoever was in before keeps the arm. What shadows decide is decided
        for all arms, so it is among the rules.
        """
        arms = {name: arm.model_dump(exclude_none=True) for name, arm in self.drawn.items()}
        rules = [self.salt, self.unit, self.force, self.control, sorted(self.decides), arms]
        return hashlib.sha256(orjson.dumps(rules, option=orjson.OPT_SORT_KEYS)).hexdigest()[:12]

    def completed(self, default_model: str) -> Self:
        """The experiment with every arm's model said, where it is up to them: another default one is another rule."""
        if "model" not in self.decides:
            return self
        arms = {name: arm.model_copy(update={"model": arm.model or default_model}) for name, arm in self.arms.items()}
        return self.model_copy(update={"arms": arms})

    def applied(self, request: GenerationRequest, arm: str) -> GenerationRequest:
        """The request as an arm of a completed experiment draws it. What is up to the arms and this one leaves open is
        decided by default."""
        left_open = {name: getattr(GenerationRequest, name) for name in self.decides - {"model"}}
        return replace(request, **left_open | self.arms[arm].decided)

    def overlaps(self, other: "ExperimentSettings") -> bool:
        """Whether a request could be let into both: nobody has two keys, nor a header two values."""
        if self.keys and other.keys and not set(self.keys) & set(other.keys):
            return False
        name, value = (self.header or "=").lower().split("=", 1)
        other_name, other_value = (other.header or "=").lower().split("=", 1)
        return not (name and name == other_name and value != other_value)


def check_together(
    experiments: Mapping[str, ExperimentSettings], cards: Mapping[str, ModelCard], default_model: str
) -> None:
    """Raises InvalidRequest naming the field: for an arm that no model could draw, and for experiments in each other's
    way."""
    enabled = {name: experiment for name, experiment in experiments.items() if experiment.enabled}
    for name, experiment in enabled.items():
        for arm, parameters in experiment.arms.items():
            _check_arm(f"experiments.{name}.arms.{arm}", parameters.decided, cards, default_model)
    for (first, one), (second, other) in combinations(enabled.items(), 2):
        if not one.overlaps(other):
            continue
        if (one.salt or first) == (other.salt or second):
            message = f"is that of {first}, which would give the same units the same arms: give each its own"
            raise InvalidRequest(f"experiments.{second}.salt", message)
        if one.layer == other.layer:
            raise InvalidRequest(
                f"experiments.{second}",
                f"lets in requests that {first} lets in too: give each its own keys or header value, or its own layer",
            )
        if both := sorted(one.decides & other.decides):
            raise InvalidRequest(f"experiments.{second}", f"decides what {first} decides too: {', '.join(both)}")
        if all({"model", "adapters"} & each.decides for each in (one, other)):
            message = f"and {first} let in the same requests; one decides the model, the other adapters, which fit one"
            raise InvalidRequest(f"experiments.{second}", message)


def _check_arm(place: str, decided: dict[str, Any], cards: Mapping[str, ModelCard], default_model: str) -> None:
    model = decided.get("model", default_model)
    if model not in cards:
        raise InvalidRequest(f"{place}.model", f"there is no model {model!r}; the models are: {', '.join(cards)}")
    card = cards[model]
    options = {name: value for name, value in decided.items() if name != "model"}
    try:
        warm_up_request(card, **options).resolve(card)
    except InvalidRequest as wrong:
        raise InvalidRequest(f"{place}.{wrong.field}", wrong.message) from wrong
    except HeliographError as wrong:
        raise InvalidRequest(place, wrong.message) from wrong
