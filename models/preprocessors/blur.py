"""A Gaussian blur, for ControlNets that invent the detail of a soft picture."""

import cv2
import numpy as np

SIGMA = 1 / 64  # of the shorter side


def apply(pixels: np.ndarray) -> np.ndarray:
    """uint8 (height, width, 3) to the same."""
    return cv2.GaussianBlur(pixels, (0, 0), max(0.5, SIGMA * min(pixels.shape[:2])))
