"""Soft outlines, white on black: the strength of the gradient, for scribble and soft-edge ControlNets."""

import cv2
import numpy as np

FULL = 0.5  # of the strongest outline: from there on an outline is white


def apply(pixels: np.ndarray) -> np.ndarray:
    """uint8 (height, width, 3) to the same; in each pixel the channel of the steepest gradient decides."""
    smooth = cv2.GaussianBlur(pixels, (0, 0), 1.5).astype(np.float32)
    steepness = np.hypot(cv2.Scharr(smooth, cv2.CV_32F, 1, 0), cv2.Scharr(smooth, cv2.CV_32F, 0, 1)).max(-1)
    outlines = steepness * (255 / max(FULL * float(steepness.max()), 64.0))  # 64: noise stays dark
    return cv2.cvtColor(outlines.clip(0, 255).astype(np.uint8), cv2.COLOR_GRAY2RGB)
