"""Small upscaling models as diffusers saves them: the published ones' classes and wiring, untrained weights."""

import shutil
from pathlib import Path

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionLatentUpscalePipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

EMBEDDED = Path(__file__).resolve().parents[2] / "models" / "embedded"
WIDTH = 32  # of the text encoder
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PIPELINES = {"sd_x2": StableDiffusionLatentUpscalePipeline, "sd_x4": StableDiffusionUpscalePipeline}


def save(family: str, folder: Path, **options: object) -> Path:
    """Writes a model of a family into a folder; `options` are of the UNet."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "sd15" / "tokenizer")
    common = {"tokenizer": tokenizer, "text_encoder": text_encoder(tokenizer)}
    networks = x4(**options) if family == "sd_x4" else x2(**options)
    PIPELINES[family](**common, **networks).save_pretrained(folder, safe_serialization=True)
    return folder


def pipeline(family: str, folder: Path) -> diffusers.DiffusionPipeline:
    """The model by diffusers."""
    pipe = PIPELINES[family].from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def spoiled(folder: Path, copy: Path, old: str, new: str) -> Path:
    """A copy of a model whose UNet's configuration says something else."""
    shutil.copytree(folder, copy)
    config = copy / "unet" / "config.json"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    return copy


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=37,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def autoencoder(levels: int, scaling_factor: float) -> AutoencoderKL:
    """Its decoder is turned up: untrained it would draw next to nothing."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(16, 32, 32, 32)[:levels],
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=scaling_factor,
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(4)
    return vae


def x4(**options: object) -> dict[str, object]:
    config: dict[str, object] = {
        "sample_size": 16,
        "in_channels": 7,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        "block_out_channels": (32, 32, 64, 64),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 16,
        "only_cross_attention": (True, True, True, False),
        "use_linear_projection": True,
        "num_class_embeds": 1000,
    }
    betas = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
    return {
        "unet": UNet2DConditionModel(**config | options),
        "vae": autoencoder(3, 0.08333),
        "scheduler": DDIMScheduler(
            **betas, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        "low_res_scheduler": DDPMScheduler(**betas),
    }


def x2(**options: object) -> dict[str, object]:
    config: dict[str, object] = {
        "sample_size": 16,
        "in_channels": 8,
        "out_channels": 5,
        "down_block_types": ("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
        "up_block_types": (*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
        "mid_block_type": None,
        "block_out_channels": (32, 32, 64, 64),
        "layers_per_block": 2,
        "act_fn": "gelu",
        "attention_head_dim": 8,
        "norm_num_groups": None,
        "conv_in_kernel": 1,
        "conv_out_kernel": 1,
        "cross_attention_dim": WIDTH,
        "only_cross_attention": False,
        "resnet_time_scale_shift": "scale_shift",
        "time_embedding_type": "fourier",
        "timestep_post_act": "gelu",
        "time_cond_proj_dim": 128 + WIDTH,
    }
    return {
        "unet": UNet2DConditionModel(**config | options),
        "vae": autoencoder(4, 0.18215),
        "scheduler": EulerDiscreteScheduler(**BETAS, prediction_type="sample"),
    }
