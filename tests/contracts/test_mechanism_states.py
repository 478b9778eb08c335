# SPDX-License-Identifier: Apache-2.0
"""What every private mechanism owes of its state: on each device, whole, written first or not."""

import pytest
import torch

from batchery.privacy.column_mechanism import ColumnMechanism

from .test_mechanism import HORIZON, built, each_way, every, few, rows, same, single, written

pytestmark = pytest.mark.filterwarnings("ignore:noise from insecure_seed")


@each_way
def test_what_is_no_state_is_refused_and_leaves_no_trace(case, kinds):
    mechanism, other = built(case, kinds), built(case, kinds)
    for each in (mechanism, other):
        each.update_many(few(5))
    state = written(mechanism.state_dict())
    wrong = [3, None, [], {}, {**state, "t": None}, {**state, "t": -1}]
    wrong += [{**state, name: 3} for name in ("settings", "inner")]
    parts = state["inner"]
    lacking = [{k: v for k, v in parts.items() if k != name} for name in parts]
    wrong += [{**state, "inner": inner} for inner in ({}, dict.fromkeys(parts), *lacking)]
    message = rf"^{case.name}: state_dict(\['\w+'\])? must "
    for given in wrong:
        for load in (mechanism.load_state_dict, lambda s: mechanism.resume(s, published=0)):
            with pytest.raises((TypeError, ValueError), match=message):
                load(given)
            assert same(state, mechanism.state_dict())
    with pytest.raises(ValueError, match="noise|insecure_seed"):
        mechanism.load_state_dict({**state, "noise": None})
    assert torch.equal(mechanism.update_many(few()), other.update_many(few()))


def damaged(state, at=()):
    """Every copy of an inner state with one tensor, or one position, that does not fit it."""
    for name, part in state.items():
        if isinstance(part, dict) and name not in ("rows", "settings"):
            for path, other in damaged(part, (*at, name)):
                yield path, {**state, name: other}
        elif torch.is_tensor(part) and part.dtype != torch.uint8:
            other = torch.float16 if part.dtype.is_floating_point else torch.float64
            wrong = [part.to(other), part[None], torch.zeros(()).to(part), part.tolist()]
            wrong += [torch.cat([part, part])] if part.ndim else []
            yield from ((name, {**state, name: tensor}) for tensor in wrong)
        elif name == "rows" and part:
            yield "used", {**state, name: {**part, "used": -1}}
        elif name == "firings":
            yield from ((name, {**state, name: wrong}) for wrong in (-1, 1000))
        elif name == "t":
            yield from ((name, {**state, name: t}) for t in (part - 1, part + 1, None, -part))


@each_way
def test_a_state_with_a_part_that_does_not_fit_is_refused_by_name_and_leaves_no_trace(case, kinds):
    for t in (1, 5):
        mechanism = built(case, kinds)
        mechanism.update_many(few(t))
        state = written(mechanism.state_dict())
        moved = [("t", {**state, "t": other}) for other in (t - 1, t + 1, HORIZON + 1)]
        if kinds.get("mechanism") == "sparse":  # no part of it counts steps
            moved = moved[2:] if mechanism.horizon else []
        wrong = [(name, {**state, "inner": inner}) for name, inner in damaged(state["inner"])]
        for name, given in (*wrong, *moved):
            with pytest.raises(ValueError, match=rf"^\w+: state_dict.*'{name}'"):
                mechanism.load_state_dict(given)
            assert same(state, mechanism.state_dict())
        mechanism.load_state_dict(state)


def tensors_of(state):
    """All tensors of a state but those of generators, which torch keeps on the CPU."""
    if isinstance(state, dict):
        return [tensor for part in state.values() for tensor in tensors_of(part)]
    return [state] if torch.is_tensor(state) and state.dtype != torch.uint8 else []


@each_way
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_runs_and_resumes_on_its_device_and_releases_what_the_cpu_does(case, kinds, device):
    stream = few(HORIZON)
    on_cpu, mechanism = built(case, kinds), built(case, {**kinds, "device": device})
    start = on_cpu.update_many(stream[:7])
    cpu_state = written(on_cpu.state_dict())
    wanted = torch.cat([start, on_cpu.update_many(stream[7:])])
    first = mechanism.update_many(stream[:7].to(device))
    state = written(mechanism.state_dict())
    assert all(tensor.device.type == device for tensor in tensors_of(state["inner"]))
    close = {"rtol": 0, "atol": 0}
    if wanted.is_floating_point():  # as the order of sums may differ; noise is some tens large
        short = wanted.dtype == torch.float32
        close = {"rtol": 1e-5, "atol": 1e-4} if short else {"rtol": 1e-10, "atol": 1e-10}
    for saved in (state, cpu_state):
        again = built(case, {**kinds, "device": device})
        again.load_state_dict(saved)
        found = torch.cat([first, again.update_many(stream[7:])])
        if not isinstance(mechanism, ColumnMechanism):  # which release integers
            assert found.device.type == device
        assert found.dtype == kinds.get("dtype", wanted.dtype)
        torch.testing.assert_close(found.cpu(), wanted, **close)
    own = case.build(**kinds, seed=None, device=device)  # its own noise is drawn and taken there
    assert len(own.update_many(stream)) == HORIZON


@each_way
def test_an_update_whose_state_cannot_be_written_has_not_been(case, kinds):
    def full(state):
        raise OSError("no space left")

    mechanism, other = built(case, kinds), built(case, kinds)
    for each in (mechanism, other):
        each.update_many(few())
    state, shown = written(mechanism.state_dict()), mechanism.last()
    for call, given in ((mechanism.update, few()[0]), (mechanism.update_many, few())):
        with pytest.raises(OSError, match="no space left"):
            call(given, commit=full)
        assert same(state, mechanism.state_dict())
        assert torch.equal(torch.as_tensor(mechanism.last()), torch.as_tensor(shown))
    assert torch.equal(mechanism.update_many(few()), other.update_many(few()))


@each_way
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_broken_off_in_a_step_it_goes_back_or_shows_nothing_until_a_state_is_loaded(
    case, kinds, error, monkeypatch
):
    mechanism, other = built(case, kinds), built(case, kinds)
    for each in (mechanism, other):
        each.update_many(few())
    state = written(mechanism.state_dict())

    steps = mechanism._steps

    def broken(rows):
        steps(rows)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(mechanism, "_steps", broken)
        with pytest.raises(error):
            mechanism.update_many(few(), commit=lambda state: None)
        assert same(state, mechanism.state_dict())
        with pytest.raises(error):
            mechanism.update_many(few())
    for call in (lambda: mechanism.update(few()[0]), mechanism.last, mechanism.state_dict):
        with pytest.raises(RuntimeError, match=f"{case.name}: was broken off in the middle"):
            call()
    mechanism.load_state_dict(state)
    assert torch.equal(mechanism.update_many(few()), other.update_many(few()))


@every
def test_a_state_of_other_settings_is_refused_and_leaves_no_trace(case):
    state = case.build().state_dict()
    for kinds, value in (({"horizon": 21}, "21"), ({"columns": 4}, "4")):
        other = case.build(**kinds)
        kept = written(other.state_dict())
        with pytest.raises(ValueError, match=rf"{case.name}.*{value}"):
            other.load_state_dict(state)
        assert same(kept, other.state_dict())
    with pytest.raises(ValueError, match=f"{case.name}: state_dict must hold 'settings'"):
        case.build().load_state_dict({})


@every
def test_a_state_behind_what_was_published_is_refused_or_paid_for_twice(case):
    mechanism = case.build()
    single(mechanism, rows()[:6])
    state = written(mechanism.state_dict())
    with pytest.raises(ValueError, match=f"{case.name}: published must be <= 6, .* got 9"):
        case.build().resume(state, published=9)
    again = case.build()
    again.resume(state, published=9, strict=False)
    whole = again.cost.rho
    assert again.spent.rho == pytest.approx(whole + mechanism.spent.rho)
    single(again, rows()[:3])
    single(mechanism, rows()[:3])
    assert again.spent.rho == pytest.approx(whole + mechanism.spent.rho)
    again = case.build()
    again.resume(case.build().state_dict(), published=1, strict=False)
    assert again.spent.rho == whole
    mechanism = case.build()
    single(mechanism, rows()[:6])
    again = case.build()
    again.resume(state, published=6)
    assert again.spent == mechanism.spent


@every
def test_the_state_is_written_before_the_release_is_seen(case):
    states = []
    mechanism = case.build()
    release = mechanism.update(rows()[0], commit=lambda state: states.append(written(state)))
    many = mechanism.update_many(rows()[1:5], commit=lambda state: states.append(written(state)))
    for state, shown in zip(states, (release, many[-1]), strict=True):
        again = case.build()
        again.load_state_dict(state)
        assert torch.equal(torch.as_tensor(again.last()), torch.as_tensor(shown))

    real = case.build(seed=None)
    release = real.update(rows()[0], commit=states.append)
    again = case.build(seed=None)
    again.load_state_dict(written(states[-1]))
    assert torch.equal(torch.as_tensor(again.last()), torch.as_tensor(release))
