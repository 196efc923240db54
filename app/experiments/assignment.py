"""Which arm a unit has: the same at every gateway, at any time, with nothing remembered.

An exponential race (weighted rendezvous hashing): each arm draws a time from the hash of salt, unit and its own name,
at a rate of its weight; the first one wins, with a probability of its share of the weights. Where one weight changes,
units move to that arm or from it and between no others, and only as many as must. Where
several change, no other rule of this kind moves fewer for all weights (Moulton and Jiang, arXiv:1809.04052).
"""

import hashlib
import math
from collections.abc import Mapping


def uniform(*words: str) -> float:
    """A number in (0, 1) that the words decide: independent of that of any others."""
    digest = hashlib.sha256("\0".join(words).encode(errors="surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") + 0.5) / 2**64


def is_in(salt: str, unit: str, share: float) -> bool:
    """Whether a unit is among that share of all units. Whoever is in a share is in any larger one."""
    return share >= 1 or uniform(salt, "share", unit) < share


def arm_of(salt: str, unit: str, weights: Mapping[str, float]) -> str:
    """The unit's arm; weights are above 0."""
    return min(weights, key=lambda arm: -math.log(uniform(salt, "arm", unit, arm)) / weights[arm])


def pseudonym(salt: str, unit: str) -> str:
    """What is kept of a unit: the same for the same unit of the same experiment, and of no use elsewhere."""
    return hashlib.sha256("\0".join((salt, "unit", unit)).encode(errors="surrogatepass")).hexdigest()[:32]
