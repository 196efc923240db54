"""The pose of one person as OpenPose draws it, estimated by a ViTPose model from a registered local folder.

Sources: arXiv:2204.12484 (ViTPose, whose 17 keypoints are COCO's), arXiv:1812.08008 (OpenPose, whose body has 18). The
whole picture is taken for the person's box: one person, well in the picture. For more, send a drawn pose with `none`.
"""

import colorsys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from transformers import VitPoseForPoseEstimation
from transformers.models.vitpose.image_processing_pil_vitpose import VitPoseImageProcessorPil

from models.errors import InvalidRequest
from models.preprocessors._estimator import load_estimator

ADVICE = "register the folder of a ViTPose model (transformers' layout), or send a drawn pose with `none`"
KINDS = {"vitpose": VitPoseForPoseEstimation}
SURE = 0.3  # the score from which a keypoint is drawn
THICKNESS = 1 / 128  # of the shorter side

# OpenPose's keypoints: nose, neck, right arm, left arm, right leg, left leg, eyes, ears. In COCO's numbers.
COCO = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
SHOULDERS = (5, 6)
LIMBS = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7)),
    *((1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)),
    *((1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),
)
COLOURS = [tuple(round(255 * part) for part in colorsys.hsv_to_rgb(i / len(COCO), 1, 1)) for i in range(len(COCO))]


def load(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The estimator in `folder`: uint8 (height, width, 3) to the same.

    Raises InvalidRequest for another kind of model and for weights that are not safetensors.
    """
    network, processor, config = load_estimator(folder, KINDS, VitPoseImageProcessorPil)
    if config["backbone_config"].get("num_experts", 1) > 1:
        raise InvalidRequest("preprocessor", f"{folder} is a ViTPose+ of several experts; give a plain ViTPose")

    @torch.inference_mode()
    def apply(pixels: np.ndarray) -> np.ndarray:
        height, width, _ = pixels.shape
        boxes = [[[0.0, 0.0, float(width), float(height)]]]
        inputs = processor(pixels, boxes=boxes, input_data_format="channels_last", return_tensors="pt")
        [[person]] = processor.post_process_pose_estimation(network(**inputs), boxes=boxes)
        return draw(person["keypoints"].numpy(), person["scores"].numpy(), width, height)

    return apply


def draw(keypoints: np.ndarray, scores: np.ndarray, width: int, height: int) -> np.ndarray:
    """COCO's 17 keypoints (x, y) in pixels as a skeleton on black, uint8 (height, width, 3), but for unsure ones."""
    picture = np.zeros((height, width, 3), np.uint8)
    thickness = max(1, round(THICKNESS * min(width, height)))
    points: dict[int, tuple[int, int]] = {}
    for i, coco in enumerate(COCO):
        sources = SHOULDERS if coco is None else (coco,)
        if min(scores[s] for s in sources) >= SURE:
            x, y = np.mean([keypoints[s] for s in sources], 0)
            points[i] = round(float(x)), round(float(y))
    for (a, b), colour in zip(LIMBS, COLOURS, strict=False):
        if a in points and b in points:
            cv2.line(picture, points[a], points[b], [0.6 * part for part in colour], 2 * thickness, cv2.LINE_AA)
    for i, point in points.items():
        cv2.circle(picture, point, thickness, COLOURS[i], -1, cv2.LINE_AA)
    return picture
