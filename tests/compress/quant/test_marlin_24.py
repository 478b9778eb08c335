# SPDX-License-Identifier: Apache-2.0
"""2:4 MARLIN: against the instruction that the layout is made for, and a public writer's words."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from batchery.compress.quant import (
    QuantizedWeight,
    QuantLinear,
    compress_24,
    dequantize,
    keep_two_of_four,
    load_quantized,
    quantize_rtn_24,
    save_quantized,
    unpack_marlin_24,
)
from batchery.compress.quant.scheme import Scheme
from batchery.compress.quant.sparse_linear import SparseQuantLinear

PAIRS = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
SERVER = ("B_24", "B_meta", "s")
COMPRESSED = ("weight_packed", "meta", "scale_packed")


def draw(n, k, group):
    """A 2:4 weight with all values and all pairs of places."""
    generator = torch.Generator().manual_seed(n + k)
    keep = keep_two_of_four(torch.rand(n, k, generator=generator))
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scales = torch.rand(n, k // group, generator=generator).add(0.5).half()
    return QuantizedWeight(torch.where(keep, q, 8), scales, None, None, group)


def kept(row):
    """What is left of a row, and where it stood; where that is one value, any pair does."""
    values, places = [], []
    for begin in range(0, len(row), 4):
        four = row[begin : begin + 4]
        pair = next((p for p in PAIRS if all(four[c] == 8 for c in range(4) if c not in p)), None)
        values += [four[pair[0]], four[pair[1]]]
        places.append(pair)
    return values, places


def signed(number, bits):
    return number - 2**bits if number >= 2 ** (bits - 1) else number


def packed(qw, names=SERVER):
    """Write a layer as the instruction wants it: mma.sp.m16n8k32, weights as its operand A.

    Lane t holds of the 16 rows and the 16 columns left of 32: four registers of two columns, for
    rows t // 4 and + 8, columns 2 (t % 4) and + 8. A register's halves come from nibbles four
    apart of a word, registers from nibbles 0, 2, 1, 3 (by the shifts of the dequantiser). Of the
    metadata a row's first or second 16 bits belong to an even or an odd lane, in the lanes' lower
    pair for instructions 0 and 2 and in the upper for 1 and 3; two rows make a lane's 32 bits.
    """
    n, steps = qw.shape[0], qw.shape[1] // 32
    rows = [kept(row) for row in qw.q.tolist()]
    words = torch.zeros(steps, 2 * n, dtype=torch.int32)
    meta = torch.zeros(steps, 2 * n, dtype=torch.int16)
    for step in range(steps):
        for block in range(n // 64):
            # of instruction j the 16 rows of the operand are these outputs
            of = [
                [64 * block + 8 * (r % 8) + 4 * (r // 8) + j for r in range(16)] for j in range(4)
            ]
            for lane in range(32):
                group, inside = divmod(lane, 4)
                for j in range(4):
                    word = 0
                    for register, place in enumerate((0, 2, 1, 3)):
                        row = of[j][group + 8 * (register % 2)]
                        column = 16 * step + 2 * inside + 8 * (register // 2)
                        word |= rows[row][0][column] << 4 * place
                        word |= rows[row][0][column + 1] << 4 * (place + 4)
                    words[step, 128 * block + 4 * lane + j] = signed(word, 32)
                # two registers of metadata, for instructions 0 and 1, and 2 and 3
                for register in range(2):
                    j, half = 2 * register + inside // 2, inside % 2
                    for upper in range(2):
                        row = of[j][group + 8 * upper]
                        fours = rows[row][1][8 * step + 4 * half :][:4]
                        code = sum((a | b << 2) << 4 * i for i, (a, b) in enumerate(fours))
                        at = 128 * block + 64 * register + 2 * lane + upper
                        meta[step, at] = signed(code, 16)
    scales = qw.scales.t().contiguous().clone()
    if len(scales) > 1:
        # lane group g reads eight halves: of instruction 0 rows g and g + 8, of instruction 1, …
        for begin in range(0, n, 8):
            order = [begin + 4 * upper + j for j in range(4) for upper in range(2)]
            scales[:, begin : begin + 8] = qw.scales.t()[:, order]
    return dict(zip(names, (words, meta, scales), strict=True))


@pytest.mark.parametrize("names", [SERVER, COMPRESSED])
@pytest.mark.parametrize(
    ("n", "k", "group"),
    [(64, 32, 32), (192, 96, 96), (64, 128, 128), (128, 384, 128), (64, 256, 256)],
)
def test_what_the_instruction_reads_is_read(n, k, group, names):
    qw = draw(n, k, group)
    found = unpack_marlin_24(packed(qw, names))
    assert torch.equal(found.q, qw.q)
    assert found.q.dtype == torch.uint8
    assert torch.equal(found.scales, qw.scales)
    assert (found.zeros, found.g_idx, found.group_size) == (None, None, group)


def test_a_public_writers_words():
    # By compressed-tensors 0.9.4 of this weight.
    levels = [value for value in range(16) if value != 8]
    q = torch.full((64, 128), 8, dtype=torch.uint8)
    for r in range(64):
        for f in range(32):
            first, second = PAIRS[(5 * r + f) % 6]
            q[r, 4 * f + first] = levels[(7 * r + 3 * f) % 15]
            q[r, 4 * f + second] = levels[(2 * r + 11 * f + 1) % 15]
    scales = torch.arange(1, 65).half()[:, None]
    layer = packed(QuantizedWeight(q, scales, None, None, 128), COMPRESSED)
    words = layer["weight_packed"].long() % 2**32
    meta = layer["meta"].long() % 2**16
    some = [0, 1, 2, 3, 4, 37, 127]
    hexes = [0x9A01BED0, 0xBC232547, 0xDE45ADCF, 0xF0671436, 0x45CDE103, 0x9A01D0F2, 0xAB12D0F2]
    assert words[0, some].tolist() == hexes
    hexes = [0x23AB7BAD, 0x45CDF214, 0x67EF6A9C, 0x9A01E103, 0xEF56BED0, 0x23ABADCF, 0x34BCADCF]
    assert words[3, some].tolist() == hexes
    assert meta[3, some].tolist() == [0xC984, 0xEDC9, 0x84ED, 0xC984, 0x984E, 0x984E, 0xDC98]
    weights = torch.arange(1, 513).view(4, 128)
    assert int((words * weights).sum()) == 281945734654919
    assert int((meta * weights).sum()) == 5726847748
    assert torch.equal(unpack_marlin_24(layer).q, q)


def test_scales_of_groups_by_the_public_writer():
    scales = torch.arange(384).view(3, 128).t().half()
    layer = packed(QuantizedWeight(draw(128, 384, 128).q, scales, None, None, 128))
    assert layer["s"][0, :10].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12]
    assert layer["s"][2, 120:].tolist() == [376, 380, 377, 381, 378, 382, 379, 383]
    assert torch.equal(unpack_marlin_24(layer).scales, scales)


def test_one_value_moves_alone():
    layer = packed(draw(64, 32, 32))
    before = unpack_marlin_24(layer).q
    layer["B_24"][0, 4 * 9 + 2] ^= 0x10  # thread 9, instruction 2, nibble 1: row 8·2 + 2, column 10
    changed = (unpack_marlin_24(layer).q != before).nonzero()
    assert changed.tolist()[0][0] == 18
    assert len(changed) == 1
    assert changed[0, 1] // 4 == 5  # the eleventh value that is left is in the sixth four


GOOD = packed(draw(64, 384, 128))
CT_GOOD = packed(draw(64, 384, 128), COMPRESSED)


def broken(tensor, at, value):
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


@pytest.mark.parametrize(
    ("good", "name", "bad", "message"),
    [
        (GOOD, "B_24", None, "B_24 of L in F must be there"),
        (GOOD, "B_24", GOOD["B_24"].long(), "B_24 of L in F must be int32"),
        (GOOD, "B_24", GOOD["B_24"][:, :100], "B_24 of L in F must have a multiple of 128 columns"),
        (GOOD, "B_24", GOOD["B_24"][:11], r"B_meta of L in F must be \(11, 128\), got \(12, 128\)"),
        (GOOD, "B_24", GOOD["B_24"][0], "B_24 of L in F must be a matrix"),
        (GOOD, "B_meta", None, "B_meta of L in F must be there"),
        (GOOD, "B_meta", GOOD["B_meta"].view(64, 24), r"B_meta of L in F must be \(12, 128\)"),
        (GOOD, "B_meta", GOOD["B_meta"].int(), "B_meta of L in F must be int16"),
        (GOOD, "s", None, "s of L in F must be there"),
        (GOOD, "s", GOOD["s"][:, :63], "s of L in F must have 64 columns"),
        (GOOD, "s", GOOD["s"][:2], "s of L in F must be of groups of 128 or 384 columns, got 2"),
        (GOOD, "s", broken(GOOD["s"], (2, 5), float("nan")), "s of L in F must be finite"),
        (GOOD, "s", GOOD["s"].int(), "s of L in F must be floating"),
        (CT_GOOD, "meta", CT_GOOD["meta"][1:], r"meta of L in F must be \(12, 128\)"),
        (CT_GOOD, "scale_packed", CT_GOOD["scale_packed"].t(), "scale_packed of L in F must have"),
    ],
)
def test_what_does_not_fit_is_named(good, name, bad, message):
    tensors = {**good, name: bad}
    if bad is None:
        del tensors[name]
    unpack_marlin_24(good, where="L in F")
    with pytest.raises(ValueError, match=message):
        unpack_marlin_24(tensors, where="L in F")


def test_metadata_of_impossible_pairs_are_named():
    possible = {first | second << 2 for first, second in PAIRS}
    for code in range(16):
        word = signed((GOOD["B_meta"][7, 77].item() & 0xF0FF) | code << 8, 16)
        layer = {**GOOD, "B_meta": broken(GOOD["B_meta"], (7, 77), word)}
        if code in possible:
            unpack_marlin_24(layer)
            continue
        pair = rf"got \({code & 3}, {code >> 2}\)"
        with pytest.raises(ValueError, match=f"B_meta of L must name two of four columns .*{pair}"):
            unpack_marlin_24(layer, where="L")


def test_two_groups_that_writers_leave_in_another_order_are_refused():
    qw = draw(64, 256, 128)
    assert torch.equal(unpack_marlin_24(packed(qw)).scales, qw.scales)
    with pytest.raises(ValueError, match="scale_packed of L must not be two groups"):
        unpack_marlin_24(packed(qw, COMPRESSED), where="L")


GPTQ = {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False}
GPTQ |= {"checkpoint_format": "marlin_24", "group_size": 128}


def compressed_config(version="0.9.4", **weights):
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", **weights}
    weights.setdefault("group_size", 128 if weights["strategy"] == "group" else None)
    group = {"targets": ["Linear"], "weights": weights}
    config = {"quant_method": "compressed-tensors", "format": "marlin-24", "version": version}
    return {**config, "config_groups": {"group_0": group}, "sparsity_config": {"format": "dense"}}


def test_configs_are_read():
    assert Scheme.parse(GPTQ) == Scheme("gptq_marlin_24", None, (128,), True)
    named = {**GPTQ, "quant_method": "gptq_marlin_24", "checkpoint_format": None}
    assert Scheme.parse(named) == Scheme.parse(GPTQ)
    assert Scheme.parse({**GPTQ, "is_marlin_format": True}) == Scheme.parse(GPTQ)
    assert Scheme.parse({**GPTQ, "desc_act": True, "group_size": -1}).group_sizes == (-1,)
    assert Scheme.parse(compressed_config()) == Scheme("marlin-24", None, (128,), True)
    rows = compressed_config(version=None, strategy="channel")
    assert Scheme.parse(rows) == Scheme("marlin-24", None, (-1,), True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**GPTQ, "bits": 8}, "bits must be 4, got 8"),
        ({**GPTQ, "sym": False}, "symmetric must be true: 2:4 MARLIN has no zeros"),
        ({**GPTQ, "desc_act": True}, "act-order must be false: 2:4 MARLIN has no act-order"),
        (compressed_config(num_bits=8), "must be integers of 4 bits"),
        (compressed_config(symmetric=False), "symmetric must be true"),
        (compressed_config(actorder="group"), "act-order must be false"),
        (compressed_config(version="0.7.1"), "version must be 0.8 or later: .*, got '0.7.1'"),
        (compressed_config(version=None), "version must be 0.8 or later: .*, got None"),
    ],
)
def test_configs_of_what_the_layout_cannot_hold_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Scheme.parse(config)


def test_groups_of_two_formats_are_refused():
    config = compressed_config()
    other = {**config["config_groups"]["group_0"], "format": "pack-quantized"}
    config["config_groups"]["group_1"] = other
    with pytest.raises(ValueError, match="format must be one for all groups, got .'marlin-24', 'p"):
        Scheme.parse(config)


def folder_of(path, layers, quantization, **rest):
    tensors = {f"{name}.{own}": t for name, layer in layers.items() for own, t in layer.items()}
    path.mkdir(exist_ok=True)
    save_file({**tensors, **rest}, path / "model.safetensors")
    content = {"quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("names", "quantization"), [(SERVER, GPTQ), (COMPRESSED, compressed_config())]
)
def test_a_folder_is_loaded_packed_and_saved(names, quantization, tmp_path):
    qw = draw(128, 384, 128)
    bias = torch.arange(128.0)
    path = folder_of(tmp_path / "a", {"0": packed(qw, names)}, quantization, **{"0.bias": bias})
    model = load_quantized(path, into=nn.Sequential(nn.Linear(384, 128)))
    assert torch.equal(model[0].dequantize(), dequantize(qw))
    x = torch.randn(3, 384, generator=torch.Generator().manual_seed(0))
    wanted = x @ dequantize(qw).t() + bias
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-4)  # sums of some hundreds
    save_quantized(model, tmp_path / "b")
    assert compress_24(model) == ["0"]
    assert isinstance(model[0], SparseQuantLinear)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-4)
    again = load_quantized(tmp_path / "b", into=nn.Sequential(nn.Linear(384, 128)))
    assert torch.equal(again[0].dequantize(), dequantize(qw))
    with pytest.raises(ValueError, match="format must be one of 'gptq_v1', "):
        save_quantized(model, tmp_path / "c", format="marlin-24")


def test_layers_of_a_server_are_replaced_in_place():
    qw = draw(64, 128, 128)
    layer = nn.Module()
    for name, tensor in packed(qw).items():
        layer.register_buffer(name, tensor)
    model = nn.Sequential(layer)
    model.config = type("Config", (), {"quantization_config": GPTQ})
    assert torch.equal(load_quantized(model)[0].dequantize(), dequantize(qw))


def test_errors_name_layer_and_file(tmp_path):
    layer = packed(draw(64, 128, 128))
    layer["B_meta"][0, 0] = 0
    path = folder_of(tmp_path, {"proj": layer}, GPTQ)
    model = nn.Module()
    model.proj = nn.Linear(128, 64, bias=False)
    where = "B_meta of proj in model.safetensors must name two of four columns"
    with pytest.raises(ValueError, match=where):
        load_quantized(path, into=model)
    folder_of(tmp_path, {"proj": packed(draw(64, 128, 128))}, {**GPTQ, "group_size": 64})
    with pytest.raises(ValueError, match="scales of proj in .* must have groups of 64 columns"):
        load_quantized(path, into=model)


@pytest.mark.parametrize("tool", ["gptq", "gptq_marlin_24", "compressed-tensors"])
def test_transformers_loads_a_folder(tool, tmp_path):
    transformers = pytest.importorskip("transformers")
    from batchery.compress.quant.transformers_plugin import transformers_enabled

    sizes = {"vocab_size": 32, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    config = transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = transformers.LlamaForCausalLM(config).eval()
    names = COMPRESSED if tool == "compressed-tensors" else SERVER
    layers = {}
    for name, linear in dense.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            qw = quantize_rtn_24(linear.weight)
            layers[name] = packed(qw, names)
            linear.weight.data.copy_(dequantize(qw))
    skipped = {"lm_head.weight", *(f"{name}.weight" for name in layers)}
    rest = {name: t for name, t in dense.state_dict().items() if name not in skipped}
    quantization = compressed_config() if names is COMPRESSED else {**GPTQ, "quant_method": tool}
    folder_of(tmp_path, layers, quantization, **rest)
    content = {**config.to_dict(), "quantization_config": quantization}
    content["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    tokens = torch.arange(24).view(2, 12) % 32
    with transformers_enabled():
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 7
        found, wanted = model(tokens).logits, dense(tokens).logits
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="is not written: save_quantized writes other formats"):
            model.save_pretrained(tmp_path / "b")
    assert torch.equal(load_quantized(tmp_path)(tokens).logits, found)
