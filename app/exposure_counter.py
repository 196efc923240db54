"""The arms of experiments among Ray's metrics: a counter of requests by experiment, arm and what became of them."""

from typing import TYPE_CHECKING, Any

from ray.serve.metrics import Counter

if TYPE_CHECKING:
    from app.experiments.store import Exposure

_TAGS: Any = ("experiment", "arm", "outcome")  # Ray's annotation has room for one


class ExposureCounter:
    """Counts `heliograph_exposures` where Ray's Prometheus endpoints tell it. Has to be made in a Serve replica."""

    def __init__(self) -> None:
        self._counter = Counter(
            "heliograph_exposures",
            description="Requests that an experiment's arm had; outcome is drawn, or an error's code.",
            tag_keys=_TAGS,
        )

    def __call__(self, seen: "Exposure") -> None:
        self._counter.inc(1, {"experiment": seen.experiment, "arm": seen.arm, "outcome": seen.error or "drawn"})
