# SPDX-License-Identifier: Apache-2.0
"""The kernel of few rows as Python on NumPy, and a machine whose copies may come late."""

from types import FunctionType, SimpleNamespace

import numpy as np

from batchery.kernels import w4a16_epilogue, w4a16_narrow


class Array(np.ndarray):
    """A tensor of the kernel."""

    type = SimpleNamespace(layout=None)

    def to(self, dtype):
        if dtype == "half":  # what is stored in 16 bits
            return self.astype(np.float16).astype(np.float64).view(Array)
        return self.astype(np.int64 if dtype == "int64" else np.float64).view(Array)


class Scalar(int):
    def to(self, dtype):
        return self

    def __floordiv__(self, other):
        return Scalar(int(self) // int(other))


class Pointer:
    """An address; what it holds may be written by kernels before, and be of 16 bits."""

    def __init__(self, memory, at=0, written=False, kind=None):
        self.memory, self.at, self.written = memory, at, written
        self.dtype = SimpleNamespace(element_ty=kind)

    def __add__(self, other):
        return Pointer(self.memory, self.at + other, self.written, self.dtype.element_ty)


class Barrier:
    def __init__(self):
        self.phase, self.bytes, self.announced, self.late = 0, 0, False, []


class Shared:
    def __init__(self, places):
        self.places = places

    @property
    def shape(self):
        return self.places.shape

    def index(self, place):
        assert 0 <= place < len(self.places)
        part = self.places[place]
        return part if isinstance(part, Barrier) else Shared(part)

    def slice(self, begin, size, dim):
        assert dim == 1
        assert begin + size <= self.places.shape[1]
        return Shared(self.places[:, begin : begin + size])

    def permute(self, order):
        return Shared(self.places.transpose(order))

    def load(self, layout):
        return self.places.copy().view(Array)


def allocate(dtype, shape, layout):
    if dtype == "int64":
        return Shared([Barrier() for _ in range(shape[0])])
    return Shared(np.full(shape, 77, dtype))


def expect(barrier, size, wanted=True):
    if wanted:
        assert not barrier.announced
        barrier.bytes, barrier.announced = barrier.bytes + size, True


class Machine:
    """Copies at once, when what is still to be read is lost, or as late as their barrier allows."""

    def __init__(self, late, chained):
        self.late, self.chained, self.has_x = late, chained, not chained
        self.pending = []  # places that copies are under way to

    def copy(self, source, corner, barrier, place, wanted=True):
        beyond = corner[0] >= len(source.values)
        assert self.has_x or source.dtype is None or beyond
        if not wanted:
            return
        assert barrier.announced
        assert not any(np.shares_memory(place.places, other) for other in self.pending)
        self.pending.append(place.places)
        barrier.late.append((source, corner, place))
        if not self.late:
            self.arrive(barrier)

    def arrive(self, barrier):
        for source, (row, column), place in barrier.late:
            rows, columns = source.block_type.shape
            box = source.values[row : row + rows, column : column + columns]
            place.places[:] = 0
            place.places[: box.shape[0], : box.shape[1]] = box
            self.pending = [other for other in self.pending if other is not place.places]
            barrier.bytes -= 2 * rows * columns
        barrier.late = []
        assert barrier.bytes >= 0
        if barrier.bytes == 0:
            barrier.phase, barrier.announced = 1 - barrier.phase, False

    def wait(self, barrier, phase):
        if self.late and barrier.announced:
            self.arrive(barrier)
        assert barrier.phase != phase  # or it would wait for ever

    def inline(self, asm, *rest):
        assert self.chained
        self.has_x |= ".wait" in asm.value

    def load(self, pointer, *rest, **more):
        assert self.has_x or not pointer.written
        return load(pointer, *rest, **more)

    def store(self, pointer, values, mask=True):
        assert self.has_x
        store(pointer, values, mask)

    def add_one(self, pointer, one, sem):
        assert self.has_x
        before = int(pointer.memory[pointer.at])
        pointer.memory[pointer.at] += one
        return before


def load(pointer, mask=True, other=0, cache_modifier=""):
    at = np.asarray(pointer.at)
    mask = np.broadcast_to(mask, at.shape)
    assert 0 <= at[mask].min(initial=0)
    assert at[mask].max(initial=0) < pointer.memory.size
    return np.where(mask, pointer.memory[np.where(mask, at, 0)], other).view(Array)


def store(pointer, values, mask=True):
    at, values, mask = np.broadcast_arrays(pointer.at, values, mask)
    pointer.memory[at[mask]] = values[mask]


def weights(words, s, z, row, place, asm, group, asymmetric, dtype):
    q = (words.astype(np.int32) >> 4 * place & 15).astype(float)
    return q - (z[row].to(float)[:, None] if asymmetric else 8)


def as_python(machine):
    """Return the kernel as a function of Python on NumPy, and its `gl`."""
    no_layout = dict.fromkeys(
        ("SliceLayout", "BlockedLayout", "DotOperandLayout", "NVMMADistributedLayout"),
        lambda *arguments: None,
    )
    gl = SimpleNamespace(
        **no_layout,
        static_range=range,
        assume=lambda condition: None,
        minimum=min,
        where=lambda condition, a, b: a if condition else b,
        arange=lambda begin, end, layout: np.arange(begin, end).view(Array),
        zeros=lambda shape, dtype, layout: np.zeros(shape).view(Array),
        float32=float,
        float16="float16",
        int16=np.int16,
        int64="int64",
        allocate_shared_memory=allocate,
        load=machine.load,
        store=machine.store,
        atomic_add=machine.add_one,
        inline_asm_elementwise=machine.inline,
        int32=np.int32,
        convert_layout=lambda x, layout: x,
        reshape=lambda x, shape: x.reshape(shape),
        permute=lambda x, order: x.transpose(order),
        split=lambda x: (x[..., 0], x[..., 1]),
        exp=np.exp,
        rsqrt=lambda x: 1 / np.sqrt(x),
        sum=lambda x, axis: x.sum(axis),
    )
    scope = {
        "gl": gl,
        "mbarrier": SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=lambda *_, count: None,
            expect=expect,
            wait=machine.wait,
        ),
        "tma": SimpleNamespace(async_copy_global_to_shared=machine.copy),
        "warpgroup_mma": lambda a, b, acc, is_async: acc + a @ b.places.astype(float),
        "warpgroup_mma_wait": lambda left, deps: deps if len(deps) > 1 else deps[0],
        "barrier": lambda: None,
    }
    for name, value in (vars(w4a16_epilogue) | vars(w4a16_narrow)).items():
        if hasattr(value, "fn"):
            scope[name] = FunctionType(value.fn.__code__, scope)
    scope |= {name: vars(w4a16_narrow)[name] for name in ("BEGIN", "WAIT")}
    scope |= {"LINES": None, "slice_weights": weights}
    return scope["_narrow"], gl


def product(
    x,
    weight,
    form,
    split,
    *,
    chained=False,
    late=False,
    bias=None,
    eps=0.0,
    given=None,
    add_to=None,
    order=None,
):
    """Run the programs of a product in some order; return its result, in rows that lie apart.

    Tensors are NumPy's. With `given`, squares of x's rows, their norm is done; `add_to` is h, w and
    what is to be filled, where x lies in rows as wide as h's.
    """
    (m, k), n = x.shape, weight.shape[0]
    _, blocks, _, lanes = weight.words.shape
    m_tiles = -(-m // form.batch)
    tiles = weight.rows // form.rows * m_tiles
    sources = [
        SimpleNamespace(
            values=values, block_type=SimpleNamespace(shape=shape), layout=None, dtype=None
        )
        for values, shape in (
            (x, (form.batch, 4 * lanes)),
            (weight.words.numpy().reshape(-1, lanes), (64, lanes)),
        )
    ]
    sources[0].dtype = np.float64
    zeros = None if weight.zeros is None else Pointer(weight.zeros.numpy().ravel())
    width = n // 2 if weight.gated else n
    out = np.full((m, width + 3), np.nan)
    beside = [None, None, None]
    if add_to is not None:
        h, gain, out, squares = add_to
        beside = [Pointer(h.reshape(-1), written=True, kind="half"), Pointer(gain)]
        beside += [Pointer(squares.reshape(-1), written=True)]
    beside += [None if given is None else Pointer(given.reshape(-1), written=True)]
    partials = np.full(tiles * split * form.batch * form.rows, np.nan)
    counters = np.zeros(tiles, dtype=int)
    tables = [Pointer(weight.scales.double().numpy().ravel()), zeros]
    tables += [None if bias is None else Pointer(bias)]
    tables += [Pointer(values.reshape(-1)) for values in (out, partials, counters)]
    numbers = (m, n, out.shape[1], weight.rows, blocks, m_tiles, split)
    group = 0 if weight.group_size == k else weight.group_size
    constants = (group, form.batch, form.rows, form.stages, weight.gated, chained)
    constants += (0 if given is None else k, eps)
    for program in range(tiles * split) if order is None else order(tiles * split):
        kernel, gl = as_python(Machine(late, chained))
        gl.program_id = lambda axis, program=program: Scalar(program)
        kernel(*sources, *tables, *beside, *numbers, *constants, *4 * ("",))
    assert not counters.any()
    assert np.isnan(out[:, width:]).all()
    return out[:, :width]
