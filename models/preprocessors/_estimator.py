"""Loading for the preprocessors that need a network: transformers' layout, safetensors only, on the CPU."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from models.errors import InvalidRequest
from models.weights import check_safetensors, component_files, from_folder, read_json, refusing


def load_estimator(folder: Path, kinds: Mapping[str, type], processor: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The network in `folder`, what prepares its pictures, and its configuration; `kinds` are classes by model type.

    Raises InvalidRequest for a model of another type, and for weights that are not safetensors or incomplete.
    """
    config = read_json(folder / "config.json")
    kind = kinds.get(config.get("model_type", ""))
    if kind is None:
        raise InvalidRequest("preprocessor", f"{folder} holds no model of a type used here: {', '.join(kinds)}")
    for file in component_files(folder, kind):
        check_safetensors(file)
    network = from_folder(folder, kind, torch.device("cpu"), torch.float32).eval()
    with refusing(folder):
        return network, processor.from_pretrained(folder, local_files_only=True), config
