# SPDX-License-Identifier: Apache-2.0
import math
from dataclasses import replace

import pytest
import torch

from batchery import datasets
from batchery.compress.quant import quantize_rtn
from batchery.studies import lab, marlin
from batchery.studies.harness import load_result, run_study
from batchery.studies.marlin import PLANS, STUDY
from batchery.studies.report import comparison_rows, draw, results_markdown
from batchery.studies.study import SCALES, UNSHOWN, Outcome, Trial

CPU = torch.device("cpu")
NOT_HERE = "not here: minilm gsm8k; get it with: batchery data minilm gsm8k"


def test_the_layers_of_every_scale_hold_whole_groups():
    for plan in PLANS.values():
        assert plan.size.hidden % 128 == 0
        assert plan.size.mlp % 128 == 0
        assert abs(plan.size.mlp / (plan.size.hidden * 8 / 3) - 1) < 0.13
    tokens = {scale: plan.sequences * plan.size.context for scale, plan in PLANS.items()}
    assert (tokens["cpu"], tokens["gpu"]) == (16_384, 65_536)


def test_the_model_at_scale_gpu_is_as_large_as_the_specification_asks():
    pytest.importorskip("transformers")
    with torch.device("meta"):
        model = lab.new_model(PLANS["gpu"].size)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert 100 < millions < 300
    assert f"{millions:.0f} million parameters" in STUDY.protocol


def test_an_arm_leaves_the_model_to_the_next_as_it_was():
    """Arms quantise copies."""
    trial = Trial(0, "smoke", CPU)
    kept = marlin._dense(trial.scale, trial.device, trial.seed)[0]
    before = {name: value.clone() for name, value in kept.model.state_dict().items()}
    trained = marlin._copy(trial)
    marlin.rtn_quantize_model(trained.model)
    for name, value in kept.model.state_dict().items():
        assert torch.equal(value, before[name])
        changed = not torch.equal(value, trained.model.state_dict()[name])
        assert changed == name.endswith("_proj.weight")


def test_the_claims_are_those_of_the_specification():
    claims = {(c.arm, c.baseline, c.metric) for c in STUDY.comparisons if c.claim}
    assert claims == {
        ("gptq-128", "rtn-128", "bar"),
        ("gptq-64", "rtn-64", "bar"),
        ("gptq-32", "rtn-32", "bar"),
        ("gptq-128", "rtn-128-clip", "loss"),
    }
    assert all(c.require == "superior" and c.margin == 0 for c in STUDY.comparisons)
    of_encoder = {(c.arm, c.baseline, c.metric) for c in STUDY.comparisons if "encoder" in c.arm}
    assert of_encoder == {
        ("encoder-gptq-128", "encoder-rtn-128", metric) for metric in ("distance", "neighbours")
    }
    assert set(STUDY.seeds) == set(SCALES)


def test_four_bits_and_a_scale_take_a_quarter():
    qw = quantize_rtn(torch.randn(4, 256, generator=torch.Generator().manual_seed(0)))
    assert marlin._size_ratio({"a": qw, "b": qw}) == pytest.approx(3.879, abs=1e-3)


@pytest.mark.slow
def test_the_arms_measure_what_they_say():
    prepared = STUDY.prepare(Trial(0, "smoke", CPU))
    found = {
        arm: STUDY.arms[arm](Trial(0, "smoke", CPU, prepared))
        for arm in ("dense", "rtn-128", "gptq-128")
    }
    dense, rtn, gptq = (found[arm].metrics for arm in ("dense", "rtn-128", "gptq-128"))
    assert dense["loss"] == pytest.approx(prepared["loss"][0], abs=0.1)  # on other windows
    assert 0 < gptq["divergence"] < rtn["divergence"]
    assert rtn["increase"] == rtn["loss"] - dense["loss"]
    assert rtn["bar"] == rtn["increase"] / 2
    assert gptq["bar"] == gptq["increase"]
    assert gptq["recovered"] == pytest.approx(100 * (1 - gptq["increase"] / rtn["increase"]))
    assert all(0 < ratio < 1 for ratio in found["gptq-128"].series["error_ratio"])
    assert all(math.isfinite(x) for outcome in found.values() for x in outcome.metrics.values())


@pytest.fixture
def tiny_encoder(monkeypatch):
    """A random encoder and random texts in the place of the published ones."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertModel(config, add_pooling_layer=False).eval()
    words = {f"w{i}": i for i in range(100)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    generator = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(200):
        length = int(torch.randint(4, 20, (), generator=generator))
        ids = torch.randint(1, 100, (length,), generator=generator)
        texts.append(" ".join(f"w{i}" for i in ids.tolist()))
    monkeypatch.setattr(marlin, "_encoder", lambda device: (model, tokenizer))
    monkeypatch.setattr(marlin, "_documents", lambda: texts)
    monkeypatch.setitem(marlin.READINGS, "cpu", marlin.Reading(120, 60, 16))
    marlin._dense_embeddings.cache_clear()
    yield model
    marlin._dense_embeddings.cache_clear()


def test_seeds_of_the_encoder_draw_texts_apart(tiny_encoder):
    drawn = [marlin._readings(Trial(seed, "cpu", CPU)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert drawn[0][1] != drawn[2][1]
    for calibration, held_out in drawn:
        assert (len(calibration), len(held_out)) == (120, 60)
        assert not set(calibration) & set(held_out)


def test_the_arms_of_the_encoder_measure_what_they_say(tiny_encoder):
    before = {name: value.clone() for name, value in tiny_encoder.state_dict().items()}
    trial = Trial(0, "cpu", CPU)
    dense, rtn, gptq = (STUDY.arms[arm](trial) for arm in marlin.ENCODER_ARMS)
    assert dense.metrics == {"distance": 0, "neighbours": 100, "ratio": 1}
    assert 0 < gptq.metrics["distance"] < rtn.metrics["distance"] < 1
    assert all(0 <= found.metrics["neighbours"] < 100 for found in (rtn, gptq))
    assert rtn.metrics["ratio"] == gptq.metrics["ratio"] == pytest.approx(3.879, abs=1e-3)
    assert len(gptq.series["error_ratio"]) == 2 * 6  # q, k, v, output and the MLP's two
    for name, value in tiny_encoder.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_encoder_is_left_out_where_it_is_not_at_hand(monkeypatch):
    monkeypatch.setattr(datasets, "is_here", lambda name: False)
    assert STUDY.left_out("cpu") == dict.fromkeys(marlin.ENCODER_ARMS, NOT_HERE)
    monkeypatch.setattr(datasets, "is_here", lambda name: True)
    assert STUDY.left_out("cpu") == STUDY.left_out("gpu") == {}
    assert STUDY.left_out("smoke") == dict.fromkeys(marlin.ENCODER_ARMS, "not part of scale smoke")


def _toy(arm):
    metrics = {metric.name: float(arm.startswith("rtn")) for metric in STUDY.metrics}
    return lambda trial: Outcome(
        {name: value + 0.01 * trial.seed for name, value in metrics.items()},
        {"error_ratio": [0.5, 0.6]},
    )


@pytest.mark.parametrize("missing", [True, False])
def test_a_result_names_what_was_left_out(monkeypatch, tmp_path, missing):
    """The study runs without the encoder, and says so wherever its result is shown."""
    monkeypatch.setattr(datasets, "is_here", lambda name: not missing)
    study = replace(STUDY, arms={arm: _toy(arm) for arm in STUDY.arms}, prepare=None)
    labels = []
    result = run_study(
        study, "cpu", results=tmp_path, on_progress=lambda label, _: labels.append(label)
    )
    left_out = dict.fromkeys(marlin.ENCODER_ARMS, NOT_HERE) if missing else {}
    assert result["left_out"] == load_result(tmp_path, "marlin", "cpu")["left_out"] == left_out
    ran = {arm["name"] for arm in result["arms"]}
    assert ran == set(STUDY.arms) - set(left_out)
    assert len(result["comparisons"]) == len(STUDY.comparisons)
    says = f"encoder-gptq-128 left out: {NOT_HERE}"
    for item, row in zip(result["comparisons"], comparison_rows(result)[1], strict=True):
        absent = missing and item["arm"] == "encoder-gptq-128"
        assert (item["reason"] == says) == absent
        if absent:
            assert (item["verdict"], item["interval"]) == (UNSHOWN, None)
            assert row[-1] == f"cannot be shown here ({says})"
    assert "encoder" not in result["reason"]  # the verdict does not hang on it
    assert (f"marlin · {says}" in labels) == missing
    page = results_markdown(tmp_path, "marlin")
    assert ("without encoder; without encoder-rtn-128" in page) == missing
    pytest.importorskip("matplotlib")
    assert draw(study, result, tmp_path).is_file()


def test_an_arm_that_is_unknown_cannot_be_left_out(tmp_path):
    study = replace(STUDY, left_out=lambda scale: {"encoders": "a slip of the pen"})
    with pytest.raises(ValueError, match="study marlin: left_out must be one of .*'encoders'"):
        run_study(study, "smoke", results=tmp_path)
