"""Full-size networks with random weights: the real configurations, the classes' own initialisers, nothing downloaded.

Timing dense mathematics needs shapes and finite activations, not training. Zeros would not do: they run faster. The
tiny ones are the embedded models' untrained, for trying the scripts where there is no GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from models.embedded import architecture
from models.embedded.tokenizer import tokenizer
from models.weights import Components

TOKENS = 77
_SD_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
}
_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


@dataclass(frozen=True, kw_only=True)
class Network:
    """A model's shape. `embedded` names the embedded model of the same kind; `parameters` are the real UNet's. `other`
    is the side that pictures have where sizes are mixed."""

    name: str
    family: str
    embedded: str
    side: int
    other: int
    parameters: int
    scaling_factor: float
    unet: Mapping[str, Any]
    text: tuple[Mapping[str, Any], ...]


SD15 = Network(
    name="sd15",
    family="sd",
    embedded="sd15",
    side=512,
    other=768,
    parameters=859_520_964,
    scaling_factor=0.18215,
    unet={**_SD_BLOCKS, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    text=({**_CLIP_L, "hidden_act": "quick_gelu", "projection_dim": 768},),
)
SD21 = Network(
    name="sd21",
    family="sd",
    embedded="sd21",
    side=768,
    other=512,
    parameters=865_910_724,
    scaling_factor=0.18215,
    unet={
        **_SD_BLOCKS,
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    text=({**_CLIP_H, "hidden_act": "gelu", "projection_dim": 512},),
)
SDXL = Network(
    name="sdxl",
    family="sdxl",
    embedded="sdxl",
    side=1024,
    other=768,
    parameters=2_567_463_684,
    scaling_factor=0.13025,
    unet={
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "sample_size": 128,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    text=(
        {**_CLIP_L, "hidden_act": "quick_gelu", "projection_dim": 768},
        {**_CLIP_G, "hidden_act": "gelu", "projection_dim": 1280},
    ),
)
NETWORKS: Mapping[str, Network] = {n.name: n for n in (SD15, SD21, SDXL)}


def build(network: Network, device: torch.device, tiny: bool, seed: int = 0) -> Components:
    """The model in memory, float32, every weight one that bfloat16 can hold, so that precisions can be compared."""
    family = architecture.FAMILIES[network.embedded]
    words = tokenizer()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        encoders = architecture.text_encoders(family, words) if tiny else _text_encoders(network, words)
        modules: dict[str, Any] = {
            "unet": architecture.unet(family) if tiny else unet(network),
            "vae": architecture.autoencoder(network.scaling_factor) if tiny else autoencoder(network),
        }
    for suffix, encoder in zip(("", "_2"), encoders, strict=False):
        modules |= {f"text_encoder{suffix}": encoder, f"tokenizer{suffix}": words}
    for name, module in modules.items():
        if not name.startswith("tokenizer"):
            _round(module.eval().requires_grad_(False))
    return Components(
        modules=modules, scheduler_config=dict(family.scheduler().config), index={}, revision=f"random-{seed}"
    )


def unet(network: Network) -> UNet2DConditionModel:
    return UNet2DConditionModel(**network.unet)


def autoencoder(network: Network) -> AutoencoderKL:
    return AutoencoderKL(**_VAE, sample_size=network.side, scaling_factor=network.scaling_factor)


def _text_encoders(network: Network, words: Any) -> list[Any]:
    """The second encoder of two has a projection; the embedded tokenizer's ids are the first of CLIP's many."""
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.eos_token_id}
    configs = [CLIPTextConfig(vocab_size=49408, max_position_embeddings=TOKENS, **c, **ends) for c in network.text]
    return [CLIPTextModel(configs[0]), *(CLIPTextModelWithProjection(config) for config in configs[1:])]


def _round(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16().float()


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations, two for a multiply-add: of one row of the UNet, and of decoding one picture."""

    row: int
    decode: int

    def picture(self, steps: int) -> int:
        """A picture with guidance; the text encoders are below a hundredth of it."""
        return 2 * steps * self.row + self.decode

    @classmethod
    def count(cls, modules: Mapping[str, Any], side: int) -> "Flops":
        """Counted on meta tensors: nothing is computed."""
        with torch.device("meta"):
            decoder = type(modules["vae"]).from_config(modules["vae"].config)
            latents = torch.empty(1, 4, side // 8, side // 8)
        return cls(
            row=_counted(lambda: forward_on_meta(modules["unet"], side)),
            decode=_counted(lambda: decoder.decode(latents)),
        )


def forward_on_meta(unet: Any, side: int) -> None:
    """One row's forward by a UNet like this, of tensors that are nowhere: for whoever listens to what it calls."""
    with torch.device("meta"), torch.no_grad():
        denoiser = type(unet).from_config(unet.config)
        config, added = denoiser.config, {}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            added = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        context = torch.empty(1, TOKENS, config.cross_attention_dim)
        denoiser(torch.empty(1, 4, side // 8, side // 8), torch.empty(1), context, added_cond_kwargs=added)


def _counted(call: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
