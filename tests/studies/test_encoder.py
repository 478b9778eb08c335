# SPDX-License-Identifier: Apache-2.0
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from batchery import datasets
from batchery.studies import encoder

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = "the wing of a body in flow has lift and drag at high speed".split()
TEXTS = ["the wing has lift", "a body in flow has drag and lift at high speed", "flow", "drag of a"]


def write_encoder(folder):
    """Write a tiny random encoder as the real one is written."""
    folder.mkdir(parents=True)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertModel(config).eval()
    model.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=50)  # as published, the file asks for padding and cutting
    tokenizer.enable_truncation(5)
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


def test_weights_that_lack_a_tensor_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    write_encoder(tmp_path / "own")
    path = tmp_path / "own" / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"all weights.*output\.dense\.weight"):
        encoder.load(tmp_path / "own")


def test_an_embedding_is_the_mean_of_the_last_states(tmp_path):
    """Against the model that was saved, a sentence at a time: no padding, no mask."""
    model = write_encoder(tmp_path / "own")
    state = torch.random.get_rng_state()
    found = encoder.embed(*encoder.load(tmp_path / "own"), TEXTS, batch=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    for text, row in zip(TEXTS, found, strict=True):
        ids = [2, *(4 + WORDS.index(word) for word in text.split()), 3]
        with torch.no_grad():
            mean = model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(row, mean / mean.norm(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_neither_padding_nor_order_changes_an_embedding(tmp_path, batch):
    write_encoder(tmp_path / "own")
    model, tokenizer = encoder.load(tmp_path / "own")
    alone = torch.cat([encoder.embed(model, tokenizer, [text]) for text in TEXTS])
    together = encoder.embed(model, tokenizer, TEXTS, batch=batch)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    back = encoder.embed(model, tokenizer, TEXTS[::-1], batch=batch)
    torch.testing.assert_close(back.flip(0), alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4), atol=1e-5, rtol=0)


def test_a_long_sentence_is_cut_and_ends_as_others_do(tmp_path):
    write_encoder(tmp_path / "own")
    _, tokenizer = encoder.load(tmp_path / "own")
    assert encoder.tokenize(tokenizer, TEXTS[:1]) == [[2, 4, 5, 11, 12, 3]]
    assert encoder.tokenize(tokenizer, TEXTS[:1], 4) == [[2, 4, 5, 3]]
    with pytest.raises(ValueError, match="max_tokens must be >= 3, got 2"):
        encoder.tokenize(tokenizer, TEXTS, 2)


def test_no_sentence_is_refused(tmp_path):
    write_encoder(tmp_path / "own")
    with pytest.raises(ValueError, match="sentences must not be empty"):
        encoder.embed(*encoder.load(tmp_path / "own"), [])


def test_distances_follow_their_angles():
    angles = torch.tensor([0.0, 0.1, 0.5], dtype=torch.float64)
    rows = torch.stack([angles.cos(), angles.sin()], 1)
    wanted = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(3, 2)
    assert encoder.distance(rows, wanted) == pytest.approx(float((1 - angles.cos()).mean()), 1e-10)


def test_neighbours_are_counted_without_the_row_itself():
    """Rows at angles 0, 1, 3, 6: nearest of each before; after, row 0 moves beside row 3."""
    before, after = (
        torch.stack([a.cos(), a.sin()], 1)
        for a in (torch.tensor([0.0, 0.1, 0.3, 0.6]), torch.tensor([0.7, 0.1, 0.3, 0.6]))
    )
    # Before: 0→1, 1→0, 2→1, 3→2; after: 0→3, 1→2, 2→1, 3→0. One of four stays.
    assert encoder.kept_neighbours(after, before, k=1) == 25
    assert encoder.kept_neighbours(after, before, k=3) == 100


def test_the_published_embeddings_of_documents_are_ours():
    """Against those of sentence-transformers, kept as float16: cosines differ by 1e-6 at most."""
    folder = Path(os.environ.get("BATCHERY_DATA", "")) / "retrieval"
    kept, pool = folder / "pool_minilm_f16.npz", folder / "pool.json"
    if not (datasets.is_here("minilm") and kept.is_file() and pool.is_file()):
        pytest.skip("needs the data set minilm, and documents with embeddings that were kept")
    texts = [text for _, text in json.loads(pool.read_text("utf-8"))["docs"]]
    chosen = list(range(0, len(texts), 600))
    longest = max(range(len(texts)), key=lambda i: len(texts[i]))  # is cut
    chosen += [longest, longest - 1]
    model, tokenizer = encoder.load(datasets.load("minilm"))
    found = encoder.embed(model, tokenizer, [texts[i] for i in chosen])
    with np.load(kept) as arrays:
        wanted = torch.from_numpy(arrays["E"][chosen].astype(np.float32))
    cosines = torch.nn.functional.cosine_similarity(found, wanted)
    assert float(cosines.min()) >= 1 - 1e-6
