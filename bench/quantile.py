"""The one meaning that percentiles have in the benchmarks."""

from collections.abc import Sequence

import numpy as np


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that this share of all do not exceed: nearest rank. Raises IndexError of none."""
    return float(np.quantile(values, share, method="inverted_cdf"))
