# SPDX-License-Identifier: Apache-2.0
import argparse
import copy
import dataclasses
import itertools
import logging
import math
import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")

from batchery import datasets
from batchery.studies import lab, lab_cache, lab_loop, lab_text
from batchery.studies.lab import SIZES, LabSize, batches, new_model, split_corpus, token_losses
from batchery.studies.lab_loop import causal_attention

TEXT = Path(argparse.__file__).read_text("utf-8")
TINY = LabSize("tiny", 32, 2, 4, 2, context=32, batch=8, steps=110, lr=2e-2, vocabulary=400)
CORPUS = split_corpus([TEXT])


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def text(cache):
    return lab_text.lab_text(TINY.vocabulary, CORPUS)


@pytest.fixture(scope="module")
def trained(cache):
    return lab.load(TINY, corpus=CORPUS)


def refuse(*args, **kwargs):
    raise AssertionError("this should have come from the cache")


def same_weights(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)


def double(size=TINY, seed=0):
    return new_model(size, seed).double()


# Corpus


@pytest.mark.parametrize("length", [10, 11, 655_359, 655_360, 655_361, 1_400_003])
def test_the_split_is_a_partition_with_a_tenth_held_out(length):
    source = "".join(chr(32 + place * 7 % 90) for place in range(length))
    corpus = split_corpus([source])
    spans = zip(corpus.train, corpus.held_out, strict=True)
    assert "".join(train + held_out for train, held_out in spans) == source
    held_out = sum(map(len, corpus.held_out))
    assert held_out == pytest.approx(length / 10, abs=len(corpus.train))


def test_the_digest_follows_text_and_split():
    texts = [["abcdefghijkl"], ["abcdefghijkm"], ["abcdef", "ghijkl"]]
    assert len({split_corpus(each).digest for each in texts}) == 3
    assert split_corpus(texts[0]) == split_corpus(texts[0])


def test_a_corpus_without_text_is_refused():
    with pytest.raises(ValueError, match="split_corpus: texts must hold characters"):
        split_corpus([])


def test_the_corpus_takes_only_what_is_here(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("BATCHERY_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(datasets, "_download", refuse)
    rows = {"train": [{"question": "q", "answer": "a"}] * 9, "test": [{"question": "secret"}]}
    found = {"stdlib-text": "x" * 20, "tinyshakespeare": "y" * 20, "gsm8k": rows}
    monkeypatch.setattr(datasets, "load", found.__getitem__)
    corpus = lab_text.lab_corpus.__wrapped__
    assert corpus() == split_corpus(["x" * 20])
    for name in ("tinyshakespeare.txt", "gsm8k_train.jsonl"):  # half of gsm8k is not enough
        path = tmp_path / "data" / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert corpus() == split_corpus(["x" * 20, "y" * 20])
    (tmp_path / "data" / "text" / "gsm8k_test.jsonl").touch()
    assert corpus() == split_corpus(["x" * 20, "y" * 20, "\n\n".join(["q\na"] * 9)])


# Tokens


def test_the_tokenizer_gives_back_any_text(text):
    drawn = random.Random(0)
    planes = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    samples = ["", " ", "\r\n\t\x00 ", "a  b\n\n\n    c", f"x{lab_text.END}y", "e\u0301 \u202e🙂‍↔️"]
    samples += ["".join(map(chr, drawn.choices(planes, k=80))) for _ in range(50)]
    samples += ["".join(map(chr, drawn.choices(range(0x250), k=80))) for _ in range(50)]
    for sample in samples:
        ids = text.tokenizer(sample)["input_ids"]
        assert text.tokenizer.decode(ids) == sample
        assert max(ids, default=0) < TINY.vocabulary


def test_the_streams_are_the_text(text):
    streams = {"train": text.train, "held_out": text.held_out}
    for name, stream in streams.items():
        assert stream.dtype == torch.int32
        expected = "".join(part + lab_text.END for part in getattr(CORPUS, name))
        assert text.tokenizer.decode(stream.tolist()) == expected
    assert text.tokenizer.eos_token_id == 0


def test_bits_per_byte_of_the_uniform_model(text):
    uniform = math.log(256) * text.bytes_per_token  # a model that gives each byte 1/256
    assert text.bits_per_byte(uniform) == pytest.approx(8.0, rel=1e-12)
    size = len("".join(CORPUS.held_out).encode())
    assert text.bytes_per_token == pytest.approx(size / len(text.held_out))


def test_tokens_come_from_the_cache_and_a_damaged_one_is_made_anew(fresh_cache, caplog):
    first = lab_text.lab_text(300, CORPUS).train.clone()  # from disk it would be a view of the file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab_text, "_train_tokenizer", refuse)
        assert torch.equal(lab_text.lab_text(300, CORPUS).train, first)
        for vocabulary, corpus in ((301, CORPUS), (300, split_corpus([TEXT, "more"]))):
            with pytest.raises(AssertionError, match="cache"):
                lab_text.lab_text(vocabulary, corpus)
        patch.setattr(lab_text, "code_digest", lambda *modules: "changed")
        with pytest.raises(AssertionError, match="cache"):
            lab_text.lab_text(300, CORPUS)
    path = next(fresh_cache.rglob("tokens.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        again = lab_text.lab_text(300, CORPUS)
    assert "tokens.safetensors" in caplog.text
    assert torch.equal(again.train, first)


@pytest.mark.parametrize("vocabulary", [256, 5_000])
def test_a_vocabulary_that_cannot_be_is_refused(fresh_cache, vocabulary):
    with pytest.raises(ValueError, match="lab_text: vocabulary must be"):
        lab_text.lab_text(vocabulary, split_corpus(["too little text " * 20]))
    assert not list(fresh_cache.rglob("*.safetensors"))


# Model


def test_a_new_model_depends_on_the_seed_and_not_on_the_global_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = new_model(TINY, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same_weights(one, new_model(TINY, seed=3))
    assert not same_weights(one, new_model(TINY, seed=4))


@pytest.mark.gpu
def test_a_new_model_leaves_the_generator_of_the_gpu_alone():
    before = torch.cuda.get_rng_state()
    torch.rand(3, device="cuda")
    moved = torch.cuda.get_rng_state()
    assert not torch.equal(before, moved)
    new_model(TINY)
    assert torch.equal(torch.cuda.get_rng_state(), moved)


@pytest.mark.parametrize("size", [TINY, *SIZES.values()], ids=lambda size: size.name)
def test_a_new_model_has_the_shape_that_was_asked_for(size):
    if size.hidden > 256:
        size = dataclasses.replace(size, layers=1)
    model = new_model(size)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size) == (size.layers, size.hidden)
    assert (config.num_attention_heads, config.num_key_value_heads) == (size.heads, size.kv_heads)
    assert config.vocab_size == size.vocabulary
    assert model.lm_head.weight is model.model.embed_tokens.weight
    mlp = model.model.layers[0].mlp
    assert mlp.up_proj.weight.std().item() == pytest.approx(size.hidden**-0.5, rel=0.05)
    ratio = (mlp.down_proj.weight.std() / mlp.up_proj.weight.std()).item()
    assert ratio == pytest.approx(size.branch_init, rel=0.05)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# Examples


def test_an_epoch_visits_each_window_once_and_targets_follow_inputs():
    tokens = torch.arange(103, dtype=torch.int32)
    rows = torch.cat([*itertools.islice(batches(tokens, 3, 10, seed=1), 3)])
    assert rows.dtype == torch.int64
    assert torch.equal(rows[:, 1:], rows[:, :-1] + 1)
    firsts = rows[:, 0].sort().values
    assert torch.equal(firsts.diff(), torch.full((8,), 10))


def test_the_examples_of_a_step_depend_on_seed_and_step_alone():
    tokens = torch.arange(200)
    whole = [*itertools.islice(batches(tokens, 4, 8, seed=5), 20)]
    for start in (0, 1, 5, 6, 13):
        late = batches(tokens, 4, 8, seed=5, start=start)
        assert all(torch.equal(next(late), row) for row in whole[start:])
    assert not torch.equal(next(batches(tokens, 4, 8, seed=6)), whole[0])
    state = torch.get_rng_state()
    next(batches(tokens, 4, 8))
    assert torch.equal(torch.get_rng_state(), state)


def test_too_large_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"batches: batch must be <= 9, .* got 10"):
        next(batches(torch.arange(100), 10, 10))


# Losses and training


@pytest.mark.parametrize("pieces", [5, 8_192])
def test_token_losses_are_the_cross_entropy_of_the_whole_logits(pieces, monkeypatch):
    monkeypatch.setattr(lab_loop, "_LOGIT_ROWS", pieces)
    rows = next(batches(torch.arange(300) * 7 % TINY.vocabulary, 3, 6))
    one, two = double(), double()
    losses = token_losses(one, rows)
    expected = F.cross_entropy(
        two(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
    ).view(3, 6)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-10)
    (losses.mean() + losses[0, 0]).backward()
    (expected.mean() + expected[0, 0]).backward()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10)


def test_causal_attention_is_what_the_mask_gives_and_ends_with_its_context():
    model, rows = new_model(TINY).double(), torch.randint(257, (3, 9))
    wanted = token_losses(model, rows)
    before = model.config._attn_implementation
    with causal_attention(model):
        assert model.config._attn_implementation != before
        found = token_losses(model, rows)
    assert model.config._attn_implementation == before
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_token_losses_are_at_least_float32(text):
    rows = next(batches(text.train, 2, 8))
    assert token_losses(new_model(TINY).bfloat16(), rows).dtype == torch.float32


def test_position_losses_have_fixed_windows_and_keep_the_mode(text):
    model = double().train()
    losses = lab.position_losses(model, text.held_out, 8, windows=7, micro_batch=3)
    assert losses.shape == (8,)
    assert model.training
    starts = torch.linspace(0, len(text.held_out) - 9, 7).long()
    rows = text.held_out[starts[:, None] + torch.arange(9)].long()
    torch.testing.assert_close(losses, token_losses(model, rows).mean(0), rtol=1e-10, atol=1e-10)
    mean = lab.held_out_loss(model, text.held_out, 8, windows=7)
    assert mean == pytest.approx(losses.mean().item(), rel=1e-10)
    with pytest.raises(ValueError, match="position_losses: context must be"):
        lab.position_losses(model, text.held_out[:8], 8)


def run(model, text, steps, *, rows=None, optimizer=None, **settings):
    rows = batches(text.train, 6, 8) if rows is None else rows
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return lab.train(model, rows, optimizer, None, steps, **settings)


def test_micro_batches_change_nothing(text):
    one, two = double(), double()
    a, b = run(one, text, 4), run(two, text, 4, micro_batch=4)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)  # losses are kept in float32
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_calls_that_share_their_iterator_add_up(text):
    one, two = double(), double()
    rows = batches(text.train, 6, 8)
    optimizer = torch.optim.SGD(two.parameters(), lr=0.1, momentum=0.9)
    seen = []
    whole = run(one, text, 5)
    parts = [
        run(two, text, n, rows=rows, optimizer=optimizer, progress=lambda *made: seen.append(made))
        for n in (2, 3)
    ]
    assert torch.equal(whole, torch.cat(parts))
    assert same_weights(one, two)
    assert seen == [(1, 2), (2, 2), (1, 3), (2, 3), (3, 3)]


def test_a_step_is_the_optimizers_on_clipped_gradients_and_steps_the_scheduler(text):
    model = double()
    start = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (step + 1))
    loss = lab.train(model, batches(text.train, 6, 8), optimizer, scheduler, 1, max_grad_norm=1e-3)
    expected = token_losses(start, next(batches(text.train, 6, 8))).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    moved = [p - q for p, q in zip(model.parameters(), start.parameters(), strict=True)]
    norm = torch.stack([delta.norm() for delta in moved]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)  # clip_grad_norm_ adds 1e-6 to the norm
    assert optimizer.param_groups[0]["lr"] == 0.5


# Trained models


def test_a_trained_model_has_learned_more_than_how_often_tokens_occur(trained):
    tokens = trained.text.train
    counts = torch.bincount(tokens, minlength=TINY.vocabulary).double()
    entropy = -(counts / counts.sum() * (counts / counts.sum()).clamp_min(1e-300).log()).sum()
    assert len(trained.losses) == TINY.steps
    assert sum(trained.losses[-5:]) / 5 < sum(trained.losses[:5]) / 5 - 1
    assert trained.held_out_loss < entropy.item() - 0.3
    again = lab.held_out_loss(trained.model, trained.text.held_out, TINY.context)
    assert again == trained.held_out_loss
    assert not trained.model.training


def test_a_second_load_comes_from_the_cache_and_is_a_copy_of_its_own(trained, monkeypatch):
    monkeypatch.setattr(lab, "train", refuse)
    again = lab.load(TINY, corpus=CORPUS)
    assert same_weights(again.model, trained.model)
    assert (again.losses, again.held_out_loss) == (trained.losses, trained.held_out_loss)
    with torch.no_grad():
        again.model.lm_head.weight.zero_()
    assert same_weights(lab.load(TINY, corpus=CORPUS).model, trained.model)


@pytest.mark.parametrize("change", ["setting", "seed", "code", "text", "threads", "version"])
def test_the_cache_is_keyed_by_what_makes_a_model(trained, monkeypatch, change):
    size, seed, corpus = TINY, 0, CORPUS
    if change == "setting":
        size = dataclasses.replace(TINY, lr=1e-2)
    elif change == "seed":
        seed = 1
    elif change == "text":
        corpus = split_corpus([TEXT + " "])
    elif change == "code":
        monkeypatch.setattr(lab_cache, "code_digest", lambda *modules: "changed")
    elif change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    else:
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    monkeypatch.setattr(lab, "train", refuse)
    with pytest.raises(AssertionError, match="cache"):
        lab.load(size, seed=seed, corpus=corpus)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_model_is_reported_and_trained_anew_to_the_same_weights(trained, caplog, damage):
    path = trained.folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:100])
    torch.manual_seed(77)  # must not matter
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        again = lab.load(TINY, corpus=CORPUS)
    assert "model.safetensors" in caplog.text
    assert same_weights(again.model, trained.model)
    assert again.losses == trained.losses
    assert torch.equal(torch.get_rng_state(), state)


def test_an_interrupted_training_goes_on_to_the_same_weights(trained, fresh_cache, monkeypatch):
    monkeypatch.setattr(lab, "_SAVE_EVERY", 0.0)
    seen = []

    def stop(done, total):
        seen.append((done, total))
        if done == 107:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.load(TINY, corpus=CORPUS, progress=stop)
    assert seen == [(done, TINY.steps) for done in range(1, 108)]
    seen.clear()
    resumed = lab.load(TINY, corpus=CORPUS, progress=lambda *made: seen.append(made))
    assert seen == [(done, TINY.steps) for done in range(101, 111)]
    assert same_weights(resumed.model, trained.model)
    assert resumed.losses == trained.losses
    assert not list(fresh_cache.rglob("*.part"))


@pytest.mark.gpu
def test_a_gpu_trains_to_a_like_loss_and_keeps_a_model_of_its_own(trained):
    found = lab.load(TINY, "cuda", corpus=CORPUS)
    assert found.folder != trained.folder
    assert {p.device.type for p in found.model.parameters()} == {"cuda"}
    assert {p.dtype for p in found.model.parameters()} == {torch.float32}
    # bfloat16 keeps 8 bits: after a hundred steps only the level of the loss is comparable.
    assert found.held_out_loss == pytest.approx(trained.held_out_loss, abs=0.3)


@pytest.mark.gpu
def test_two_trainings_on_a_gpu_give_the_same_bits(text):
    """Of a context so long that attention's backward pass has sums to make in some order."""
    size = dataclasses.replace(TINY, hidden=128, heads=2, kv_heads=1, context=512, batch=16)
    found = []
    for _ in range(2):
        model = new_model(size).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        rows = batches(text.train.cuda(), size.batch, size.context)
        losses = lab.train(model, rows, optimizer, None, 20)
        found.append((model, losses))
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(found[0][1], found[1][1])
    assert same_weights(found[0][0], found[1][0])


def test_the_folder_opens_with_transformers(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(trained.folder)
    tokenizer = AutoTokenizer.from_pretrained(trained.folder)
    assert same_weights(model, trained.model)
    ids = tokenizer("def main():", return_tensors="pt")["input_ids"]
    made = trained.model.generate(ids, max_new_tokens=3, do_sample=False)
    assert made.shape == (1, ids.shape[1] + 3)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "rule"),
    [
        (5, 1, "LabSize x: heads must divide hidden=32"),
        (32, 1, "LabSize x: heads must divide hidden=32"),
        (4, 3, "LabSize x: kv_heads must divide heads=4"),
    ],
)
def test_heads_that_do_not_fit_are_refused(heads, kv_heads, rule):
    with pytest.raises(ValueError, match=rule):
        LabSize("x", 32, 1, heads, kv_heads, 8)


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match=r"lab.load: size must be one of 'nano', 'small'"):
        lab.load("huge")
