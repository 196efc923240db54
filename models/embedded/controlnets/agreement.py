"""The score: how well a picture's edges agree with the hint it was drawn for, with and without the ControlNet."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline
from PIL import Image
from rich.progress import track

from models.embedded.captions import plain_caption
from models.embedded.controlnets.gallery import moved
from models.embedded.drawing import render
from models.embedded.evaluate import BATCH, SEED, contact_sheet, drawn, held_out_scenes, pipeline, round_trip
from models.embedded.scoring import score
from models.embedded.world import Scene
from models.preprocessors.canny import apply as canny

TOLERANCE = 2  # pixels
STEPS = 15
GUIDANCE = 5.0
KINDS = ("one object", "two objects")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A held-out scene at a place that its caption does not tell, the picture of it, and that picture's edges."""

    scene: Scene
    picture: Image.Image
    hint: Image.Image


def questions(kind: str, n: int) -> list[Question]:
    """The first n of that kind."""
    rng = np.random.default_rng([SEED, 7, KINDS.index(kind)])
    asked = []
    for scene in held_out_scenes(kind, n):
        scene = moved(scene, rng)
        picture = render(scene, rng)
        asked.append(Question(scene=scene, picture=picture, hint=edges(picture)))
    return asked


def edges(picture: Image.Image) -> Image.Image:
    """Its Canny edges, white on black."""
    return Image.fromarray(canny(np.asarray(picture)))


def agreement(picture: Image.Image, hint: Image.Image) -> float:
    """F1 of the picture's edges against the hint's, an edge counting as found within TOLERANCE pixels."""
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * TOLERANCE + 1, 2 * TOLERANCE + 1))
    found, wanted = (np.asarray(image)[..., 0] > 127 for image in (edges(picture), hint))
    near_found, near_wanted = (cv2.dilate(mask.astype(np.uint8), disc) > 0 for mask in (found, wanted))
    if not found.any() or not wanted.any():
        return float(found.any() == wanted.any())
    precision, recall = near_wanted[found].mean(), near_found[wanted].mean()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def controlled(pipe, net: ControlNetModel, asked: list[Question]) -> list[Image.Image]:
    """One picture for each question, with the seeds that `drawn` gives them."""
    xl = hasattr(pipe, "text_encoder_2")
    kind = StableDiffusionXLControlNetPipeline if xl else StableDiffusionControlNetPipeline
    more = {"add_watermarker": False} if xl else {"requires_safety_checker": False}
    pipe = kind(**pipe.components, controlnet=net, **more)
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for first in track(range(0, len(asked), BATCH), description="controlled", transient=True):
        some = asked[first : first + BATCH]
        pictures += pipe(
            [plain_caption(question.scene) for question in some],
            image=[question.hint for question in some],
            guidance_scale=GUIDANCE,
            num_inference_steps=STEPS,
            generator=[torch.Generator().manual_seed(SEED + first + i) for i in range(len(some))],
        ).images
    return pictures


def publish(models: Path, out: Path, scenes: int) -> None:
    """Scores the ControlNets in `out` on that many scenes of each kind: prints the table, writes `sheet.jpg`."""
    lines = [
        "| model | scenes (n) | F1 without | with | ceiling | all objects right without | with |",
        "|---|---|---|---|---|---|---|",
    ]
    rows: list[list[Image.Image]] = []
    for folder in sorted(out.glob("canny-*")):
        name = folder.name.removeprefix("canny-")
        pipe = pipeline(models / name)
        net = ControlNetModel.from_pretrained(folder, dtype=torch.float32).eval()
        for kind in KINDS:
            asked = questions(kind, scenes)
            told = [question.scene for question in asked]
            without = drawn(pipe, told, guidance_scale=GUIDANCE, steps=STEPS)
            steered = controlled(pipe, net, asked)
            trips = [round_trip(pipe.vae, question.picture) for question in asked]
            lines.append(f"| `{name}` | {kind} ({scenes}) | {summary(asked, without, steered, trips)} |")
            rows += [[question.hint for question in asked], without, steered]
    print("\n".join(lines))
    contact_sheet(rows).save(out / "sheet.jpg", quality=88)


def summary(
    asked: list[Question], without: list[Image.Image], steered: list[Image.Image], trips: list[Image.Image]
) -> str:
    """The row's numbers: mean F1 of the three, then how often colours, shapes, background and number are right."""
    cells = [
        f"{np.mean([agreement(picture, question.hint) for picture, question in zip(pictures, asked, strict=True)]):.3f}"
        for pictures in (without, steered, trips)
    ]
    for pictures in (without, steered):
        right = [score(picture, question.scene)["all"] for picture, question in zip(pictures, asked, strict=True)]
        cells.append(f"{100 * np.mean(right):.0f} %")
    return " | ".join(cells)
