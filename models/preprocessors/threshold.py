"""Black and white, split where the two classes of brightness differ most (Otsu, 1979)."""

import cv2
import numpy as np


def apply(pixels: np.ndarray) -> np.ndarray:
    """uint8 (height, width, 3) to the same."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    return cv2.cvtColor(cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[1], cv2.COLOR_GRAY2RGB)
