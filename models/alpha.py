"""Pictures that may be transparent: colour and alpha apart, so that each can be worked on, and together. No torch.

`Picture` is RGB; this is for the one place that gives transparency back, the upscaler.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import distance_transform_edt

from models import exif, png
from models.decoding import decoded
from models.images import ImageFormat, check_transparency, encode


@dataclass(frozen=True, eq=False)
class Layers:
    """A picture's colour, uint8 (height, width, 3), and its alpha, uint8 (height, width), where it has one."""

    colour: np.ndarray
    alpha: np.ndarray | None

    @classmethod
    def read(cls, encoded: bytes) -> "Layers":
        """Decodes a picture as `Picture.from_bytes` does, with its refusals, but keeps its alpha.

        A pixel that nobody sees gets the colour of the nearest one that is seen: whatever the file hides there would
        come out as a fringe once it is mixed with its neighbours.
        """
        with decoded(encoded, "image") as (rgb, transparency):
            colour = np.array(rgb)
            alpha = None if transparency is None else np.array(transparency)
        if alpha is not None and alpha.any() and not alpha.all():
            rows, columns = np.asarray(distance_transform_edt(alpha == 0, return_distances=False, return_indices=True))
            colour = colour[rows, columns]
        return cls(colour, alpha)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        height, width, _ = self.colour.shape
        return width, height

    def encode(self, format: ImageFormat, text: Mapping[str, str] | None = None) -> bytes:
        """As `models.images.encode`. Raises InvalidRequest where the picture is transparent and the format never is."""
        if self.alpha is None:
            return encode(self.colour, format, text)
        check_transparency(format)
        rgba = np.dstack([self.colour, self.alpha])
        if format == "png":
            return png.write(rgba, text)
        buffer = io.BytesIO()
        block = exif.write(text) if text else b""
        options = {"webp": {"quality": 90, "method": 0}, "avif": {"quality": 80, "speed": 9, "max_threads": 1}}[format]
        Image.fromarray(rgba).save(buffer, format.upper(), exif=block, **options)
        return buffer.getvalue()
