"""The layout Stable Diffusion was first published in, written from a folder: diffusers' conversion inverted."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

# Pairs of (diffusers, original), applied in order.
RESNET = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
]
UNET_ENDS = [
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
]
VAE = [
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda match: f"up.{3 - int(match[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda match: f"up.{3 - int(match[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"group_norm|conv_norm_out", lambda match: "norm" if match[0] == "group_norm" else "norm_out"),
    (r"to_out\.0", "proj_out"),
    (r"to_([qkv])\.", r"\1."),
    (r"conv_shortcut", "nin_shortcut"),
]
OPEN_CLIP = [
    (r"encoder\.layers\.", "transformer.resblocks."),
    (r"layer_norm([12])", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn", "attn"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"embeddings\.token_embedding", "token_embedding"),
    (r"final_layer_norm", "ln_final"),
    (r"text_projection\.weight", "text_projection"),
]


def save_single_file(folder: Path, file: Path) -> None:
    """Writes the diffusers folder's networks as one file in the original layout."""
    tensors = unet(read(folder / "unet")) | vae(read(folder / "vae"))
    if (folder / "text_encoder_2").exists():
        tensors |= clip(read(folder / "text_encoder"), "conditioner.embedders.0.transformer.text_model.")
        tensors |= open_clip(read(folder / "text_encoder_2"), "conditioner.embedders.1.model.")
    elif '"gelu"' in (folder / "text_encoder" / "config.json").read_text():
        tensors |= open_clip(read(folder / "text_encoder"), "cond_stage_model.model.")
    else:
        tensors |= clip(read(folder / "text_encoder"), "cond_stage_model.transformer.text_model.")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def read(folder: Path) -> Tensors:
    return load_file(next(folder.glob("*.safetensors")))


def renamed(name: str, pairs: list) -> str:
    for old, new in pairs:
        name = re.sub(old, new, name)
    return name


def unet(tensors: Tensors, layers: int = 2) -> Tensors:
    """Blocks become one numbered row of inputs and one of outputs."""

    def original(name: str) -> str:
        ends = re.match(r"(time_embedding|add_embedding|conv_in|conv_norm_out|conv_out)\b", name)
        if ends:
            return renamed(name, [(f"^{old}", new) for old, new in UNET_ENDS])
        side, block, kind, layer, rest = re.fullmatch(
            r"(down|mid|up)_blocks?\.?(\d*)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name
        ).groups()
        block, layer = int(block or 0), int(layer)
        rest = renamed(rest, RESNET) if kind == "resnets" else rest
        if side == "mid":
            return f"middle_block.{2 * layer if kind == 'resnets' else 1}.{rest}"
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.{rest.replace('conv', 'op')}"
        if kind == "upsamplers":
            attends = any(name.startswith(f"up_blocks.{block}.attentions") for name in tensors)
            return f"output_blocks.{block * (layers + 1) + layers}.{2 if attends else 1}.{rest}"
        row, start = ("input", 1) if side == "down" else ("output", 0)
        return f"{row}_blocks.{start + block * (layers + 1) + layer}.{0 if kind == 'resnets' else 1}.{rest}"

    return {f"model.diffusion_model.{original(name)}": tensor for name, tensor in tensors.items()}


def vae(tensors: Tensors) -> Tensors:
    """The attention's linear layers were 1x1 convolutions."""
    changed = {renamed(name, VAE): tensor for name, tensor in tensors.items()}
    convolved = re.compile(r".*attn_1\.(q|k|v|proj_out)\.weight")
    return {
        f"first_stage_model.{name}": tensor[:, :, None, None] if convolved.fullmatch(name) else tensor
        for name, tensor in changed.items()
    }


def clip(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


def open_clip(tensors: Tensors, prefix: str) -> Tensors:
    """Query, key and value were one matrix, and the projection was its transpose."""
    changed = {renamed(name.removeprefix("text_model."), OPEN_CLIP): tensor for name, tensor in tensors.items()}
    for name in [name for name in changed if ".q_proj." in name]:
        parts = [changed.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        changed[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    if "text_projection" in changed:
        changed["text_projection"] = changed["text_projection"].T
    return {prefix + name: tensor for name, tensor in changed.items()}
