"""The negative: for drawings of dark lines on white, as people scan them, where the ControlNet wants white on black."""

import numpy as np


def apply(pixels: np.ndarray) -> np.ndarray:
    """uint8 (height, width, 3) to the same."""
    return 255 - pixels
