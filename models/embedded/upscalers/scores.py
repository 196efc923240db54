"""How near an enlarged picture comes to the one that was shrunk: PSNR and SSIM, a table and a sheet."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from models.embedded.drawing import render
from models.embedded.world import Scene, any_scene
from models.images import encode
from models.parts import Upscale
from models.upscaler import Upscaler
from models.upscaler_card import LANCZOS, UpscalerCard

SEED = 99
SIDE = 256  # of the pictures that are to be found again
SHRINKINGS = {"area": Image.Resampling.BOX, "bicubic": Image.Resampling.BICUBIC}
SHOWN = 5
CROP = 96  # pixels around the middle of an edge-rich part, as the sheet shows them


def held_out(count: int) -> list[Image.Image]:
    """Pictures that hold a combination which training never draws."""
    rng = np.random.default_rng(SEED)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = any_scene(rng)
        if scene.held_out:
            scenes.append(scene)
    return [render(scene, rng, size=SIDE) for scene in scenes]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures over all channels, in dB."""
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004): Gaussian windows of sigma 1.5 on luma, averaged over the picture."""
    x, y = (pixels.astype(float) @ (0.299, 0.587, 0.114) for pixels in (a, b))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = (gaussian_filter(v, 1.5, truncate=3.5) for v in (x, y))
    var_x, var_y, cov = (
        gaussian_filter(u * v, 1.5, truncate=3.5) - m
        for u, v, m in ((x, x, mean_x**2), (y, y, mean_y**2), (x, y, mean_x * mean_y))
    )
    likeness = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    return float(np.mean(likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))))


def shrunk(picture: Image.Image, scale: int, by: str) -> bytes:
    """The picture at 1/scale of its size, as PNG."""
    small = picture.resize((picture.width // scale, picture.height // scale), SHRINKINGS[by])
    return encode(np.asarray(small), "png")


def score(upscaler: Upscaler, model: str, scale: int, by: str, pictures: Iterable[Image.Image]) -> tuple[float, float]:
    """(PSNR in dB, SSIM), each the mean over the pictures."""
    found = []
    for picture in pictures:
        enlarged = upscaler.upscale(shrunk(picture, scale, by), Upscale(scale=scale, model=model)).colour
        found.append((psnr(enlarged, np.asarray(picture)), ssim(enlarged, np.asarray(picture))))
    decibels, likeness = np.mean(found, axis=0)
    return float(decibels), float(likeness)


def report(folder: Path, scales: Iterable[int], count: int) -> str:
    """The table in Markdown, for the upscalers of `folder`; writes `sheet.png` there."""
    sources = {f"{scale}x": str(folder / f"{scale}x.safetensors") for scale in scales}
    card = UpscalerCard(names=(LANCZOS, *sources), default=LANCZOS)
    upscaler, pictures = Upscaler(card, sources, device="cpu"), held_out(count)
    lines = ["| factor | shrunk by | | PSNR | SSIM |", "|---|---|---|---|---|"]
    for name in sources:
        scale = int(name.removesuffix("x"))
        for by in SHRINKINGS:
            for model in (LANCZOS, name):
                decibels, likeness = score(upscaler, model, scale, by, pictures)
                title = "Lanczos" if model == LANCZOS else "learned"
                lines.append(f"| {scale} | {by} | {title} | {decibels:.2f} dB | {likeness:.4f} |")
    sheet(upscaler, list(sources), pictures[:SHOWN]).save(folder / "sheet.png", optimize=True)
    return "\n".join(lines)


def sheet(upscaler: Upscaler, models: list[str], pictures: list[Image.Image]) -> Image.Image:
    """For each picture a part of it: as it was, then for each factor shrunk (nearest pixel), Lanczos, learned."""
    at = (SIDE - CROP) // 2 - 24
    box = (at, at, at + CROP, at + CROP)
    rows = []
    for picture in pictures:
        row = [picture.crop(box)]
        for name in models:
            scale = int(name.removesuffix("x"))
            small = shrunk(picture, scale, "area")
            pixels = picture.resize((SIDE // scale, SIDE // scale), Image.Resampling.BOX)
            row.append(pixels.resize(picture.size, Image.Resampling.NEAREST).crop(box))
            for model in (LANCZOS, name):
                enlarged = upscaler.upscale(small, Upscale(scale=scale, model=model)).colour
                row.append(Image.fromarray(enlarged).crop(box))
        rows.append(row)
    canvas = Image.new("RGB", (len(rows[0]) * (CROP + 4) - 4, len(rows) * (CROP + 4) - 4), "white")
    for y, row in enumerate(rows):
        for x, part in enumerate(row):
            canvas.paste(part, (x * (CROP + 4), y * (CROP + 4)))
    return canvas
