"""Decoded pictures become bytes in one place, or a typed failure."""

import numpy as np
import pytest

from models.autoencoder import to_bytes
from models.errors import GenerationFailed


def test_pixels_are_rounded_to_the_nearest_of_256():
    pixels = np.array([0, 0.4 / 255, 0.6 / 255, 254.4 / 255, 1], np.float32)
    array = to_bytes(np.broadcast_to(pixels, (3, 2, 5)))
    assert (array.shape, array.dtype) == ((2, 5, 3), np.uint8)
    assert array[1, :, 2].tolist() == [0, 0, 1, 254, 255]


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_is_no_picture(wrong):
    pixels = np.full((3, 8, 8), 0.5, np.float32)
    pixels[1, 2, 3] = wrong
    with pytest.raises(GenerationFailed) as failed:
        to_bytes(pixels)
    assert failed.value.reason == "nan_latents"
