# SPDX-License-Identifier: Apache-2.0
"""One kernel launch over a list of tensors of any sizes: the chunk table.

A kernel over many tensors gives each program (or turn of its loop) one chunk: a run of elements of
one tensor, never across a block border. A table on the device says which tensor a chunk belongs to
and where it begins and ends; a second table holds the addresses. Chunks of the same segment (a
tensor, or one of the equal blocks along dimension 0 that an optimizer treats alone) are neighbours,
so a per-segment sum is a fixed-order sum of the chunks' partial sums: no float atomics, the same
bits in every run.

The layout is built once. Addresses are compared at every step (gradients move when they are set to
None between steps) and sent again, in one asynchronous copy, only when one has changed.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import torch
from torch import Tensor

from batchery._core.validate import require
from batchery.kernels import native

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # the torch forms work without it
    triton = tl = None

__all__ = [
    "BLOCK",
    "WARPS",
    "ChunkTable",
    "HalfStep",
    "Impl",
    "as_dtype",
    "chunk_bounds",
    "chunk_load",
    "chunk_pointer",
    "chunk_store",
    "fused_ready",
    "memory_order",
    "on_its_device",
    "pair_of_norms",
    "prepared_grads",
    "processors_of",
    "require_fused",
    "same_order",
    "segment_rows",
    "squared_norms",
    "tl",
    "triton",
    "triton_dtype",
    "triton_ready",
    "wide_dtype",
]

Impl = Literal["single", "foreach", "fused"]

# Elements per program, per loop turn, and warps: best of a sweep on an H200 (benchmarks/lamb.py).
CHUNK, BLOCK, WARPS = 8192, 1024, 4
VECTOR_BYTES = 16  # width of one thread's load when everything is aligned

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def triton_ready(tensor: Tensor) -> bool:
    """Say whether a Triton kernel can run on this tensor's device and dtype."""
    suits = tensor.is_cuda and tensor.dtype in FUSED_DTYPES
    if suits and triton is None:
        _warn_without_triton()
    return suits and triton is not None


@cache
def _warn_without_triton() -> None:
    problem = "Triton is not installed"
    warnings.warn(f"batchery: {problem}; steps on CUDA will be slower", stacklevel=3)


def on_its_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make a tensor's CUDA device the current one, which is where Triton launches."""
    if _devices() < 2 or tensor.get_device() in (-1, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(tensor.device)


@cache
def _devices() -> int:
    return torch.cuda.device_count()


@cache
def processors_of(device: torch.device) -> int:
    """Return the number of a CUDA device's multiprocessors."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class ChunkTable:
    """The chunks of a list of tensors, and the addresses of the lists that go with it.

    Args:
        like: one tensor per place, n in all, without gaps in memory; only sizes matter here.
        blocks: cut dimension 0 of every tensor into this many equal parts (segments).
        chunk: elements per chunk.
        device: where the table lies.

    Examples:
        >>> table = ChunkTable([torch.zeros(5), torch.zeros(2, 3)], chunk=4, device="cpu")
        >>> table.chunks.tolist()  # (tensor, segment, begin, end) of each chunk
        [[0, 0, 0, 4], [0, 0, 4, 5], [1, 1, 0, 4], [1, 1, 4, 6]]
        >>> table.segments.tolist()  # (first chunk, one past the last) of each segment
        [[0, 2], [2, 4]]
    """

    def __init__(
        self,
        like: Sequence[Tensor],
        *,
        blocks: int = 1,
        chunk: int = CHUNK,
        device: torch.device | str | None = None,
    ) -> None:
        """Lay out the chunks; see the class."""
        chunks: list[tuple[int, int, int, int]] = []
        segments: list[tuple[int, int]] = []
        whole = True  # does every chunk begin at a multiple of the vector width?
        for place, tensor in enumerate(like):
            size = tensor.numel() // blocks
            for block in range(blocks):
                first, begin, end = len(chunks), block * size, (block + 1) * size
                whole &= begin % VECTOR_BYTES == 0
                for at in range(begin, end, chunk):
                    chunks.append((place, len(segments), at, min(at + chunk, end)))
                segments.append((first, len(chunks)))
        self._whole = whole and chunk % VECTOR_BYTES == 0
        self._device = torch.device(like[0].device if device is None else device)
        self.chunks = torch.tensor(chunks, dtype=torch.int64).reshape(-1, 4).to(self._device)
        self.segments = torch.tensor(segments, dtype=torch.int64).to(self._device)
        self._sent: list[int] = []
        self._addresses = torch.empty(0, dtype=torch.int64)
        self._aligned = False

    @cached_property
    def partials(self) -> Tensor:
        """Scratch for two partial sums per chunk, `(2, chunks)` float32."""
        return torch.empty(2, len(self.chunks), dtype=torch.float32, device=self._device)

    def addresses(self, *lists: Sequence[Tensor]) -> tuple[Tensor, bool]:
        """Return the addresses of the lists, `(lists, n)` int64, and whether all are aligned.

        Every list must hold the table's n tensors, in one memory order per place (`same_order`).
        The copy to the device does not wait; it is skipped when no address has changed since the
        last call.
        """
        found = [tensor.data_ptr() for tensors in lists for tensor in tensors]
        if found != self._sent:
            pin = self._device.type == "cuda"
            host = torch.tensor(found, dtype=torch.int64, pin_memory=pin).view(len(lists), -1)
            self._addresses = host.to(self._device, non_blocking=True)
            self._aligned = self._whole and all(at % VECTOR_BYTES == 0 for at in found)
            self._sent = found
        return self._addresses, self._aligned

    def segment_sums(self) -> Tensor:
        """Add up `partials` over the chunks of each segment, in fixed order: `(2, segments)`."""
        sums = torch.empty(2, len(self.segments), dtype=torch.float32, device=self._device)
        _segment_sums[(len(self.segments), 2)](
            self.partials, self.segments, sums, len(self.chunks), len(self.segments), BLOCK=512
        )
        return sums

    def segment_sums_of(self, partials: Tensor) -> Tensor:
        """Torch form of `segment_sums`, for partial sums `(2, chunks)` of any dtype."""
        sums = partials.new_zeros(2, len(self.segments), dtype=torch.float64)
        sums.index_add_(1, self.chunks[:, 1], partials.double())
        return sums.to(partials.dtype)


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the strides of the dimensions longer than 1; None where there are gaps in memory.

    Examples:
        >>> memory_order(torch.zeros(2, 3).t()), memory_order(torch.zeros(2, 3)[:, :2])
        ((1, 3), None)
    """
    long = [(step, n) for step, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]
    expected = 1
    for step, n in sorted(long):
        if step != expected:
            return None
        expected *= n
    return tuple(step for step, _ in long)


def same_order(tensors: Sequence[Tensor], blocks: int = 1) -> bool:
    """Say whether a kernel may walk side by side through the memory of tensors of one shape.

    It may when all lie there without gaps in the same order, whichever (channels_last is one);
    blocks along dimension 0 must also be pieces of memory.
    """
    if all(tensor.is_contiguous() for tensor in tensors):
        return True
    orders = {memory_order(tensor) for tensor in tensors}
    return blocks == 1 and len(orders) == 1 and None not in orders


def fused_ready(*lists: Sequence[Tensor], blocks: int = 1) -> bool:
    """Say whether the kernels can run on all of these lists of tensors in one call.

    Triton's take any mix of `FUSED_DTYPES` on CUDA; those for the CPU take one dtype.
    """
    if not all(same_order(place, blocks) for place in zip(*lists, strict=True)):
        return False
    tensors = [tensor for listed in lists for tensor in listed]
    if tensors[0].is_cpu:
        return len({x.dtype for x in tensors}) == 1 and native.native_ready(tensors[0].dtype)
    return all(triton_ready(tensor) for tensor in tensors)


def require_fused(owner: str, *lists: Sequence[Tensor], blocks: int = 1) -> None:
    """Raise unless the kernels can run on all of these lists of tensors in one call.

    Raises:
        RuntimeError: names the device and dtypes for which there is no kernel.
        ValueError: a tensor and its gradient or state differ in their order in memory.
    """
    rule = "must be contiguous" if blocks > 1 else "must lie in memory alike and without gaps"
    for place in zip(*lists, strict=True):
        shape = tuple(place[0].shape)
        fit = same_order(place, blocks)
        require(fit, owner, "parameter, gradient and state", f"{rule} to be fused", shape)
    tensors = [tensor for listed in lists for tensor in listed]
    if not fused_ready(*lists, blocks=blocks):
        dtypes = ", ".join(sorted({str(tensor.dtype) for tensor in tensors}))
        lacks = tensors[0].is_cuda and triton is None
        what = "Triton is not installed" if lacks else "no fused kernel"
        raise RuntimeError(f"{owner}: {what} for {dtypes} on {tensors[0].device}")


def prepared_grads(
    grads: list[Tensor], dtype: torch.dtype, divisor: Tensor | None, negate: bool
) -> list[Tensor]:
    """Return gradients in the dtype of the step, divided and negated; the originals stay."""
    ready = as_dtype(grads, dtype)
    if divisor is not None:
        ready = [grad / divisor.to(dtype) for grad in ready]
    return [-grad for grad in ready] if negate else ready


def wide_dtype(*lists: list[Tensor]) -> torch.dtype:
    """Return what a step is computed in: the widest of some lists' dtypes, at least float32."""
    found = torch.float32
    for tensors in lists:
        found = torch.promote_types(found, tensors[0].dtype) if tensors else found
    return found


def as_dtype(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return tensors, all of one dtype, in another; the same tensors when it is theirs."""
    return tensors if tensors[0].dtype == dtype else [tensor.to(dtype) for tensor in tensors]


def segment_rows(tensor: Tensor, blocks: int) -> Tensor:
    """View a tensor as one row per segment; its shape is spelt out, for it may be empty."""
    return tensor.reshape(blocks, tensor.numel() // blocks)


def squared_norms(tensors: list[Tensor], blocks: int, dtype: torch.dtype) -> Tensor:
    """Return the squared norm of each segment, `(n · blocks,)`."""
    if blocks == 1:
        return torch.stack(torch._foreach_norm(tensors, 2, dtype)).square()
    rows = [segment_rows(tensor, blocks) for tensor in tensors]
    return torch.cat([torch.linalg.vector_norm(r, dim=1, dtype=dtype) for r in rows]).square()


def pair_of_norms(params: list[Tensor], others: list[Tensor], blocks: int, adapt: bool) -> Tensor:
    """Return the squared norms `(2, n · blocks)` of two lists; nothing is computed unless `adapt`.

    They are float32, for float64 tensors float64.
    """
    dtype = torch.float64 if others[0].dtype == torch.float64 else torch.float32
    if not adapt:  # nobody reads them
        return torch.empty(2, len(others) * blocks, dtype=dtype, device=others[0].device)
    return torch.stack([squared_norms(tensors, blocks, dtype) for tensors in (params, others)])


@dataclass(frozen=True)
class HalfStep:
    """A step between its two passes: its norms are known, its parameters not yet written.

    Attributes:
        squares: squared norms on this rank, `(2, segments)`.
        apply: makes the second pass, given these or their sums over the ranks that share the
            tensors, and returns the ratio of each segment, `(segments,)`.
    """

    squares: Tensor
    apply: Callable[[Tensor], Tensor]

    def finish(self) -> Tensor:
        """Make the second pass by this rank's own norms."""
        return self.apply(self.squares)


def triton_dtype(tensor: Tensor) -> "tl.dtype":
    """Return the Triton type of a tensor's elements."""
    names = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return names[tensor.dtype]


if triton is not None:

    @triton.jit
    def chunk_pointer(addresses, row, n, place, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
        """Return the typed pointer of list `row` at tensor `place`."""
        pointer = tl.load(addresses + row * n + place).to(tl.pointer_type(DTYPE))
        if ALIGNED:
            # The hint must be on the pointer: it does not pass through the cast.
            pointer = tl.multiple_of(pointer, 16)
        return pointer

    @triton.jit
    def chunk_bounds(chunks, ALIGNED: tl.constexpr):
        """Return this program's (tensor, segment, begin, end)."""
        row = chunks + tl.program_id(0).to(tl.int64) * 4
        begin = tl.load(row + 2)
        if ALIGNED:
            begin = tl.multiple_of(begin, 16)
        return tl.load(row), tl.load(row + 1), begin, tl.load(row + 3)

    @triton.jit
    def chunk_load(at, i, end, MASKED: tl.constexpr):
        """Load elements `i` as float32; zero past the end.

        Whole blocks go without a mask: one of unknown length would split the wide loads.
        """
        if MASKED:
            return tl.load(at + i, mask=i < end, other=0.0).to(tl.float32)
        else:
            return tl.load(at + i).to(tl.float32)

    @triton.jit
    def chunk_store(at, i, end, value, MASKED: tl.constexpr):
        """Store elements `i` in the pointer's type."""
        if MASKED:
            tl.store(at + i, value.to(at.dtype.element_ty), mask=i < end)
        else:
            tl.store(at + i, value.to(at.dtype.element_ty))

    @triton.jit
    def _segment_sums(partials, segments, sums, n_chunks, n_segments, BLOCK: tl.constexpr):
        segment = tl.program_id(0)
        row = tl.program_id(1)
        first = tl.load(segments + segment * 2)
        last = tl.load(segments + segment * 2 + 1)
        lanes = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for at in range(first, last, BLOCK):
            inside = at + lanes < last
            total += tl.load(partials + row * n_chunks + at + lanes, mask=inside, other=0.0)
        tl.store(sums + row * n_segments + segment, tl.sum(total, 0))
