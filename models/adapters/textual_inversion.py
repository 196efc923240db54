"""Textual inversion: words whose embeddings were learned from a few pictures (arXiv:2208.01618)."""

import hashlib
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_safetensors

from models.errors import InvalidRequest

VECTORS = 75  # of one word: what a chunk of a prompt holds
_BYTES = 16 * 2**20
_SDXL = ("clip_l", "clip_g")  # in the order of SDXL's text encoders


@dataclass(frozen=True, eq=False)
class TextualInversion:
    """A learned word: for each text encoder of the model it was made for, the embeddings (n, width) of its n tokens.

    `sha256` is that of the file it was read from.
    """

    vectors: tuple[torch.Tensor, ...]
    sha256: str

    @classmethod
    def read(cls, name: str, data: bytes) -> "TextualInversion":
        """From a safetensors file's bytes: A1111's (`emb_params`), diffusers' ({token: embeddings}), SDXL's (`clip_l`
        and `clip_g`).

        Raises InvalidRequest for any other file, embeddings that are no finite numbers, or more than 75 of them.
        """
        if len(data) > _BYTES:
            raise InvalidRequest("prompt", f"{name!r} is larger than {_BYTES // 2**20} MiB, no textual inversion")
        try:
            tensors = read_safetensors(data)
        except (SafetensorError, ValueError) as error:
            raise InvalidRequest("prompt", f"{name!r} is not a complete .safetensors file: {error}") from error
        vectors = tuple(_checked(name, vectors) for vectors in _in_order(name, tensors))
        return cls(vectors, hashlib.sha256(data).hexdigest())

    @property
    def nbytes(self) -> int:
        return sum(vectors.nbytes for vectors in self.vectors)


def _in_order(name: str, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """One tensor for each text encoder."""
    if set(tensors) == set(_SDXL):
        found = [tensors[name] for name in _SDXL]
    elif "emb_params" in tensors:
        found = [tensors["emb_params"]]
    elif len(tensors) == 1:
        found = list(tensors.values())
    else:
        some = ", ".join(sorted(tensors)[:5]) or "nothing"
        raise InvalidRequest("prompt", f"{name!r} holds {some}: that is no textual inversion")
    if len({len(vectors) for vectors in found if vectors.dim()}) > 1:
        raise InvalidRequest("prompt", f"{name!r} has not as many embeddings for one text encoder as for the other")
    return found


def _checked(name: str, vectors: torch.Tensor) -> torch.Tensor:
    """(n, width) float32."""
    vectors = vectors.float()
    vectors = vectors[None] if vectors.dim() == 1 else vectors
    if vectors.dim() != 2 or not 1 <= len(vectors) <= VECTORS or not vectors.isfinite().all():
        shape = "x".join(map(str, vectors.shape))
        raise InvalidRequest("prompt", f"{name!r} holds {shape} numbers, not 1 to {VECTORS} embeddings of finite ones")
    return vectors
