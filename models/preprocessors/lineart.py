"""Dark lines drawn white on black: what is darker than its surroundings, by a difference of Gaussians.

It finds the lines of a drawing; for the outlines of a photograph use `sketch`. No learned model stands behind it.
"""

import cv2
import numpy as np

SIGMA = 1 / 100  # of the shorter side: lines up to about this wide are found whole
FULL = 0.5  # of the strongest line: from there on a line is white


def apply(pixels: np.ndarray) -> np.ndarray:
    """uint8 (height, width, 3) to the same."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32)
    surroundings = cv2.GaussianBlur(grey, (0, 0), max(2.0, SIGMA * min(grey.shape)))
    darker = np.clip(surroundings - grey, 0, None)
    lines = darker * (255 / max(FULL * float(darker.max()), 8.0))  # 8: noise stays dark
    return cv2.cvtColor(lines.clip(0, 255).astype(np.uint8), cv2.COLOR_GRAY2RGB)
