"""How many replicas the work needs: Serve asks this policy and applies bounds and delays around its answer.

Serve pickles this module by value into its controller, which decides for every deployment in one loop: it imports
nothing heavy, looks at numbers that are there, and waits for nothing.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

# Of what replicas can do is to be in use: beyond, chance alone makes requests wait. Serve's delay before it scales down
# holds what the busiest moment needed, which is as much room again.
HEADROOM = 0.9
ROUNDING = 1e-6  # a sum of shares that is one replica's but for the last digit is no reason for another


class WorkPolicy:
    """As many replicas as are needed for two things: what is left drains within `drain_s`, and what is in use fits.

    The first answers bursts, by the freshest reports. The second holds what steady traffic needs, by the mean over
    Serve's look-back window: by what is left alone a fleet that keeps up would always look too large. There are
    never more replicas than requests, whose pictures stay together; while there is any request there is one, and
    without any, and with nothing left, there need be none.
    """

    def __init__(self, drain_s: float = 10.0):
        """Raises ValueError."""
        if not 0 < drain_s < math.inf:
            raise ValueError(f"drain_s must be above 0, not {drain_s}")
        self._drain_s = drain_s

    def __call__(self, context: "AutoscalingContext") -> tuple[int, dict[str, Any]]:
        """Replicas, before bounds and delays; and no state."""
        left = _freshest(context, "seconds_left")
        if not left and context.current_num_replicas:  # they have just started, or do not tell
            return max(context.target_num_replicas, 1), {}
        request_s = [s for s in _freshest(context, "request_s").values() if s]  # a new replica has met none yet
        mean_s = sum(request_s) / len(request_s) if request_s else 0.0
        queued = _queued(context)
        seconds = sum(left.values()) + mean_s * queued
        wanted = max(_ceil(seconds / self._drain_s), _ceil(_in_use(context) / HEADROOM))
        wanted = min(wanted, _ceil(sum(_freshest(context, "requests").values()) + queued))
        return max(wanted, int(context.total_num_requests > 0)), {}


def _freshest(context: "AutoscalingContext", name: str) -> Mapping[Any, float]:
    """Each running replica's last report of a number; those that have not reported yet are not in it."""
    series = (context.raw_metrics or {}).get(name, {})
    return {replica: points[-1].value for replica, points in series.items() if points}


def _queued(context: "AutoscalingContext") -> float:
    """Requests that wait at handles. Serve tells their peak over its window, and that of all requests: what replicas
    have taken on meanwhile stands in their own reports."""
    taken = sum(_freshest(context, "requests").values())
    return min(context.total_queued_requests or 0.0, max(0.0, context.total_num_requests - taken))


def _in_use(context: "AutoscalingContext") -> float:
    """Replicas' worth of throughput that was in use over the window: the mean, whatever Serve's own
    `aggregation_function` makes of requests."""
    series = (context.raw_metrics or {}).get("busy", {})
    return sum(sum(point.value for point in points) / len(points) for points in series.values() if points)


def _ceil(replicas: float) -> int:
    return math.ceil(replicas - ROUNDING)
