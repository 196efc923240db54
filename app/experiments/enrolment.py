"""From a request and who sends it to the request as its arms draw it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from app.experiments.assignment import arm_of, is_in, pseudonym
from app.experiments.settings import UNIT_HEADERS, ExperimentSettings
from app.keys.caller import ANONYMOUS, Caller
from models.parts import ArmUse
from models.request import GenerationRequest

Draws = Callable[[GenerationRequest], bool]  # whether its model takes a request
IsOff = Callable[[str, str], bool]  # whether an arm (experiment, arm) is switched off


@dataclass(frozen=True, kw_only=True)
class Visit:
    """Who sends a request, and what it says itself: the names of the parameters that are given in it."""

    caller: Caller
    headers: Mapping[str, str]  # by name, in lower case
    stated: frozenset[str] = frozenset()

    def unit(self, experiment: ExperimentSettings) -> str | None:
        """What an arm would stick to, None where the request has none. Users and sessions are those of one caller."""
        if experiment.unit == "key":
            return None if self.caller == ANONYMOUS else self.caller.id
        named = self.headers.get(UNIT_HEADERS[experiment.unit])
        return f"{self.caller.id}/{named}" if named else None

    def is_let_in(self, experiment: ExperimentSettings) -> bool:
        """Whether the experiment is for this caller and these headers, and the request leaves all to its arms."""
        if not experiment.enabled or (experiment.keys and self.caller.id not in experiment.keys):
            return False
        if experiment.header is not None:
            name, value = experiment.header.split("=", 1)
            if self.headers.get(name.lower()) != value:
                return False
        return experiment.force or not self.stated & experiment.decides


@dataclass(frozen=True, kw_only=True)
class Enrolment:
    """A request as its arms draw it, and the requests that are drawn beside it and shown to nobody."""

    request: GenerationRequest
    shadows: Sequence[GenerationRequest] = ()


def enrol(
    request: GenerationRequest,
    visit: Visit,
    experiments: Mapping[str, ExperimentSettings],
    draws: Draws,
    is_off: IsOff,
) -> Enrolment:
    """Puts a request into every experiment that it belongs to.

    One that any of the arms could not draw is in none of them: else the arms would not have the same kinds of requests.
    Where the model is up to the arms, neither is one that names what is made for a model: LoRAs and ControlNets.
    """
    shadows: list[GenerationRequest] = []
    for name, experiment in experiments.items():
        unit, salt = visit.unit(experiment), experiment.salt or name
        if unit is None or not visit.is_let_in(experiment) or not is_in(salt, unit, experiment.share):
            continue
        if "model" in experiment.decides and request.names_parts_of_a_model:
            continue
        versions = {arm: experiment.applied(request, arm) for arm in experiment.arms}
        if not all(draws(version) for version in versions.values()):
            continue
        assigned = arm_of(salt, unit, {arm: settings.weight for arm, settings in experiment.drawn.items()})
        use = ArmUse(
            experiment=name,
            arm=experiment.control if is_off(name, assigned) else assigned,
            assigned=assigned,
            version=experiment.version,
            unit=pseudonym(salt, unit),
        )
        shadows += [
            replace(versions[arm], experiments=(replace(use, arm=arm, assigned=arm, shadow=True),))
            for arm, settings in experiment.shadows.items()
            if is_in(f"{salt}/{arm}", unit, settings.weight)
        ]
        request = replace(versions[use.arm], experiments=(*request.experiments, use))
    return Enrolment(request=request, shadows=shadows)
