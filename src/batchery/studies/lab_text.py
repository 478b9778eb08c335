# SPDX-License-Identifier: Apache-2.0
"""The lab's text: a corpus split once, a byte-level BPE trained on it, and both as token streams.

The corpus is the source of Python's standard library and whatever other text is here already;
nothing is downloaded. So it differs between machines, and everything made from it carries its
digest. Of every 655,360 characters the last tenth is held out: nine tenths of the text are learned
from, and what is held out is like it in kind.
"""

import functools
import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchery import datasets
from batchery._core.validate import import_extra, integer, require
from batchery.studies.lab_cache import code_digest, folder_of, is_whole, write_folder

SOURCES = ("stdlib-text", "tinyshakespeare", "gsm8k")
END = "<|end|>"  # token 0: between stretches of text that do not follow on one another
VOCABULARY = 2048

_SPAN = 655_360  # characters
_PIECE = 65_536  # characters that are tokenised at once
_SAMPLED = 4  # the tokenizer learns from every fourth piece: it costs a third, and 1 % in length


@dataclass(frozen=True)
class Corpus:
    """Text to learn from, text to be judged on, and the digest of both."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    digest: str


@dataclass(frozen=True)
class LabText:
    """A corpus as tokens.

    Attributes:
        tokenizer: a `transformers` fast tokenizer; what it encodes it decodes to the same text.
        train: token stream, int32 `(n,)`, on the CPU.
        held_out: the same of the held-out text.
        bytes_per_token: of the held-out text, in UTF-8.
        digest: of corpus, tokenizer and code: it stands for everything above.
    """

    tokenizer: Any
    train: Tensor
    held_out: Tensor
    bytes_per_token: float
    digest: str

    def bits_per_byte(self, loss: float) -> float:
        """Convert a held-out loss in nats per token: the unit that tokenizers can share."""
        return loss / math.log(2) / self.bytes_per_token


def split_corpus(texts: Sequence[str]) -> Corpus:
    """Hold out the last tenth of every span of every text.

    Raises:
        ValueError: there is no text, or too little of it to split.

    Examples:
        >>> corpus = split_corpus(["0123456789" * 2])
        >>> corpus.train, corpus.held_out
        (('012345678901234567',), ('89',))
    """
    spans = [text[at : at + _SPAN] for text in texts for at in range(0, len(text), _SPAN)]
    cuts = [len(span) * 9 // 10 for span in spans]
    train = tuple(span[:cut] for span, cut in zip(spans, cuts, strict=True))
    held_out = tuple(span[cut:] for span, cut in zip(spans, cuts, strict=True))
    enough = sum(cuts) > 0
    require(enough, "split_corpus", "texts", "must hold characters", [len(text) for text in texts])
    digest = hashlib.sha256(END.join((*train, *held_out)).encode())
    return Corpus(train, held_out, digest.hexdigest())


@functools.cache
def lab_corpus() -> Corpus:
    """Return the lab's corpus: those of `SOURCES` that are here."""
    return split_corpus([_read(name) for name in SOURCES if datasets.is_here(name)])


def _read(name: str) -> str:
    found = datasets.load(name)
    if isinstance(found, str):
        return found
    # The test split stays out: it is for evaluation.
    return "\n\n".join(f"{row['question']}\n{row['answer']}" for row in found["train"])


def lab_text(vocabulary: int = VOCABULARY, corpus: Corpus | None = None) -> LabText:
    """Return a corpus as tokens; made once, then read from the cache.

    Args:
        vocabulary: size of the tokenizer's vocabulary, at least 257: every byte and `END`.
        corpus: of `split_corpus`; by default the lab's own.

    Raises:
        ImportError: `transformers` or `tokenizers` is not installed.
        ValueError: the vocabulary is too small, or larger than the corpus gives.
    """
    integer("lab_text", "vocabulary", vocabulary, at_least=257)
    tokenizers = import_extra("tokenizers", "hf", "lab_text")
    transformers = import_extra("transformers", "hf", "lab_text")
    safetensors = import_extra("safetensors.torch", "hf", "lab_text")
    corpus = lab_corpus() if corpus is None else corpus
    made_by = {
        "code": code_digest(sys.modules[__name__]),
        "tokenizers": tokenizers.__version__,
        "corpus": corpus.digest,
        "vocabulary": vocabulary,
    }
    folder = folder_of("text", made_by)

    def write(target: Path) -> None:
        tokenizer = _train_tokenizer(corpus.train, vocabulary)
        tokenizer.save(str(target / "tokenizer.json"))
        streams = {
            "train": _token_stream(tokenizer, corpus.train),
            "held_out": _token_stream(tokenizer, corpus.held_out),
        }
        safetensors.save_file(streams, target / "tokens.safetensors")

    if not is_whole(folder):
        write_folder(folder, write)
    streams = safetensors.load_file(folder / "tokens.safetensors")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )
    size = sum(len(text.encode()) for text in corpus.held_out)
    return LabText(
        tokenizer,
        streams["train"],
        streams["held_out"],
        bytes_per_token=size / len(streams["held_out"]),
        digest=folder.name.removeprefix("text."),
    )


def _pieces(text: str) -> list[str]:
    return [text[at : at + _PIECE] for at in range(0, len(text), _PIECE)]


def _train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """Train a byte-level BPE; `END` is its token 0 and no text lacks a token."""
    tokenizers = import_extra("tokenizers", "hf", "lab_text")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = [piece for text in texts for piece in _pieces(text)[::_SAMPLED]]
    tokenizer.train_from_iterator(sample, trainer)
    found = tokenizer.get_vocab_size()
    rule = f"must be <= {found}, all that this corpus gives"
    require(found == vocabulary, "lab_text", "vocabulary", rule, vocabulary)
    return tokenizer


def _token_stream(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Tokenise texts into one int32 stream, each followed by `END`."""
    stream: list[int] = []
    for text in texts:
        for encoding in tokenizer.encode_batch_fast(_pieces(text)):
            stream += encoding.ids
        stream.append(tokenizer.token_to_id(END))
    return torch.tensor(stream, dtype=torch.int32)
