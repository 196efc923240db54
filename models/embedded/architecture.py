"""The networks and schedulers of the three embedded models: the originals' classes and block layout, smaller widths."""

from collections.abc import Callable
from dataclasses import dataclass

from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PICTURE_SIZE = 128  # pixels
LATENT_SIZE = PICTURE_SIZE // 8
TEXT_WIDTH = 128

NOISE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# As the originals write it. Every scheduler that reads these files must not clip latents; DDIM's own default would.
LATENT_NOISE = dict(NOISE, clip_sample=False, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What tells one embedded model from the others."""

    name: str
    prediction_type: str
    scaling_factor: float
    text_encoders: int
    scheduler: Callable
    penultimate: bool  # the UNet reads the text encoders' last hidden layer but one


SD15 = Family(
    name="sd15",
    prediction_type="epsilon",
    scaling_factor=0.18215,
    text_encoders=1,
    penultimate=False,
    scheduler=lambda: PNDMScheduler.from_config(LATENT_NOISE),
)
SD21 = Family(
    name="sd21",
    prediction_type="v_prediction",
    scaling_factor=0.18215,
    text_encoders=1,
    penultimate=False,
    scheduler=lambda: DDIMScheduler.from_config(dict(LATENT_NOISE, prediction_type="v_prediction")),
)
SDXL = Family(
    name="sdxl",
    prediction_type="epsilon",
    scaling_factor=0.13025,
    text_encoders=2,
    penultimate=True,
    scheduler=lambda: EulerDiscreteScheduler.from_config(
        dict(LATENT_NOISE, interpolation_type="linear", timestep_spacing="leading", use_karras_sigmas=False)
    ),
)
FAMILIES = {family.name: family for family in (SD15, SD21, SDXL)}


def autoencoder(scaling_factor: float = 1.0) -> AutoencoderKL:
    """The autoencoder that all three share: factor 8, four latent channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=PICTURE_SIZE,
        scaling_factor=scaling_factor,
        force_upcast=True,
    )


def text_encoders(family: Family, tokenizer: CLIPTokenizer) -> list[CLIPTextModel | CLIPTextModelWithProjection]:
    """The family's text encoders, untrained: one CLIP, or for SDXL a second one with a projection."""
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 256,
        "num_hidden_layers": 4 if family.penultimate else 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "projection_dim": TEXT_WIDTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    first = CLIPTextModel(CLIPTextConfig(**config, hidden_act="gelu" if family is SD21 else "quick_gelu"))
    if family.text_encoders == 1:
        return [first]
    return [first, CLIPTextModelWithProjection(CLIPTextConfig(**config, hidden_act="gelu"))]


def unet(family: Family) -> UNet2DConditionModel:
    """The family's denoiser, untrained."""
    return sdxl_unet() if family is SDXL else sd_unet(family)


def sd_unet(family: Family) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's and 2.1's four levels: the same block names and the same number of residuals."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(32, 64, 96, 96),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,  # the number of heads: the field's name in diffusers is a known misnomer
        norm_num_groups=16,
        use_linear_projection=family is SD21,
    )


def sdxl_unet() -> UNet2DConditionModel:
    """Stable Diffusion XL's three levels, with pooled text and time ids beside the timestep."""
    time_id_width = 32
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 80),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 2),
        cross_attention_dim=2 * TEXT_WIDTH,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_id_width,
        projection_class_embeddings_input_dim=6 * time_id_width + TEXT_WIDTH,
    )
