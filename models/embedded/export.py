"""A trained model written as the folder that diffusers and the engine load: fp16 safetensors, the originals' names."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models.embedded.architecture import Family


def export(
    family: Family,
    folder: Path,
    *,
    tokenizers: list[CLIPTokenizer],
    text_encoders: list[CLIPTextModel | CLIPTextModelWithProjection],
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
) -> None:
    """Replaces `folder` with the model in fp16; a reader sees the old folder or the new one, never half of one."""
    networks = {"vae": vae, "unet": unet, "scheduler": family.scheduler()}
    if family.text_encoders == 1:
        pipeline = StableDiffusionPipeline(
            **networks,
            tokenizer=tokenizers[0],
            text_encoder=text_encoders[0],
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    else:
        pipeline = StableDiffusionXLPipeline(
            **networks,
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            text_encoder=text_encoders[0],
            text_encoder_2=text_encoders[1],
            add_watermarker=False,
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        written = Path(temporary) / folder.name
        pipeline.to(torch.float16).save_pretrained(written)
        for name, tokenizer in zip(("tokenizer", "tokenizer_2"), tokenizers, strict=False):
            write_slow_tokenizer_files(tokenizer, written / name)
        forget_where_it_was_made(written)
        for path in written.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors leaves them to the owner alone
        if folder.exists():
            folder.rename(Path(temporary) / "replaced")
        shutil.move(written, folder)


def write_slow_tokenizer_files(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """vocab.json and merges.txt, as in the originals: transformers 5 writes only tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(tokenizer.get_vocab(), ensure_ascii=False))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def forget_where_it_was_made(folder: Path) -> None:
    """Drops the paths that save_pretrained leaves in the configurations."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
