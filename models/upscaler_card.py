"""UpscalerCard: which upscalers there are, and what they take and give. No torch."""

from dataclasses import dataclass

from models import limits
from models.errors import InvalidRequest, NotFound
from models.images import ImageFormat, check_transparency, inspect
from models.parts import Upscale

LANCZOS = "lanczos"  # always there, and needs no weights


@dataclass(frozen=True, kw_only=True)
class UpscalerCard:
    """The upscalers by name, the one that is used when none is named, the largest pictures in and out, in pixels.

    `models` are the models that make pictures larger: POST /v1/upscale takes their names too, and they have limits of
    their own.
    """

    names: tuple[str, ...] = (LANCZOS,)
    default: str = LANCZOS
    models: tuple[str, ...] = ()
    max_input_pixels: int = 16 * 1024 * 1024
    max_output_pixels: int = 64 * 1024 * 1024

    def resolve(self, wanted: Upscale, prefix: str = "") -> Upscale:
        """The same with the model's name filled in; `prefix` stands before the name of a field that is at fault.

        Raises InvalidRequest for a scale out of range and for a model, which needs a request of its own, and NotFound
        listing the upscalers there are.
        """
        limits.UPSCALE.check(f"{prefix}scale", wanted.scale)
        model = self.default if wanted.model is None else wanted.model
        if model in self.models:
            allowed = f"must be one of {', '.join(self.names)}; {model} draws: send it the picture by POST /v1/upscale"
            raise InvalidRequest(f"{prefix}model", allowed)
        if model not in self.names:
            there_are = ", ".join((*self.names, *self.models))
            raise NotFound(f"there is no upscaler {model!r}; the upscalers are: {there_are}")
        return Upscale(scale=wanted.scale, model=model)

    def check(self, encoded: bytes, scale: float, format: ImageFormat | None = None) -> None:
        """Raises InvalidRequest for a picture that cannot be enlarged, or not in that format: by its header alone."""
        seen = inspect(encoded)
        self.check_input(seen.width, seen.height)
        self.enlarged(seen.width, seen.height, scale)
        if format is not None and seen.transparent:
            check_transparency(format)

    def check_input(self, width: int, height: int, field: str = "image") -> None:
        """Raises InvalidRequest, naming `field`, for a picture that is too large to begin with."""
        if width * height > self.max_input_pixels:
            allowed = f"at most {self.max_input_pixels} pixels can be enlarged"
            raise InvalidRequest(field, f"{width}x{height} is too large: {allowed}")

    def enlarged(self, width: int, height: int, scale: float, prefix: str = "") -> tuple[int, int]:
        """The size after enlargement: `scale` times each side, rounded. Raises InvalidRequest where it is too large."""
        size = max(1, round(width * scale)), max(1, round(height * scale))
        if size[0] * size[1] > self.max_output_pixels:
            raise InvalidRequest(
                f"{prefix}scale",
                f"{scale:g} makes {size[0]}x{size[1]} of {width}x{height}; allowed: {self.max_output_pixels} pixels",
            )
        return size
