# SPDX-License-Identifier: Apache-2.0
"""Layouts against words written out by hand, against slow packers, and round trips."""

import dataclasses

import pytest
import torch

from batchery.compress.quant.formats import (
    from_words,
    pack_awq,
    pack_compressed_tensors,
    pack_gptq,
    to_words,
    unpack_awq,
    unpack_compressed_tensors,
    unpack_gptq,
)
from batchery.compress.quant.formats_marlin import pack_marlin, unpack_marlin
from batchery.compress.quant.partition import (
    fold_act_order,
    join_outputs,
    slice_inputs,
    slice_outputs,
)
from batchery.compress.quant.scheme import Scheme, layers_of
from batchery.compress.quant.weight import QuantizedWeight, dequantize


def draw(n, k, group, *, zeros=False, act_order=False, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def nibbles(*shape):
        return torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator)

    groups = k // group
    scales = torch.rand(n, groups, generator=generator).mul(0.01).add(1e-3).to(dtype)
    z = nibbles(n, groups)
    z[0, 0] = 3  # not all 8
    order = torch.arange(k) // group
    g_idx = order[torch.randperm(k, generator=generator)].int()
    q = nibbles(n, k)
    return QuantizedWeight(q, scales, z if zeros else None, g_idx if act_order else None, group)


def assert_same(found, wanted):
    assert found.group_size == wanted.group_size
    for field in ("q", "scales", "zeros", "g_idx"):
        a, b = getattr(found, field), getattr(wanted, field)
        assert (a is None) == (b is None), field
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), field


def words(*values):
    """Int32 from unsigned literals."""
    return torch.tensor([v - 2**32 if v >= 2**31 else v for v in values], dtype=torch.int32)


def weight_of(q, zeros=None):
    q = torch.tensor(q, dtype=torch.uint8)
    scales = torch.full((len(q), 1), 0.5, dtype=torch.float16)
    zeros = None if zeros is None else torch.tensor(zeros, dtype=torch.uint8)[:, None]
    return QuantizedWeight(q, scales, zeros, None, q.shape[1])


RISING = [0, 1, 2, 3, 4, 5, 6, 7]
FALLING = [15, 14, 13, 12, 11, 10, 9, 8]


def test_gptq_words_written_by_hand():
    qw = weight_of([RISING, FALLING] + [[0] * 8] * 6, zeros=[1, 2, 3, 4, 5, 6, 7, 0])
    packed = pack_gptq(qw, version=2)
    assert torch.equal(packed["qweight"], words(0x76543210, 0x89ABCDEF, 0, 0, 0, 0, 0, 0)[None])
    assert torch.equal(packed["qzeros"], words(0x07654321)[None])
    assert torch.equal(packed["scales"], torch.full((1, 8), 0.5, dtype=torch.float16))
    assert torch.equal(packed["g_idx"], torch.zeros(8, dtype=torch.int32))
    # version 1: each less one, without borrowing from a neighbour
    assert torch.equal(pack_gptq(qw, version=1)["qzeros"], words(0xF6543210)[None])


def test_awq_words_written_by_hand():
    # column 0 of the weight has 1…8 in rows 0…7: nibble i holds row (0,2,4,6,1,3,5,7)[i]
    q = [[row + 1] + [0] * 7 for row in range(8)]
    packed = pack_awq(weight_of(q, zeros=[1, 2, 3, 4, 5, 6, 7, 8]))
    assert torch.equal(packed["qweight"], words(0x86427531, 0, 0, 0, 0, 0, 0, 0)[:, None])
    assert torch.equal(packed["qzeros"], words(0x86427531)[None])


def test_compressed_tensors_words_written_by_hand():
    qw = weight_of([[*RISING, 9, 10]] * 2, zeros=[3, 5])
    packed = pack_compressed_tensors(qw)
    assert torch.equal(packed["weight_packed"], words(0x76543210, 0xA9).repeat(2, 1))
    assert torch.equal(packed["weight_zero_point"], words(0x53)[None])
    assert torch.equal(packed["weight_shape"], torch.tensor([2, 10]))
    assert torch.equal(packed["weight_scale"], qw.scales)
    assert "weight_zero_point" not in pack_compressed_tensors(weight_of([RISING]))


def test_marlin_words_written_by_hand():
    # Thread 0 holds of tile 0: rows 0, 1, 8, 9 of columns 0 and 8; thread 5 (row pair 2, column 1)
    # rows 2, 3, 10, 11 of columns 1 and 9; word t·4 + j is thread t's of tile j.
    q = torch.zeros(256, 128, dtype=torch.uint8)
    for value, (k, n) in enumerate(
        ((0, 0), (1, 0), (8, 0), (9, 0), (0, 8), (1, 8), (8, 8), (9, 8))
    ):
        q[n, k] = value + 1
    q[17, 3] = 15  # row 3, column 1 of tile 1
    qw = QuantizedWeight(q, torch.ones(256, 1, dtype=torch.float16), None, None, 128)
    packed = pack_marlin(qw)
    assert packed["B"].shape == (8, 512)
    # the eight values 1…8, evens before odds: 1 3 5 7 2 4 6 8 from the lowest nibble up
    assert torch.equal(packed["B"][0, :1], words(0x86427531))
    assert torch.equal(packed["B"][0, 4 * 5 + 1][None], words(0x000F0000))
    assert int((packed["B"] != 0).sum()) == 2


def test_marlin_scales_written_by_hand():
    scales = torch.arange(512).view(2, 256).t().half()
    q = torch.zeros(256, 256, dtype=torch.uint8)
    grouped = pack_marlin(QuantizedWeight(q, scales, None, None, 128))["s"]
    assert grouped.shape == (2, 256)
    assert grouped[0, :10].tolist() == [0, 8, 16, 24, 32, 40, 48, 56, 1, 9]
    assert grouped[1, 64:67].tolist() == [256 + 64, 256 + 72, 256 + 80]
    single = pack_marlin(QuantizedWeight(q[:, :128], scales[:, :1], None, None, 128))["s"]
    assert single[0, :10].tolist() == [0, 1, 8, 9, 16, 17, 24, 25, 2, 3]
    assert single[0, 32:34].tolist() == [32, 33]


def nibble(word, place):
    return int(word) >> 4 * place & 15


def test_layouts_read_value_by_value():
    qw = draw(16, 32, 16, zeros=True, act_order=True)
    plain = dataclasses.replace(qw, g_idx=None)
    one, two, awq = pack_gptq(qw, version=1), pack_gptq(qw), pack_awq(plain)
    ct = pack_compressed_tensors(qw)
    place = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}  # of a row of eight, in AWQ
    for n in range(16):
        for k in range(32):
            q = int(qw.q[n, k])
            assert nibble(one["qweight"][k // 8, n], k % 8) == q
            assert nibble(awq["qweight"][k, n // 8], place[n % 8]) == q
            assert nibble(ct["weight_packed"][n, k // 8], k % 8) == q
        for g in range(2):
            z = int(qw.zeros[n, g])
            assert (nibble(one["qzeros"][g, n // 8], n % 8) + 1) % 16 == z
            assert nibble(two["qzeros"][g, n // 8], n % 8) == z
            assert nibble(awq["qzeros"][g, n // 8], place[n % 8]) == z
            assert nibble(ct["weight_zero_point"][n // 8, g], n % 8) == z


SHAPES = [(8, 32, 32), (16, 64, 32), (24, 192, 64), (40, 256, 128), (64, 512, 256), (8, 200, 200)]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_and_unpacking_is_the_identity(shape, zeros, act_order):
    n, k, group = shape
    act_order = act_order and group < k
    qw = draw(n, k, group, zeros=zeros, act_order=act_order)
    for version in (1, 2):
        packed = pack_gptq(qw, version=version)
        assert_same(unpack_gptq(packed, version=version, symmetric=not zeros), qw)
    assert_same(unpack_compressed_tensors(pack_compressed_tensors(qw)), qw)
    if not act_order:
        assert_same(unpack_awq(pack_awq(qw)), qw)


@pytest.mark.parametrize("shape", [(1, 5, 5), (7, 33, 11), (13, 96, 32)])
def test_compressed_tensors_takes_any_shape_and_dtype(shape):
    for dtype in (torch.bfloat16, torch.float32):
        qw = draw(*shape, zeros=True, dtype=dtype)
        assert_same(unpack_compressed_tensors(pack_compressed_tensors(qw)), qw)


@pytest.mark.parametrize("shape", [(256, 128, 128), (512, 384, 128), (256, 256, 256)])
def test_marlin_round_trip(shape):
    qw = draw(*shape)
    packed = pack_marlin(qw)
    assert_same(unpack_marlin(packed), qw)


def test_words_and_nibbles():
    values = torch.arange(12, dtype=torch.uint8)
    assert torch.equal(to_words(values), words(0x76543210, 0x0000BA98))
    assert torch.equal(from_words(words(0xFEDCBA98)), torch.arange(8, 16, dtype=torch.uint8))


def test_older_zero_points_of_compressed_tensors_are_read():
    qw = draw(8, 64, 32, zeros=True)
    packed = pack_compressed_tensors(qw)
    packed["weight_zero_point"] = qw.zeros.to(torch.int8) - 8
    assert_same(unpack_compressed_tensors(packed), qw)


def test_group_indices_that_say_nothing_are_dropped():
    qw = draw(8, 64, 32)
    packed = pack_compressed_tensors(qw)
    for g_idx in (torch.full((64,), -1), torch.arange(64) // 32):
        assert unpack_compressed_tensors({**packed, "weight_g_idx": g_idx}).g_idx is None
    assert unpack_gptq(pack_gptq(qw), symmetric=True).g_idx is None


@pytest.mark.parametrize("label", [None, 1, 2])
@pytest.mark.parametrize("version", [1, 2])
def test_a_symmetric_weight_says_itself_what_its_zeros_mean(version, label):
    qw = draw(16, 64, 32)
    packed = pack_gptq(qw, version=version)
    assert_same(unpack_gptq(packed, version=label, symmetric=True), qw)


def test_zeros_of_a_version_that_is_not_known_are_refused():
    packed = pack_gptq(draw(16, 64, 32, zeros=True), version=1)
    where = "model.layers.0.q_proj in a.safetensors"
    with pytest.raises(ValueError, match=r"qzeros of .*q_proj in a.safetensors hold z - 1 or z\?"):
        unpack_gptq(packed, where=where)
    with pytest.raises(ValueError, match="qzeros of .* must be 7 .* or 8 .* symmetric"):
        unpack_gptq(packed, version=2, symmetric=True, where=where)


def test_a_wrong_version_is_one_scale_off():
    qw = draw(16, 64, 32, zeros=True)
    shifted = unpack_gptq(pack_gptq(qw, version=2), version=1)
    inner = (qw.zeros < 15).repeat_interleave(32, 1)
    off = dequantize(qw) - dequantize(shifted)
    step = qw.scales.float().repeat_interleave(32, 1)
    torch.testing.assert_close(off[inner], step[inner], rtol=1e-5, atol=0)


GPTQ = pack_gptq(draw(16, 64, 32, zeros=True, act_order=True))
AWQ = pack_awq(draw(16, 64, 32, zeros=True))
CT = pack_compressed_tensors(draw(16, 64, 32, zeros=True, act_order=True))
MARLIN = pack_marlin(draw(256, 128, 128))


def broken(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[5] = value
    return tensor


@pytest.mark.parametrize(
    ("good", "name", "bad", "message"),
    [
        (GPTQ, "qweight", None, "qweight of L in F must be there"),
        (GPTQ, "qweight", GPTQ["qweight"].long(), "qweight of L in F must be int32"),
        (GPTQ, "qweight", GPTQ["qweight"][:, :12], "qweight of L in F must have a multiple of 8"),
        (GPTQ, "qzeros", GPTQ["qzeros"][:, :1], r"qzeros of L in F must be \(2, 2\), got \(2, 1\)"),
        (GPTQ, "scales", GPTQ["scales"][:, :9], "scales of L in F must have 16 columns"),
        (GPTQ, "scales", broken(GPTQ["scales"], float("nan")), "scales of L in F must be finite"),
        (GPTQ, "scales", broken(GPTQ["scales"], float("inf")), "scales of L in F must be finite"),
        (GPTQ, "scales", GPTQ["scales"].int(), "scales of L in F must be floating"),
        (GPTQ, "g_idx", GPTQ["g_idx"][:-1], r"g_idx of L in F must be \(64,\), got \(63,\)"),
        (GPTQ, "g_idx", broken(GPTQ["g_idx"], 2), "g_idx of L in F must be in 0…1, got 2"),
        (GPTQ, "g_idx", broken(GPTQ["g_idx"], -1), "g_idx of L in F must be in 0…1, got -1"),
        (GPTQ, "g_idx", broken(GPTQ["g_idx"], 1 - int(GPTQ["g_idx"][5])), "every group 32 columns"),
        (GPTQ, "g_idx", GPTQ["g_idx"].float(), "g_idx of L in F must be integers"),
        (AWQ, "qweight", AWQ["qweight"][:63], "scales of L in F must cut 63 columns"),
        (AWQ, "qzeros", AWQ["qzeros"][:1], r"qzeros of L in F must be \(2, 2\)"),
        (CT, "weight_packed", CT["weight_packed"][:, :7], "weight_packed of L in F must be"),
        (CT, "weight_shape", torch.tensor([16, 65]), "weight_packed of L in F must be"),
        (CT, "weight_shape", torch.tensor([16]), "weight_shape of L in F must be"),
        (CT, "weight_scale", broken(CT["weight_scale"], float("nan")), "weight_scale of L in F"),
        (CT, "weight_zero_point", CT["weight_zero_point"][:1], "weight_zero_point of L in F"),
        (CT, "weight_g_idx", broken(CT["weight_g_idx"], 7), "weight_g_idx of L in F must be in"),
        (MARLIN, "B", MARLIN["B"][:, :100], "B of L in F must have a multiple of 128"),
        (MARLIN, "s", MARLIN["s"][:, :100], "s of L in F must have 256 columns"),
    ],
)
def test_what_does_not_fit_is_named(good, name, bad, message):
    tensors = {**good, name: bad}
    if bad is None:
        del tensors[name]
    read = {
        id(GPTQ): lambda t, where: unpack_gptq(t, version=2, where=where),
        id(AWQ): unpack_awq,
        id(CT): unpack_compressed_tensors,
        id(MARLIN): unpack_marlin,
    }[id(good)]
    read(good, where="L in F")
    with pytest.raises(ValueError, match=message):
        read(tensors, where="L in F")


@pytest.mark.parametrize(
    ("pack", "weight", "message"),
    [
        (pack_gptq, draw(12, 64, 32), "N must be a multiple of 8 .*, got 12"),
        (pack_gptq, draw(16, 36, 36), "K must be a multiple of 8 .*, got 36"),
        (pack_awq, draw(12, 64, 32), "N must be a multiple of 8"),
        (pack_awq, draw(16, 64, 32, act_order=True), "AWQ has no act-order"),
        (pack_marlin, draw(256, 128, 128, zeros=True), "MARLIN is symmetric"),
        (pack_marlin, draw(256, 128, 64, act_order=True), "MARLIN has no act-order"),
        (pack_marlin, draw(128, 128, 128), "N must be a multiple of 256"),
        (pack_marlin, draw(256, 64, 64), "K must be a multiple of 128"),
        (pack_marlin, draw(256, 128, 64), "group_size must be 128"),
    ],
)
def test_what_a_format_cannot_hold_is_named(pack, weight, message):
    with pytest.raises(ValueError, match=message):
        pack(weight)


@pytest.mark.parametrize("factor", [1e-7, 1e8])
def test_scales_outside_float16_are_refused(factor):
    qw = draw(16, 64, 32, dtype=torch.float32)
    with pytest.raises(ValueError, match="scales must be in the range of float16"):
        pack_gptq(dataclasses.replace(qw, scales=qw.scales * factor))


CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
CT_CONFIG = Scheme("compressed-tensors", None, (64,), False).config(["lm_head"])


def test_configs_of_the_tools_are_read():
    assert Scheme.parse(CONFIG) == Scheme("gptq", None, (128,), True)
    assert Scheme.parse({**CONFIG, "checkpoint_format": "gptq"}).version == 1
    assert Scheme.parse({**CONFIG, "checkpoint_format": "gptq_v2"}).version == 2
    assert Scheme.parse(CONFIG, form="gptq_v2").version == 2
    assert Scheme.parse({**CONFIG, "desc_act": True, "group_size": -1}).act_order
    assert Scheme.parse({**CONFIG, "is_marlin_format": True}).family == "marlin"
    bare = {key: value for key, value in CONFIG.items() if key != "quant_method"}
    assert Scheme.parse(bare) == Scheme.parse(CONFIG)
    dynamic = {"+:.*down.*": {"group_size": 32}, "-:^lm_head$": {}}
    assert Scheme.parse({**CONFIG, "dynamic": dynamic}).group_sizes == (32, 128)
    awq = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}
    assert Scheme.parse({**awq, "version": "GEMM"}) == Scheme("awq", None, (64,))
    assert Scheme.parse({"w_bit": 4, "q_group_size": 64}, form="awq") == Scheme("awq", None, (64,))
    assert Scheme.parse(CT_CONFIG) == Scheme("compressed-tensors", None, (64,), False)


@pytest.mark.parametrize("form", ["gptq_v1", "gptq_v2", "awq", "compressed-tensors", "marlin"])
@pytest.mark.parametrize("size", [-1, 64])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_config_that_is_written_is_read_alike(form, size, act_order):
    family = form.partition("_v")[0]
    version = {"gptq_v1": 1, "gptq_v2": 2}.get(form)
    act_order = act_order and family in ("gptq", "compressed-tensors")
    symmetric = None if family in ("awq", "marlin") else True
    scheme = Scheme(family, version, (size,), symmetric, act_order)
    assert Scheme.parse(scheme.config(["lm_head"])) == scheme


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**CONFIG, "bits": 8}, "bits must be 4, got 8"),
        ({**CONFIG, "quant_method": "hqq"}, "quant_method must be one of"),
        ({**CONFIG, "checkpoint_format": "bitblas"}, "checkpoint_format must be one of"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version must be one of 'gemm'"),
        ({**CT_CONFIG, "format": "int-quantized"}, "format must be one of 'pack-quantized'"),
        ({**CT_CONFIG, "config_groups": {}}, "config_groups must name a group"),
        ({}, "quant_method must be one of"),
    ],
)
def test_configs_of_other_weights_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Scheme.parse(config)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("num_bits", 8, "must be integers of 4 bits"),
        ("type", "float", "must be integers of 4 bits"),
        ("strategy", "tensor", "strategy must be one of"),
    ],
)
def test_other_weights_of_compressed_tensors_are_refused(entry, value, message):
    group = CT_CONFIG["config_groups"]["group_0"]
    group = {**group, "weights": {**group["weights"], entry: value}}
    with pytest.raises(ValueError, match=message):
        Scheme.parse({**CT_CONFIG, "config_groups": {"group_0": group}})


def test_quantised_activations_are_refused():
    group = {**CT_CONFIG["config_groups"]["group_0"], "input_activations": {"num_bits": 8}}
    with pytest.raises(ValueError, match="input_activations must be None"):
        Scheme.parse({**CT_CONFIG, "config_groups": {"group_0": group}})


def test_a_group_size_that_the_config_does_not_say_is_refused():
    with pytest.raises(ValueError, match="scales of L in F must have groups of 128 .*, got 32"):
        Scheme.parse(CONFIG).read(pack_gptq(draw(16, 64, 32)), "L in F")
    whole = pack_gptq(draw(16, 64, 64))
    assert Scheme.parse({**CONFIG, "group_size": -1}).read(whole, "L in F").group_size == 64


def test_layers_are_found_by_their_words():
    names = [f"h.{k}.{own}" for k in range(2) for own in ("qweight", "qzeros", "scales", "bias")]
    found = layers_of([*names, "lm_head.weight"], "gptq")
    assert list(found) == ["h.0", "h.1"]
    assert found["h.1"] == {own: f"h.1.{own}" for own in ("qweight", "qzeros", "scales")}


@pytest.mark.parametrize("act_order", [False, True])
def test_slices_of_outputs_are_rows(act_order):
    qw = draw(24, 128, 32, zeros=True, act_order=act_order)
    parts = [slice_outputs(qw, 0, 8), slice_outputs(qw, 8, 24)]
    assert torch.equal(dequantize(parts[1]), dequantize(qw)[8:])
    assert_same(join_outputs(parts), qw)


def test_slices_of_inputs_are_columns():
    qw = draw(24, 128, 32, zeros=True)
    assert torch.equal(dequantize(slice_inputs(qw, 32, 128)), dequantize(qw)[:, 32:])
    whole = draw(24, 128, 128, zeros=True)
    part = slice_inputs(whole, 40, 128)
    assert part.group_size == 88
    assert torch.equal(dequantize(part), dequantize(whole)[:, 40:])


@pytest.mark.parametrize("act_order", [False, True])
def test_an_act_order_folds_into_the_layers_before(act_order):
    down = draw(24, 128, 32, zeros=True, act_order=act_order)
    gate, up = draw(128, 64, 32, zeros=True), draw(128, 64, 32, act_order=True, seed=1)
    x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    biases = torch.randn(2, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def mlp(down, gate, up, biases):
        w_down, w_gate, w_up = (dequantize(qw, torch.float64) for qw in (down, gate, up))
        h = torch.nn.functional.silu(x @ w_gate.T + biases[0]) * (x @ w_up.T + biases[1])
        return h @ w_down.T

    wanted = mlp(down, gate, up, biases)
    folded, halves, order = fold_act_order(down, [gate, up])
    assert (order is None) == (not act_order)
    assert folded.g_idx is None
    moved = biases if order is None else biases[:, order]
    torch.testing.assert_close(mlp(folded, *halves, moved), wanted, rtol=1e-10, atol=1e-10)
    assert halves[0].g_idx is None
    assert torch.equal(halves[1].g_idx, up.g_idx)
    # what act-order refuses: the inputs may now lie on two ranks
    parts = [
        (slice_inputs(folded, b, b + 64), [h.rows(b, b + 64) for h in halves]) for b in (0, 64)
    ]
    summed = sum(
        mlp(part, *rows, moved[:, b : b + 64])
        for b, (part, rows) in zip((0, 64), parts, strict=True)
    )
    torch.testing.assert_close(summed, wanted, rtol=1e-10, atol=1e-10)


def test_groups_that_lie_in_order_are_left_where_they_are():
    down, up = draw(24, 128, 32), draw(128, 64, 32)
    sorted_ = dataclasses.replace(down, g_idx=down.groups.int())
    folded, (same,), order = fold_act_order(sorted_, [up])
    assert order is None
    assert same is up
    assert_same(folded, down)


def test_joined_weights_of_mixed_zeros():
    a, b = draw(8, 64, 32), draw(16, 64, 32, zeros=True, seed=1)
    joined = join_outputs([a, b])
    assert torch.equal(dequantize(joined), torch.cat([dequantize(a), dequantize(b)]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: slice_outputs(draw(24, 64, 32), 4, 16), "begin must be a multiple of 8 up to 24"),
        (lambda: slice_outputs(draw(24, 64, 32), 8, 32), "end must be a multiple of 8 up to 24"),
        (lambda: slice_outputs(draw(24, 64, 32), 16, 8), "end must be above 16, got 8"),
        (lambda: slice_inputs(draw(8, 64, 32), 8, 64), "begin must be a multiple of 32 up to 64"),
        (
            lambda: slice_inputs(draw(8, 64, 32, act_order=True), 0, 32),
            "g_idx must be None: act-order spreads the columns of a group over all ranks",
        ),
        (
            lambda: fold_act_order(
                draw(8, 64, 32, act_order=True), [draw(64, 32, 32), draw(32, 32, 32)]
            ),
            r"fold_act_order: before\[1\] must have N = 64, got 32",
        ),
        (
            lambda: fold_act_order(
                dataclasses.replace(draw(8, 64, 32), g_idx=torch.zeros(64).int()), []
            ),
            "fold_act_order: g_idx must give every group 32 columns",
        ),
        (lambda: join_outputs([]), "parts must not be empty"),
        (lambda: join_outputs([draw(8, 64, 32), draw(8, 32, 32)]), r"parts\[1\] must have K = 64"),
        (lambda: join_outputs([draw(8, 64, 32), draw(8, 64, 64)]), "must have groups of 32"),
        (
            lambda: join_outputs([draw(8, 64, 32), draw(8, 64, 32, act_order=True)]),
            r"parts\[1\] must have the same g_idx",
        ),
    ],
)
def test_cuts_and_joins_that_make_no_sense_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
