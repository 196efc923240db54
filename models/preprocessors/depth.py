"""Depth, near white and far black, estimated by a DPT or Depth Anything model from a registered local folder.

Sources: arXiv:2103.13413, arXiv:2401.10891. Both estimate inverse depth up to scale: each range is stretched.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import DepthAnythingForDepthEstimation, DPTForDepthEstimation
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

from models.errors import InvalidRequest
from models.preprocessors._estimator import load_estimator

ADVICE = "register the folder of a DPT or Depth Anything model (transformers' layout), or send a depth map with `none`"
KINDS = {"depth_anything": DepthAnythingForDepthEstimation, "dpt": DPTForDepthEstimation}


def load(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The estimator in `folder`: uint8 (height, width, 3) to the same.

    Raises InvalidRequest for another kind of model, for one of metric depth and for weights that are not safetensors.
    """
    network, processor, config = load_estimator(folder, KINDS, DPTImageProcessorPil)
    if config.get("depth_estimation_type", "relative") != "relative":
        raise InvalidRequest("preprocessor", f"{folder} estimates metric depth; ControlNets want relative depth")

    @torch.inference_mode()
    def apply(pixels: np.ndarray) -> np.ndarray:
        inputs = processor(images=pixels, input_data_format="channels_last", return_tensors="pt")
        [estimate] = processor.post_process_depth_estimation(network(**inputs), target_sizes=[pixels.shape[:2]])
        depth = estimate["predicted_depth"].numpy()
        spread = max(float(depth.max() - depth.min()), 1e-6)
        grey = ((depth - depth.min()) * (255 / spread)).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, -1)

    return apply
