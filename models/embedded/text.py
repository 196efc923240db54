"""The second stage: text encoders taught, on captions alone, to say what stands where in the picture.

The originals' encoders come to the UNet already trained, by contrast with pictures; these come trained to fill in a
map. Binding ("which one is red") and relations are then in the text states before the UNet starts.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models.embedded import architecture
from models.embedded.architecture import LATENT_SIZE, SD15, SDXL, TEXT_WIDTH, Family
from models.embedded.captions import caption
from models.embedded.drawing import labels
from models.embedded.tokenizer import CONTEXT, tokenizer
from models.embedded.training import Dice, Plan, train
from models.embedded.world import COLOURS, PATTERNS, SHAPES, STYLES, Scene, training_scene

MAP = LATENT_SIZE // 2  # cells along one side of the map
SHORT = 32  # tokens: longer than any caption of the grammar


@cache
def tokenizers(family: Family) -> list[CLIPTokenizer]:
    """One for each text encoder, with the originals' padding."""
    if family is SDXL:
        return [tokenizer(), tokenizer(padding="!")]
    return [tokenizer() if family is SD15 else tokenizer(padding="!")]


class Reader(nn.Module):
    """The text encoders and their lesson: positions of a map ask the text, as the UNet's will, what stands there."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.penultimate = family.penultimate
        self.encoders = nn.ModuleList(architecture.text_encoders(family, tokenizers(family)[0]))
        width = TEXT_WIDTH * family.text_encoders
        self.positions = nn.Parameter(torch.randn(MAP * MAP, width) * 0.5)
        self.attention = nn.MultiheadAttention(width, 8, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU())
        self.colours = nn.Linear(256, len(COLOURS))
        self.shapes = nn.Linear(256, 1 + len(SHAPES))
        self.adornments = nn.Linear(TEXT_WIDTH, 1 + len(PATTERNS) + len(STYLES))
        self.pooled_colours = nn.Linear(TEXT_WIDTH, 2 * len(COLOURS))

    def forward(self, tokens: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits of each cell's colour and shape, of the pattern or style, and of background and first colour."""
        states, pooled = encode(self.encoders, tokens, penultimate=self.penultimate)
        asked = self.positions.expand(len(states), -1, -1)
        read = self.mlp(asked + self.attention(asked, states, states, need_weights=False)[0])
        return self.colours(read), self.shapes(read), self.adornments(pooled), self.pooled_colours(pooled)


Encoder = CLIPTextModel | CLIPTextModelWithProjection


def encode(encoders: list[Encoder], tokens: list[Tensor], *, penultimate: bool) -> tuple[Tensor, Tensor]:
    """What the UNet reads: states (rows, tokens, width), and the pooled text of the last encoder (rows, width)."""
    outputs = [
        encoder(input_ids=ids, output_hidden_states=penultimate) for encoder, ids in zip(encoders, tokens, strict=True)
    ]
    states = [output.hidden_states[-2] if penultimate else output.last_hidden_state for output in outputs]
    last = outputs[-1]
    pooled = last.text_embeds if hasattr(last, "text_embeds") else last.pooler_output
    return torch.cat(states, -1), pooled


def tokenise(family_tokenizers: list[CLIPTokenizer], captions: list[str], length: int = CONTEXT) -> list[Tensor]:
    """(rows, length) of token ids for each tokenizer."""
    options = {"padding": "max_length", "truncation": True, "max_length": CONTEXT, "return_tensors": "pt"}
    return [tokenizer(captions, **options).input_ids[:, :length] for tokenizer in family_tokenizers]


def train_text_encoders(
    family: Family, plan: Plan, *, batch: int, start: Reader | None = None, folder: Path, device: torch.device
) -> Reader:
    """Cross-entropy over the map's cells and the words for the whole picture."""
    torch.manual_seed(plan.seed)
    reader = Reader(family)
    if start is not None:
        for encoder in reader.encoders:
            begin_as(encoder, start.encoders[0])
    reading = tokenizers(family)

    def loss(step: int, dice: Dice) -> Tensor:
        scenes = [training_scene(dice.numpy) for _ in range(batch)]
        captions = [caption(scene, dice.numpy) for scene in scenes]
        # Most lessons are short for speed; every fourth has the UNet's full context, padding included.
        tokens = tokenise(reading, captions, CONTEXT if step % 4 == 3 else SHORT)
        answers = [answer.to(device) for answer in right_answers(scenes)]
        cross_entropy = nn.functional.cross_entropy
        colours, shapes, adornments, pooled = reader([ids.to(device) for ids in tokens])
        cells = cross_entropy(colours.mT, answers[0]) + cross_entropy(shapes.mT, answers[1])
        ground, first = pooled.chunk(2, -1)
        whole = cross_entropy(adornments, answers[2]) + cross_entropy(ground, answers[3])
        return cells + 0.1 * (whole + cross_entropy(first, answers[4]))

    return train(reader, plan, loss, folder=folder, device=device)


def begin_as(encoder: Encoder, trained: Encoder) -> None:
    """Copies the trained encoder's weights wherever the names agree; a deeper encoder keeps its further layers."""

    def bare(name: str) -> str:
        return name.removeprefix("text_model.")

    weights = {bare(name): tensor for name, tensor in trained.state_dict().items()}
    own = encoder.state_dict()
    encoder.load_state_dict(own | {name: weights[bare(name)] for name in own if bare(name) in weights})


def right_answers(scenes: list[Scene]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Class numbers: (rows, cells) of colours, (rows, cells) of shapes, adornment, background, first colour."""
    maps = torch.from_numpy(np.stack([labels(scene, MAP) for scene in scenes])).long().flatten(2)
    adornments = ["", *PATTERNS, *STYLES]
    colours = list(COLOURS)
    adornment = torch.tensor([adornments.index(scene.pattern or scene.style) for scene in scenes])
    ground = torch.tensor([colours.index(scene.background) for scene in scenes])
    first = torch.tensor([colours.index(scene.things[0].colour) for scene in scenes])
    return maps[:, 0], maps[:, 1], adornment, ground, first
