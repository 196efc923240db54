"""Thick white strokes along the edges, as somebody would scribble them."""

import cv2
import numpy as np

from models.preprocessors import canny

STROKE = 1 / 128  # of the shorter side


def apply(pixels: np.ndarray) -> np.ndarray:
    """uint8 (height, width, 3) to the same."""
    side = 2 * max(1, round(STROKE * min(pixels.shape[:2]))) + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    return cv2.dilate(canny.apply(cv2.GaussianBlur(pixels, (0, 0), 1.0)), disc)
