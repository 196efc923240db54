"""CLIP's text encoders over chunks: hidden states, emphasis, and words that are no words of theirs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from models.family import Encoding
from models.tokens import Chunk

_TOGETHER = 32  # chunks in one call
_BACK = 2.0  # times at most that a mean is put back by


def widths(*models: Any) -> tuple[int, ...]:
    """The width of each encoder's token embeddings."""
    return tuple(model.get_input_embeddings().weight.shape[1] for model in models)


def most_skipped(last: int, *models: Any) -> int:
    """How many layers can be left out of each, so that one remains, where `last` from the end is where none is."""
    return min(model.config.num_hidden_layers for model in models) - last


def hidden_states(
    model: Any, chunks: Sequence[Chunk], last: int, encoding: Encoding
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each chunk's hidden state, (chunks, tokens, width), of the layer that is `last` from the end where none is left
    out; and the pooled one, (chunks, width), projected where the model does that."""
    states, pooled = [], []
    for start in range(0, len(chunks), _TOGETHER):
        some = chunks[start : start + _TOGETHER]
        ids = torch.tensor([chunk.ids for chunk in some], device=model.get_input_embeddings().weight.device)
        with _own_words(model, some), encoding([chunk.loras for chunk in some]):
            output = model(ids, output_hidden_states=True)
        states += [output.hidden_states[-(last + chunk.clip_skip)][i] for i, chunk in enumerate(some)]
        pooled.append(output.text_embeds if "text_embeds" in output else output.pooler_output)
    return torch.stack(states), torch.cat(pooled)


def normalized(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states through the encoder's last norm, wherever its weights live."""
    norm = model.final_layer_norm
    weight, bias = norm.weight.to(hidden.device), norm.bias.to(hidden.device)
    return torch.nn.functional.layer_norm(hidden, norm.normalized_shape, weight, bias, norm.eps)


def emphasized(hidden: torch.Tensor, chunks: Sequence[Chunk]) -> torch.Tensor:
    """Hidden states (chunks, tokens, width) times each token's weight, each chunk's mean put back to what it was.

    A1111's way. Where the mean is next to nothing, as SDXL's can be, putting it back would turn the chunk over or blow
    it up; there the product stays as it is. Chunks of which all weights are 1 stay exactly as they are.
    """
    heavy = [i for i, chunk in enumerate(chunks) if any(weight != 1.0 for weight in chunk.weights)]
    if not heavy:
        return hidden
    before = hidden[heavy].float()
    after = before * torch.tensor([chunks[i].weights for i in heavy], device=hidden.device)[..., None]
    back = before.mean((1, 2), keepdim=True) / after.mean((1, 2), keepdim=True)
    after = after * torch.where((back > 1 / _BACK) & (back < _BACK), back, torch.ones_like(back))
    emphasized = hidden.clone()
    emphasized[heavy] = after.to(hidden.dtype)
    return emphasized


@contextmanager
def _own_words(model: Any, chunks: Sequence[Chunk]) -> Iterator[None]:
    """While this lasts, the chunks' own vectors stand where the model would look up the embeddings of tokens."""
    if not any(chunk.vectors for chunk in chunks):
        yield
        return

    def put(module: torch.nn.Module, arguments: Any, embeddings: torch.Tensor) -> torch.Tensor:
        embeddings = embeddings.clone()
        for row, chunk in zip(embeddings, chunks, strict=True):
            for start, vectors in chunk.vectors.items():
                row[start : start + len(vectors)] = vectors.to(row)
        return embeddings

    hook = model.get_input_embeddings().register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()
