# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from batchery.kernels.multi_tensor import (
    ChunkTable,
    require_fused,
    squared_norms,
)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("chunk", [5, 16, 1000])
def test_chunks_cover_every_element_once_and_never_cross_a_segment(blocks, chunk):
    tensors = [torch.zeros(6, 7), torch.zeros(3), torch.zeros(9, 2, 2)]
    table = ChunkTable(tensors, blocks=blocks, chunk=chunk)
    covered = [torch.zeros(t.numel()) for t in tensors]
    for place, segment, begin, end in table.chunks.tolist():
        assert 0 < end - begin <= chunk
        size = tensors[place].numel() // blocks
        assert begin // size == (end - 1) // size == segment - place * blocks
        covered[place][begin:end] += 1
    assert all(bool((c == 1).all()) for c in covered)
    segments = table.segments.tolist()
    assert len(segments) == len(tensors) * blocks
    assert segments[0][0] == 0
    assert segments[-1][1] == len(table.chunks)
    assert all(a[1] == b[0] for a, b in zip(segments, segments[1:], strict=False))


def test_an_empty_tensor_has_a_segment_without_chunks():
    table = ChunkTable([torch.zeros(0), torch.zeros(3)])
    assert table.segments.tolist() == [[0, 0], [0, 1]]


def test_segment_sums(kernel_device):
    tensors = [torch.zeros(5000), torch.zeros(0), torch.zeros(40, 30)]
    table = ChunkTable(tensors, blocks=1, chunk=4, device=kernel_device)
    generator = torch.Generator().manual_seed(0)
    table.partials.copy_(torch.rand(table.partials.shape, generator=generator))
    assert torch.allclose(table.segment_sums(), table.segment_sums_of(table.partials), rtol=1e-6)


def test_addresses_are_sent_again_only_when_one_changes():
    tensors = [torch.zeros(32), torch.zeros(16)]
    table = ChunkTable(tensors)
    first, aligned = table.addresses(tensors)
    assert first.tolist() == [[t.data_ptr() for t in tensors]]
    assert aligned
    assert table.addresses(tensors)[0] is first
    other = [tensors[0], torch.zeros(17)[1:]]
    second, aligned = table.addresses(other)
    assert second.tolist() == [[t.data_ptr() for t in other]]
    assert not aligned


def test_blocks_that_break_the_alignment_are_noticed():
    tensors = [torch.zeros(2, 8)]
    assert not ChunkTable(tensors, blocks=2).addresses(tensors)[1]
    tensors = [torch.zeros(2, 16)]
    assert ChunkTable(tensors, blocks=2).addresses(tensors)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("blocks", [1, 2])
def test_squared_norms(dtype, blocks):
    tensors = [torch.arange(6, dtype=dtype).view(2, 3), torch.ones(4, dtype=dtype)]
    want = [5.0, 50.0, 2.0, 2.0] if blocks == 2 else [55.0, 4.0]
    assert squared_norms(tensors, blocks, dtype).tolist() == pytest.approx(want)


def test_what_cannot_be_fused_is_named():
    with pytest.raises(RuntimeError, match="LAMB: no fused kernel for torch.bfloat16 on cpu"):
        require_fused("LAMB", [torch.zeros(2, dtype=torch.bfloat16)])
    both = [torch.zeros(2), torch.zeros(2, dtype=torch.float64)]
    with pytest.raises(RuntimeError, match="for torch.float32, torch.float64 on cpu"):
        require_fused("LAMB", both)
