# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from torch import nn

from batchery.compress.quant import (
    dequantize,
    gptq_quantize_model,
    quantize_rtn,
    rtn_quantize_model,
)
from batchery.compress.quant.calibration import cut_padding, ready_to_watch

HOW = {"group_size": -1, "progress": False}


class Stack(nn.Module):
    def __init__(self, count=2, width=8):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def quantise(how, model, **given):
    if how == "rtn":
        return rtn_quantize_model(model, group_size=-1, **given)
    return gptq_quantize_model(model, [torch.randn(4, 10, 8)], **HOW, **given).weights


both = pytest.mark.parametrize("how", ["rtn", "gptq"])


@both
def test_one_string_is_no_list_of_patterns(how):
    with pytest.raises(TypeError, match="exclude must be a sequence of patterns, got str"):
        quantise(how, Stack(), exclude="*.down_proj")


@both
def test_nothing_to_quantise_is_refused(how):
    with pytest.raises(ValueError, match=r"exclude must leave a layer of blocks, got \('\*',\)"):
        quantise(how, Stack(), exclude=("*",))


IDS = torch.arange(64).view(4, 16)


@pytest.mark.parametrize("shape", [(4, 9), (3, 16), (16,), (4, 16, 1), (4, 1, 16, 16)])
@pytest.mark.parametrize("argument", ["input_ids", "inputs_embeds", "x"])
def test_a_mask_of_another_shape_is_refused(shape, argument):
    batch = {argument: torch.rand(4, 16, 2) if argument == "inputs_embeds" else IDS}
    with pytest.raises(ValueError, match="me: attention_mask must "):
        cut_padding("me", batch | {"attention_mask": torch.ones(shape)})


def test_what_is_no_batch_of_ids_is_refused():
    with pytest.raises(TypeError, match="input_ids must be a tensor, got list"):
        cut_padding("me", {"input_ids": [[1, 2], [3, 4]]})
    with pytest.raises(TypeError, match="attention_mask must be a tensor, got list"):
        cut_padding("me", {"input_ids": IDS, "attention_mask": [[1] * 16] * 4})
    with pytest.raises(ValueError, match=r"calibration must hold token ids \(B, T\), got \(16,\)"):
        cut_padding("me", IDS[0])
    with pytest.raises(ValueError, match=r"input_ids must hold token ids \(B, T\), got \(16,\)"):
        cut_padding("me", {"input_ids": IDS[0]})
    with pytest.raises(TypeError, match="calibration must yield tensors or mappings, got list"):
        gptq_quantize_model(Stack(), [[1, 2]], **HOW)


@pytest.mark.parametrize("batch", [torch.randn(4, 10, 8), {"x": torch.randn(4, 10, 8)}, "text"])
def test_one_batch_is_no_calibration(batch):
    kind = type(batch).__name__
    with pytest.raises(TypeError, match=f"must be an iterable of batches, got {kind}"):
        gptq_quantize_model(Stack(), batch, **HOW)


class Experts(nn.Module):
    """Stacked experts, their shapes told by whoever makes them."""

    def __init__(self, gate_up, down):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(gate_up))
        self.down_proj = nn.Parameter(torch.randn(down))

    def forward(self, x, index, shares):
        raise NotImplementedError


class Block(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.mixer = nn.Linear(8, 8)
        self.experts = experts

    def forward(self, x):
        return self.mixer(x)


def mixture(transposed, says):
    shapes = ((2, 8, 24), (2, 12, 8)) if transposed else ((2, 24, 8), (2, 8, 12))
    if says:
        shapes = ((2, 8, 8), (2, 8, 8))
    model = Stack()
    model.blocks = nn.ModuleList(Block(Experts(*shapes)) for _ in range(2))
    if says:
        for block in model.blocks:
            block.experts.is_transposed = transposed
    return model


@both
@pytest.mark.parametrize("transposed", [True, False])
def test_experts_of_another_form_must_be_excluded(how, transposed):
    model = mixture(transposed, True)  # without transformers' own gate
    before = {name: x.clone() for name, x in model.state_dict().items()}
    rule = r"exclude must hold '\*\.experts\.\*', as blocks\.0\.experts is of no known form"
    with pytest.raises(ValueError, match=rule):
        quantise(how, model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert len(quantise(how, model, exclude=("*.experts.*",))) == 2
    stacks = [name for name in before if ".experts." in name]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in stacks)


def test_all_patterns_to_exclude_are_named_at_once():
    model = mixture(False, True)
    for block in model.blocks:
        block.other = Experts((2, 8, 8), (2, 8, 8))
    rule = r"exclude must hold '\*\.experts\.\*', '\*\.other\.\*', as blocks\.0\.experts is"
    with pytest.raises(ValueError, match=rule):
        quantise("rtn", model)
    assert len(quantise("rtn", model, exclude=("*.experts.*", "*.other.*"))) == 2


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_experts_that_say_how_they_combine_are_taken(transposed, says, monkeypatch):
    moe = pytest.importorskip("transformers.integrations.moe")
    monkeypatch.setattr(Experts, "_apply_gate", moe._default_apply_gate, raising=False)
    model = mixture(transposed, says)
    stack = model.blocks[1].experts.down_proj.detach().clone()
    weights = quantise("rtn", model)
    assert len(weights) == 2 * 5
    weight = stack[1].T if transposed else stack[1]
    wanted = quantize_rtn(weight, group_size=-1)
    assert torch.equal(weights["blocks.1.experts.down_proj.1"].q, wanted.q)
    found = model.blocks[1].experts.down_proj.detach()[1]
    assert torch.equal(found.T if transposed else found, dequantize(wanted))


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 32)
        self.down = nn.Linear(32, 8)

    def forward(self, x):
        return self.down(self.up(x))


@both
def test_a_fragment_is_refused(how):
    model = Stack(3)
    model.body = nn.ModuleDict({"layers": nn.ModuleList([Wide(), nn.Linear(8, 8)])})
    with pytest.raises(ValueError, match=r"one list of blocks; .* got '192 in blocks, 576 outside"):
        quantise(how, model)
    quantise(how, model, exclude=("body.*",))  # meant so


def test_a_list_that_is_excluded_is_not_chosen():
    model = Stack(3)
    model.body = nn.ModuleDict({"layers": nn.ModuleList([Wide(), Wide()])})
    weights = quantise("rtn", model, exclude=("blocks.*",))
    assert len(weights) == 4
    assert all(name.startswith("body.layers.") for name in weights)


def test_a_smaller_part_that_stays_is_told(caplog):
    model = Stack(3)
    quantise("rtn", model)
    assert not caplog.records
    model.body = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8)])})
    quantise("rtn", model)
    assert "stay as they are: 192 in blocks, 64 outside it" in caplog.text


def test_heads_and_tied_weights_do_not_count():
    model = Stack(1)
    model.head = nn.Linear(8, 999)
    assert len(quantise("rtn", model)) == 1
    model = Stack(1)
    model.inner = nn.ModuleDict({"head": nn.Linear(8, 999)})
    with pytest.raises(ValueError, match="64 in blocks, 7992 outside it"):
        quantise("rtn", model)
    model.get_output_embeddings = lambda: model.inner["head"]
    assert len(quantise("rtn", model)) == 1
    model = Stack(1)
    model.again = nn.ModuleDict({str(place): model.blocks[0] for place in range(3)})
    model.again["own"] = nn.Linear(8, 8)
    model.again["own"].weight = model.blocks[0].weight
    assert len(quantise("rtn", model)) == 1


@pytest.mark.parametrize("kind", ["Bart", "T5"])
def test_an_encoder_with_a_decoder_is_refused(kind):
    transformers = pytest.importorskip("transformers")
    if kind == "Bart":
        config = transformers.BartConfig(
            vocab_size=64,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
        )
        model = transformers.BartForConditionalGeneration(config)
    else:
        config = transformers.T5Config(
            vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
        )
        model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"one list of blocks.* in .*encoder.*, \d+ outside it"):
        rtn_quantize_model(model, group_size=-1)


def test_every_module_keeps_its_mode():
    model = Stack(3).train()
    model.blocks[1].eval()
    with ready_to_watch(model):
        assert not any(module.training for module in model.modules())
    assert [block.training for block in model.blocks] == [True, False, True]
    assert model.training


class Remembering(nn.Linear):
    """A block that adds up all that it and those before it have seen, if a cache is given."""

    def forward(self, x, past_key_values=None):
        if past_key_values is not None:
            past_key_values.append(x)
            x = sum(past_key_values)
        return x + super().forward(x)


class Caching(Stack):
    def forward(self, x):
        cache = []
        for block in self.blocks:
            x = block(x, past_key_values=cache)
        return x


def test_caches_of_one_run_are_not_those_of_the_next():
    x, reports = torch.randn(4, 10, 8), []
    blocks = nn.ModuleList(Remembering(8, 8) for _ in range(3))
    for kind in (Stack, Caching):
        model = kind()
        model.blocks = copy.deepcopy(blocks)
        reports.append(gptq_quantize_model(model, [x], **HOW).layers)
    plain, cached = ([(layer.error, layer.rtn_error) for layer in own] for own in reports)
    assert plain == cached


class Product(nn.Linear):
    """A linear layer that transposes its weight itself."""

    def __init__(self, product):
        super().__init__(8, 8)
        self.product = product

    def forward(self, x):
        return self.product(x, self.weight) + self.bias


PRODUCTS = [
    lambda x, w: x @ w.T,
    lambda x, w: torch.matmul(x, w.t()),
    lambda x, w: torch.matmul(x, other=w.t()),
    lambda x, w: x.matmul(w.transpose(0, 1)),
]


@pytest.mark.parametrize("product", PRODUCTS)
def test_products_with_a_transposed_weight_are_seen(product):
    plain, x = Stack(), torch.randn(4, 10, 8)
    model = Stack()
    model.blocks = nn.ModuleList(Product(product) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    wanted = gptq_quantize_model(plain, [x], **HOW)
    found = gptq_quantize_model(model, [x], **HOW)
    assert [layer.tokens for layer in found.layers] == [40, 40]
    for name, qw in wanted.weights.items():
        assert torch.equal(found.weights[name].q, qw.q)


@pytest.mark.parametrize(
    "product",
    [lambda x, w: x @ w, lambda x, w: torch.einsum("btk,nk->btn", x, w)],
    ids=["not transposed", "einsum"],
)
def test_other_products_are_named(product):
    model = Stack()
    model.blocks = nn.ModuleList(Product(product) for _ in range(2))
    rule = r"blocks\.0 must be read by torch\.nn\.functional\.linear or x @ W\.T; exclude what"
    with pytest.raises(ValueError, match=rule):
        quantise("gptq", model)


class Between(Stack):
    """Changes what goes from one block to the next."""

    def __init__(self, change):
        super().__init__(3)
        self.change = change

    def forward(self, x):
        for place, block in enumerate(self.blocks):
            x = block(x if place < 2 else self.change(x))
        return x


@pytest.mark.parametrize(
    "change", [lambda x: 2 * x, lambda x: x.mul_(2), lambda x: x[:1], lambda x: x.flip(0)]
)
def test_what_changes_hidden_states_between_blocks_is_refused(change):
    model = Between(change)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    rule = "gptq_quantize_model: the model changes the hidden states between blocks 1 and 2"
    with pytest.raises(RuntimeError, match=rule):
        quantise("gptq", model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)


def test_a_copy_between_blocks_is_no_change():
    assert len(quantise("gptq", Between(torch.clone))) == 3


class Pair(nn.Linear):
    def forward(self, hidden_states):
        return super().forward(hidden_states), None


class ByKeyword(Stack):
    def forward(self, x):
        for block in self.blocks:
            x, _ = block(hidden_states=x)
        return x


def test_hidden_states_by_keyword_and_outputs_in_tuples_are_compared():
    model = ByKeyword()
    model.blocks = nn.ModuleList(Pair(8, 8) for _ in range(3))
    assert len(quantise("gptq", model)) == 3
    model.blocks[0].weight.data[0, 0] = torch.nan  # block 1 gets it as it is
    with pytest.raises(ValueError, match=r"blocks\.0 must be finite"):
        quantise("gptq", model)


@pytest.mark.parametrize("count", [1, 2])
def test_blocks_that_run_again_are_refused(count):
    class Again(Stack):
        def forward(self, x):
            return super().forward(super().forward(x) * 2)

    with pytest.raises(RuntimeError, match="the model calls its blocks more than once"):
        quantise("gptq", Again(count))


def test_a_block_of_all_layers_is_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.AlbertConfig(
        vocab_size=64,
        embedding_size=32,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
    )
    with pytest.raises(RuntimeError, match="the model calls its blocks more than once"):
        gptq_quantize_model(transformers.AlbertModel(config), [IDS], **HOW)


def test_falcon_is_quantised():
    transformers = pytest.importorskip("transformers")
    config = transformers.FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.FalconForCausalLM(config)
    report = gptq_quantize_model(model, [IDS], **HOW)
    assert len(report.layers) == 2 * 4
    assert all(layer.error < layer.rtn_error for layer in report.layers)


ROUTERS = [
    "mlp.gate",
    "mlp.router",
    "mlp.shared_expert_gate",
    "router.proj",
    "mlp.gate.wg",
    "ffn.router.layer",
    "mlp.router.classifier",
]


@pytest.mark.parametrize("router", ROUTERS)
def test_routers_are_left_alone(router):
    home, _, own = router.rpartition(".")
    model = Stack()
    model.blocks = nn.ModuleList(nn.ModuleDict({"gate_proj": nn.Linear(8, 16)}) for _ in range(2))
    for block in model.blocks:
        inner = nn.Module()
        inner.add_module(own, nn.Linear(8, 8))
        for name in reversed(home.split(".")):
            outer = nn.Module()
            outer.add_module(name, inner)
            inner = outer
        block["body"] = inner
    assert sorted(quantise("rtn", model)) == ["blocks.0.gate_proj", "blocks.1.gate_proj"]
