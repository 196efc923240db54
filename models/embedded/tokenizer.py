"""A CLIP tokenizer for the captions' grammar: each of its words is one token, any other text falls back to bytes."""

import json
import tempfile
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from models.embedded.captions import vocabulary

CONTEXT = 77  # tokens


def tokenizer(*, padding: str = "<|endoftext|>") -> CLIPTokenizer:
    """The tokenizer of all three models; SD 2.1's and SDXL's second one pad with `!`, as the originals do."""
    vocab, merges = byte_pairs(vocabulary())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}, ensure_ascii=False))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
        return CLIPTokenizer(
            str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=CONTEXT, pad_token=padding
        )


def byte_pairs(words: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Vocabulary and merges under which each word becomes one token.

    Merges are added on top of what earlier words' merges already join: a chain of its own for each word would be
    broken by the others' (`st` from `star` comes first in `masterpiece`).
    """
    letters = list(bytes_to_unicode().values())
    vocab = letters + [letter + "</w>" for letter in letters]
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        parts = merged([*word[:-1], word[-1] + "</w>"], ranks)
        while len(parts) > 1:
            ranks[parts[0], parts[1]] = len(ranks)
            parts = [parts[0] + parts[1], *parts[2:]]
            vocab.append(parts[0])
    vocab = list(dict.fromkeys(vocab))
    return [*vocab, "<|startoftext|>", "<|endoftext|>"], list(ranks)


def merged(parts: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """The parts of one word after byte pair encoding: the merge of lowest rank first."""
    while candidates := [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]:
        _, i = min(candidates)
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]
    return parts
