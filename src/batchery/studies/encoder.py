# SPDX-License-Identifier: Apache-2.0
"""A sentence encoder that others trained, for studies: all-MiniLM-L6-v2, as it is published.

Use it where a study needs real weights or real embeddings. When not: in what must run on every
machine; the files are the data set `minilm`, 91 MB.

    e = sum over tokens of mask · h / sum of mask      h the last hidden states, 256 tokens at most
    embedding = e / |e|

Reference: Reimers, Gurevych, Sentence-BERT, arXiv 1908.10084; Wang et al., MiniLM, arXiv
2002.10957.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchery._core import random
from batchery._core.validate import import_extra, integer, require

__all__ = ["batches", "distance", "embed", "kept_neighbours", "load", "tokenize"]

MAX_TOKENS = 256


def load(folder: Path, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """Read an encoder.

    Args:
        folder: with `config.json`, `model.safetensors` and `tokenizer.json`.
        device: where the model is put.

    Returns:
        The `BertModel` of transformers, float32, in evaluation mode, without its pooler, which
        embeddings do not use; and the `Tokenizer` of tokenizers.

    Raises:
        ImportError: the extra `hf` is not installed.
        ValueError: the file lacks a weight of the model.
    """
    transformers = import_extra("transformers", "hf", "encoder.load")
    tokenizers = import_extra("tokenizers", "hf", "encoder.load")
    safetensors = import_extra("safetensors.torch", "hf", "encoder.load")
    config = transformers.BertConfig.from_json_file(folder / "config.json")
    with random.initial_weights("encoder"):
        model = transformers.BertModel(config, add_pooling_layer=False)
    # `from_pretrained` would do the same, but draws a progress bar and reports the pooler.
    weights = folder / "model.safetensors"
    missing, _ = safetensors.load_model(model, weights, strict=False)
    require(not missing, "encoder.load", "folder", "must hold all weights", sorted(missing))
    return model.to(device).eval(), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def tokenize(
    tokenizer: Any, sentences: Sequence[str], max_tokens: int = MAX_TOKENS
) -> list[list[int]]:
    """Return the token ids of every sentence, cut so that the end mark stays."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(integer("encoder.tokenize", "max_tokens", max_tokens, at_least=3))
    return [encoding.ids for encoding in tokenizer.encode_batch(list(sentences))]


def batches(rows: Sequence[Sequence[int]], size: int = 32) -> Iterator[dict[str, Tensor]]:
    """Yield token ids as keyword arguments of the model, `size` rows at a time, in their order.

    Examples:
        >>> for batch in batches([[2, 7, 3], [2, 3]]):
        ...     print(batch["input_ids"].tolist(), batch["attention_mask"].tolist())
        [[2, 7, 3], [2, 3, 0]] [[1, 1, 1], [1, 1, 0]]
    """
    for start in range(0, len(rows), size):
        own = [torch.tensor(row) for row in rows[start : start + size]]
        ids, mask = (
            torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
            for part in (own, [torch.ones_like(row) for row in own])
        )
        yield {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def embed(
    model: Any,
    tokenizer: Any,
    sentences: Sequence[str],
    *,
    max_tokens: int = MAX_TOKENS,
    batch: int = 32,
) -> Tensor:
    """Embed sentences: the mean of the last hidden states, at unit length.

    Args:
        model: from `load`; it computes on its own device.
        tokenizer: from `load`.
        sentences: n texts.
        max_tokens: what is longer is cut, end mark kept.
        batch: sentences in a pass; those of like length go together.

    Returns:
        float32 `(n, d)` on the model's device.

    Raises:
        ValueError: there is no sentence.
    """
    require(len(sentences) > 0, "encoder.embed", "sentences", "must not be empty", len(sentences))
    rows = tokenize(tokenizer, sentences, max_tokens)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    parts = []
    for part in batches([rows[i] for i in order], batch):
        given = {name: value.to(model.device) for name, value in part.items()}
        states, mask = model(**given).last_hidden_state, given["attention_mask"][..., None]
        parts.append(F.normalize((states * mask).sum(1) / mask.sum(1)))
    found = torch.cat(parts)
    return torch.empty_like(found).index_copy_(0, torch.tensor(order, device=found.device), found)


def distance(embeddings: Tensor, wanted: Tensor) -> float:
    """Return the mean of 1 - cosine between embeddings of unit length, row by row.

    Examples:
        >>> round(distance(torch.eye(2), torch.eye(2).flip(0)), 6)
        1.0
    """
    # |a - b|² / 2 is the same number, and keeps its digits where it is small.
    return float((embeddings - wanted).square().sum(-1).mean() / 2)


def kept_neighbours(embeddings: Tensor, wanted: Tensor, k: int = 10) -> float:
    """Return the share of each row's k nearest other rows that stay so, in per cent.

    Examples:
        >>> x = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]))
        >>> kept_neighbours(x, x, k=1), kept_neighbours(x[[0, 2, 1, 3]], x, k=1)
        (100.0, 0.0)
    """

    def nearest(rows: Tensor) -> Tensor:
        return (rows @ rows.T).fill_diagonal_(-torch.inf).topk(k).indices

    own, before = nearest(embeddings), nearest(wanted)
    return 100 * float((own[:, :, None] == before[:, None, :]).any(-1).double().mean())
