"""What a request costs: rows of its forwards times latent positions times forwards, for all of its pictures. No torch."""

from models.request import EffectiveRequest

_FACTOR = 8  # pixels a side that a latent position stands for


def work(request: EffectiveRequest) -> float:
    """The request's cost in row positions, the unit of an engine's pace."""
    rows = 2 if request.guided else 1
    cost = request.width * request.height * request.steps
    if request.hires is not None:
        width, height = request.largest
        cost += width * height * (request.hires.steps or request.steps)
    return rows * request.samples * cost / _FACTOR**2
