"""Prompts to token ids, with nothing cut off in silence."""

from collections.abc import Sequence
from typing import Any

import torch


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> tuple[torch.Tensor, list[str]]:
    """Ids (prompts, tokenizer.model_max_length), padded; and for each prompt the text beyond the last token."""
    length = tokenizer.model_max_length
    ids, truncated = [], []
    for prompt in prompts:
        ids.append(tokenizer(prompt, padding="max_length", max_length=length, truncation=True).input_ids)
        whole = tokenizer(prompt, truncation=False, verbose=False).input_ids
        truncated.append(tokenizer.decode(whole[length - 1 : -1]).strip() if len(whole) > length else "")
    return torch.tensor(ids), truncated
