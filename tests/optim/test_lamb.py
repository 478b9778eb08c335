# SPDX-License-Identifier: Apache-2.0
"""Oracles of LAMB, and both optimizers under sharding and in other libraries.

The equations themselves are tested on the kernels, in tests/kernels.
"""

import copy
import math

import pytest
import torch
from compiler import needs_compiler
from dist_ranks import run_on_ranks
from torch import nn

from batchery.optim import LAMB, LARS, layer_adaptation_groups

FORMS = [{"foreach": False}, {"foreach": True}, needs_compiler({"fused": True})]
FORM_IDS = ["single", "foreach", "fused"]


def weights(shapes=((4, 3), (5,), (2, 2, 2)), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [nn.Parameter(tensor.to(dtype)) for tensor in drawn]


def give_grads(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(100 + seed)
    for p in params:
        drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = (drawn * scale).to(p)


def trajectory(optimizer, params, steps=5, scale=1.0):
    path = []
    for t in range(steps):
        give_grads(params, t, scale)
        optimizer.step()
        path.append([p.detach().clone() for p in params])
    return path


def assert_paths(a, b, tolerance):
    for xs, ys in zip(a, b, strict=True):
        for x, y in zip(xs, ys, strict=True):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e6])
def test_scaling_the_loss_changes_nothing(form, factor):
    kinds = {"lr": 0.1, "weight_decay": 0.0, "eps": 0.0, "adapt": True, **form}
    one, two = weights(), weights()
    assert_paths(
        trajectory(LAMB(one, **kinds), one),
        trajectory(LAMB(two, **kinds), two, scale=factor),
        1e-10,
    )


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_scaling_the_weights_scales_the_steps(form):
    kinds = {"lr": 0.1, "weight_decay": 0.0, "adapt": True, **form}
    one, two = weights(), weights()
    with torch.no_grad():
        for p in two:
            p.mul_(7)
    a = trajectory(LAMB(one, **kinds), one)
    b = trajectory(LAMB(two, **kinds), two)
    assert_paths([[7 * x for x in xs] for xs in a], b, 1e-10)


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_every_step_has_the_length_of_the_rate_times_the_weights(form):
    params = weights()
    optimizer = LAMB(params, lr=0.03, weight_decay=0.1, **form)
    for t in range(5):
        before = [p.detach().clone() for p in params]
        give_grads(params, t)
        optimizer.step()
        for p, old in zip(params, before, strict=True):
            moved = torch.linalg.vector_norm(p.detach() - old)
            assert moved.item() == pytest.approx(0.03 * old.norm().item(), rel=1e-10)


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_without_adaptation_and_decoupled_it_is_adamw(form):
    one, two = weights(), weights()
    ours = LAMB(one, lr=0.01, weight_decay=0.1, adapt=False, decoupled=True, **form)
    theirs = torch.optim.AdamW(two, lr=0.01, weight_decay=0.1, eps=1e-6)
    assert_paths(trajectory(ours, one), trajectory(theirs, two), 1e-10)


def test_a_ratio_clipped_to_one_is_no_adaptation():
    one, two = weights(), weights()
    clipped = trajectory(LAMB(one, lr=0.01, trust_clip=(1.0, 1.0)), one)
    assert_paths(clipped, trajectory(LAMB(two, lr=0.01, adapt=False), two), 1e-12)


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_first_step_in_closed_form(form):
    params = weights(shapes=((6,),))
    x = params[0].detach().clone()
    give_grads(params, 0)
    g = params[0].grad.clone()
    LAMB(params, lr=0.1, weight_decay=0.01, **form).step()
    u = g / (g.abs() + 1e-6) + 0.01 * x
    torch.testing.assert_close(
        params[0].detach(), x - 0.1 * x.norm() / u.norm() * u, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_a_zero_tensor_moves(form):
    params = [nn.Parameter(torch.zeros(3, dtype=torch.float64))]
    params[0].grad = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    optimizer = LAMB(params, lr=0.1, **form)
    optimizer.step()
    assert optimizer.trust_ratios()[0].item() == 1.0
    torch.testing.assert_close(
        params[0].detach(), torch.tensor([-0.1, 0.1, -0.1]).double(), rtol=1e-5, atol=0
    )


def test_blocks_are_separate_parameters():
    whole = weights(shapes=((6, 4),))
    parts = [nn.Parameter(whole[0].detach()[2 * k : 2 * k + 2].clone()) for k in range(3)]
    one, many = LAMB(whole, lr=0.1, blocks=3), LAMB(parts, lr=0.1)
    for t in range(4):
        give_grads(whole, t)
        for k, part in enumerate(parts):
            part.grad = whole[0].grad[2 * k : 2 * k + 2].clone()
        one.step()
        many.step()
    joined = torch.cat([part.detach() for part in parts])
    torch.testing.assert_close(whole[0].detach(), joined, rtol=1e-10, atol=1e-10)
    ratios = torch.stack(list(many.trust_ratios().values()))
    torch.testing.assert_close(one.trust_ratios()[0], ratios, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", [*FORMS[:2], {}], ids=[*FORM_IDS[:2], "chosen"])
def test_blocks_of_a_transposed_parameter(form):
    one = [nn.Parameter(weights(shapes=((6, 4),))[0].detach().t())]
    two = [nn.Parameter(one[0].detach().contiguous())]
    assert not one[0].is_contiguous()
    kinds = {"lr": 0.1, "blocks": 2, **form}
    assert_paths(trajectory(LAMB(one, **kinds), one), trajectory(LAMB(two, **kinds), two), 1e-12)


@pytest.mark.parametrize("form", FORMS[1:], ids=FORM_IDS[1:])
def test_in_float32_the_forms_agree(form):
    one, two = weights(dtype=torch.float32), weights(dtype=torch.float32)
    kinds = {"lr": 0.05, "weight_decay": 0.1, "max_grad_norm": 1.0}
    loop = trajectory(LAMB(one, foreach=False, **kinds), one)
    assert_paths(loop, trajectory(LAMB(two, **kinds, **form), two), 1e-6)


def test_auto_adapts_only_groups_that_decay_and_ratios_have_names():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    optimizer = LAMB(layer_adaptation_groups(model, 0.01), lr=0.1)
    model(torch.ones(5, 3).double()).square().sum().backward()
    optimizer.step()
    ratios = {name: value.item() for name, value in optimizer.trust_ratios().items()}
    assert set(ratios) == {name for name, _ in model.named_parameters()}
    adapted = {name for name, value in ratios.items() if value != 1.0}
    assert adapted == {"0.weight", "2.weight"}


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_a_parameter_without_gradient_does_not_age(form):
    params = weights()
    optimizer = LAMB(params, lr=0.1, **form)
    give_grads(params, 0)
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1].detach(), before)
    assert params[1] not in optimizer.state
    give_grads(params, 1)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [2, 1, 2]


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_global_clipping_is_over_all_groups_and_leaves_gradients(form):
    one, two = weights(), weights()
    clipped = LAMB([{"params": one[:1]}, {"params": one[1:]}], lr=0.1, max_grad_norm=0.5, **form)
    plain = LAMB(two, lr=0.1, **form)
    for t in range(3):
        give_grads(one, t)
        give_grads(two, t)
        kept = [p.grad.clone() for p in one]
        nn.utils.clip_grad_norm_(two, 0.5, error_if_nonfinite=True)
        clipped.step()
        plain.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(one, kept, strict=True))
    assert_paths([one], [two], 1e-6)  # torch adds 1e-6 to the norm


def test_bfloat16_parameters_keep_float32_moments_through_a_checkpoint(tmp_path):
    params = weights(dtype=torch.bfloat16)
    optimizer = LAMB(params, lr=0.1)
    trajectory(optimizer, params, 3)
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    others = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = LAMB(others, lr=0.1)
    resumed.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    for p, q in zip(params, others, strict=True):
        assert resumed.state[q]["exp_avg"].dtype == torch.float32
        assert torch.equal(resumed.state[q]["exp_avg_sq"], optimizer.state[p]["exp_avg_sq"])
    give_grads(params, 9)
    give_grads(others, 9)
    optimizer.step()
    resumed.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_the_state_of_adamw_is_a_warm_start():
    params = weights()
    adamw = torch.optim.AdamW(params, lr=0.01)
    trajectory(adamw, params, 2)
    ours = LAMB(params, lr=0.1)
    ours.load_state_dict(copy.deepcopy(adamw.state_dict()))
    assert torch.equal(ours.state[params[0]]["exp_avg"], adamw.state[params[0]]["exp_avg"])
    give_grads(params, 5)
    ours.step()
    assert ours.state[params[0]]["step"].item() == 3
    assert ours.param_groups[0]["adapt"] == "auto"


def test_a_tensor_rate_is_read_at_every_step():
    one, two = weights(), weights()
    rate = torch.tensor(0.1, dtype=torch.float64)
    tensor, number = LAMB(one, lr=rate), LAMB(two, lr=0.1)
    trajectory(tensor, one, 1)
    trajectory(number, two, 1)
    rate.fill_(0.02)
    number.param_groups[0]["lr"] = 0.02
    assert_paths(trajectory(tensor, one, 1), trajectory(number, two, 1), 1e-12)


def test_settings_changed_between_steps_take_effect():
    params = weights()
    optimizer = LAMB(params, lr=0.1)
    trajectory(optimizer, params, 1)
    optimizer.param_groups[0]["weight_decay"] = 0.0  # "auto": no adaptation from now on
    trajectory(optimizer, params, 1)
    assert all(ratio.item() == 1.0 for ratio in optimizer.trust_ratios().values())


KINDS = {
    LAMB: {"lr": 0.1, "max_grad_norm": 0.5},
    LARS: {"lr": 1.0, "trust_coefficient": 0.1},
}


def sharded_net(between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 6), between, nn.Linear(6, 4, bias=False)).double()


def train_sharded(model, kind, place=0, parts=1):
    """Take three steps on every `parts`-th row; return the trust ratios."""
    optimizer = kind(layer_adaptation_groups(model, 0.01), **KINDS[kind])
    data = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = torch.randn(8, 7, generator=data).double()
        optimizer.zero_grad()
        model(x[place::parts]).square().mean().backward()
        optimizer.step()
    return optimizer.trust_ratios()


def _trained(model, kind, place, parts):
    """Return the whole parameters, the ratios, and the sizes that were summed over ranks."""
    calls = []
    original = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *a, **k: (calls.append(a[0].numel()), original(*a, **k))
    ratios = train_sharded(model, kind, place, parts)
    torch.distributed.all_reduce = original
    return [p.full_tensor().detach() for p in model.parameters()], ratios, calls


def _fsdp(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (size,))
    found = []
    for kind in KINDS:
        model = sharded_net(nn.LayerNorm(6))
        fully_shard(model, mesh=mesh)
        found.append(_trained(model, kind, rank, size))
    return found


def _tensor_parallel(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    found = []
    for kind in KINDS:
        model = sharded_net(nn.Tanh())
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
        fully_shard(model, mesh=mesh["data"])
        found.append(_trained(model, kind, rank // 2, 2))
    return found


def assert_like_one_process(found, between):
    for place, kind in enumerate(KINDS):
        model = sharded_net(between())
        ratios = train_sharded(model, kind)
        for full, theirs, _ in (of_rank[place] for of_rank in found):
            for p, q in zip(model.parameters(), full, strict=True):
                torch.testing.assert_close(p.detach(), q, rtol=1e-10, atol=1e-10)
            assert theirs == pytest.approx({k: v.item() for k, v in ratios.items()}, rel=1e-10)


@pytest.mark.dist
@pytest.mark.slow
def test_sharded_by_fsdp2_they_step_as_on_one_process():
    found = run_on_ranks(_fsdp)
    assert_like_one_process(found, lambda: nn.LayerNorm(6))
    for (*_, lamb), (*_, lars) in found:
        assert lamb == [1, 4] * 3  # a step: the clip's square, then all tensors that adapt
        assert lars == [4] * 3


@pytest.mark.dist
@pytest.mark.slow
def test_sharded_along_two_axes_they_step_as_on_one_process():
    assert_like_one_process(run_on_ranks(_tensor_parallel, size=4), nn.Tanh)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"lr": -1.0}, "LAMB: lr must be >= 0, got -1.0"),
        ({"betas": (1.0, 0.9)}, r"LAMB: betas\[0\] must be >= 0 and < 1, got 1.0"),
        ({"betas": (0.9,)}, "LAMB: betas must be two numbers"),
        ({"eps": -1e-8}, "LAMB: eps must be >= 0"),
        ({"weight_decay": -0.1}, "LAMB: weight_decay must be >= 0, got -0.1"),
        ({"max_grad_norm": 0.0}, "LAMB: max_grad_norm must be > 0, got 0.0"),
        ({"trust_clip": (2.0, 1.0)}, r"LAMB: trust_clip must be .*, got \(2.0, 1.0\)"),
        ({"adapt": "always"}, "LAMB: adapt must be True, False or 'auto', got 'always'"),
        ({"blocks": 3}, "LAMB: blocks must divide dimension 0"),
        ({"blocks": 0}, "LAMB: blocks must be >= 1, got 0"),
        ({"foreach": True, "fused": True}, "LAMB: foreach and fused cannot both be True"),
        ({"lr": torch.tensor(-1.0)}, "LAMB: lr must be >= 0, got -1.0"),
        ({"lr": math.inf}, "LAMB: lr must be finite, got inf"),
        ({"betas": 0.9}, "LAMB: betas must be two numbers, got 0.9"),
        ({"trust_clip": 3}, "LAMB: trust_clip must be .*, got 3"),
        ({"norm_clip": (0, "a")}, r"LAMB: norm_clip\[1\] must be a number, got str"),
        ({"state_dtype": "float32"}, "LAMB: state_dtype must be .*, got 'float32'"),
        ({"state_dtype": torch.int8}, "LAMB: state_dtype must be .*, got torch.int8"),
        ({"maximize": "yes"}, "LAMB: maximize must be one of True, False, got 'yes'"),
        ({"decoupled": 0.1}, "LAMB: decoupled must be one of True, False, got 0.1"),
        ({"fused": "auto"}, "LAMB: fused must be one of None, True, False, got 'auto'"),
    ],
)
def test_bad_settings_are_named(kinds, message):
    with pytest.raises((TypeError, ValueError), match=message):
        LAMB(weights(shapes=((4, 3),)), **kinds)


def test_a_bad_group_is_refused_and_leaves_the_optimizer_whole():
    params = weights()
    optimizer = LAMB(params[:1], lr=0.1)
    with pytest.raises(ValueError, match="LAMB: lr must be >= 0"):
        optimizer.add_param_group({"params": params[1:], "lr": -1})
    with pytest.raises(ValueError, match=r"max_grad_norm must be the same in all .*, got 1.0"):
        optimizer.add_param_group({"params": params[1:], "max_grad_norm": 1.0})
    assert len(optimizer.param_groups) == 1


def test_what_has_no_kernel_is_named():
    params = weights(dtype=torch.bfloat16)
    give_grads(params, 0)
    with pytest.raises(
        RuntimeError, match="LAMB: no fused kernel for torch.bfloat16, torch.float32 on cpu"
    ):
        LAMB(params, fused=True).step()


def test_sparse_complex_and_flattened_parameters_are_refused():
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="LAMB: gradients must be dense"):
        LAMB(embedding.parameters()).step()
    with pytest.raises(TypeError, match="LAMB: parameters must be real"):
        LAMB([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    flat = nn.Parameter(torch.zeros(5))
    flat._is_flat_param = True
    with pytest.raises(ValueError, match="use FSDP2"):
        LAMB([flat])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_transformers_trainer_trains_with_it(tmp_path, kind):
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    rows = [{"input_ids": [k % 7] * 8, "labels": [k % 7] * 8} for k in range(64)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=30, per_device_train_batch_size=8, report_to=[],
        logging_steps=10, save_strategy="no", learning_rate=0.02, use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    rate = {"lr": 0.02} if kind is LAMB else {"lr": 0.05, "trust_coefficient": 1.0}
    kinds = {"weight_decay": 0.01, **rate}
    trainer = Trainer(model, arguments, train_dataset=rows, optimizer_cls_and_kwargs=(kind, kinds))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(inner, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_prepares_it(kind):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = nn.Linear(3, 1)
    wrapped, optimizer = accelerator.prepare(model, kind(model.parameters(), lr=0.1))
    for _ in range(40):
        loss = (wrapped(torch.eye(3)) - 1).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1


@pytest.mark.gpu
def test_the_loss_scaler_hands_over_its_scale_and_flag():
    params = [nn.Parameter(torch.ones(300, device="cuda")) for _ in range(2)]
    optimizer = LAMB(params, lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for value, moves in ((torch.inf, False), (2.0, True)):
        before = params[0].detach().clone()
        optimizer.zero_grad()
        scaler.scale(sum((p * value).sum() for p in params)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(params[0].detach(), before) != moves
    assert optimizer.state[params[0]]["step"].item() == 1


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", [{}, {"foreach": True, "capturable": True}])
def test_it_runs_inside_a_cuda_graph(kinds):
    params = [nn.Parameter(torch.ones(1000, 30, device="cuda")) for _ in range(3)]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    captured, plain = LAMB(params, lr=0.1, **kinds), LAMB(twins, lr=0.1, **kinds)
    for p, q in zip(params, twins, strict=True):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        plain.step()
    torch.cuda.synchronize()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
def test_timm_agrees():
    timm = pytest.importorskip("timm.optim")
    one, two = weights(dtype=torch.float64), weights(dtype=torch.float64)
    ours = LAMB(one, lr=0.01, weight_decay=0.02, adapt=True)
    theirs = timm.Lamb(two, lr=0.01, weight_decay=0.02, always_adapt=True, max_grad_norm=None)
    assert_paths(trajectory(ours, one), trajectory(theirs, two), 1e-10)
    assert math.isfinite(one[0].sum().item())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_parameters_on_another_device_than_the_current_one_step_there():
    one = [nn.Parameter(p.detach().to("cuda:1")) for p in weights(dtype=torch.float32)]
    two = [nn.Parameter(p.detach().clone()) for p in one]
    assert torch.cuda.current_device() == 0
    kinds = {"lr": 0.1, "weight_decay": 0.01}
    fused, loop = LAMB(one, fused=True, **kinds), LAMB(two, foreach=False, **kinds)
    assert_paths(trajectory(fused, one), trajectory(loop, two), 1e-5)
