"""What the launcher promises the compiler: wrong promises show on a GPU only, as wrong reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.launches import CLASSES
from cot_kernels.backends.triton import launch, layout
from cot_kernels.backends.triton.launch import Tile

SHORT, LONG = 1000, 8192


def matrix(classes: int, dtype: torch.dtype = torch.float32, stride: int | None = None, offset: int = 0) -> Tensor:
    stride = classes if stride is None else stride
    return torch.zeros(offset + 4 * stride, dtype=dtype).as_strided((4, classes), (stride, 1), offset)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_on_a_boundary_are_promised(dtype: torch.dtype) -> None:
    in_16_bytes = 16 // dtype.itemsize
    assert layout.tile(matrix(SHORT, dtype)).align == in_16_bytes
    assert layout.tile(matrix(SHORT, dtype), matrix(SHORT, dtype)).align == in_16_bytes
    assert layout.tile(matrix(LONG, dtype)).align == in_16_bytes


@pytest.mark.parametrize(
    "logits",
    [matrix(SHORT, offset=1), matrix(SHORT, stride=SHORT + 1), matrix(SHORT - 1), matrix(SHORT - 1, stride=SHORT)],
    ids=["off a boundary", "odd stride", "odd number of classes", "odd number of classes, even stride"],
)
def test_short_rows_off_a_boundary_are_read_from_the_one_before(logits: Tensor) -> None:
    tile = layout.tile(logits)
    assert tile.align == 1 and tile.heads
    assert tile.overhang == 3 and tile.block >= min(logits.shape[1] + 3, 1024)
    other = torch.empty_strided(logits.shape, (logits.stride(0) + 1, 1))
    assert not layout.tile(logits, other).heads  # a gradient that begins elsewhere is written as it comes


def test_long_rows_need_equal_heads_in_logits_and_gradient() -> None:
    odd = matrix(50257)
    assert layout.tile(odd).align == 4  # alone, each row finds its own boundary
    assert layout.tile(odd, matrix(50257)).align == 4
    assert layout.tile(odd, matrix(50257, stride=50258)).align == 1
    assert layout.tile(odd, matrix(50257, offset=1)).align == 1
    assert layout.tile(matrix(SHORT), matrix(SHORT, stride=SHORT + 2)).align == 1
    assert (
        layout.tile(matrix(SHORT), matrix(SHORT, stride=SHORT + 4)).align == 4
    )  # as far from a boundary, if elsewhere


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 5, 1000, 1001, 50257])
def test_a_gradient_begins_as_far_from_a_boundary_as_its_logits(classes: int, dtype: torch.dtype) -> None:
    """With less than an access to a row that is not its own, or than a cache line to a long one."""
    per_access = 16 // dtype.itemsize
    boundary = launch.LINE if classes * dtype.itemsize > launch.SHORT_ROW else 16
    for stride in (0, *range(classes, classes + 2 * per_access)):
        for offset in (0, 1, per_access - 1, per_access):
            logits = matrix(classes, dtype, max(stride, 1), offset) if stride else matrix(classes, dtype).expand(4, -1)
            gradient = layout.gradient_like(logits)
            assert gradient.shape == logits.shape and gradient.stride(1) == 1
            assert layout.tile(logits, gradient).align == layout.tile(logits).align
            assert layout.tile(logits, gradient).heads == layout.tile(logits).heads or classes <= 4 * per_access
            assert classes <= gradient.stride(0) < classes + boundary // dtype.itemsize
            assert (gradient.stride(0) - logits.stride(0)) * dtype.itemsize % boundary == 0 or logits.is_contiguous()
            assert gradient.untyped_storage().nbytes() <= boundary + 4 * gradient.stride(0) * dtype.itemsize


def test_a_gradient_lies_as_dense_logits_do() -> None:
    wide, tokens, single = torch.zeros(4, 6, 30), torch.zeros(6, 4, 30), torch.zeros(1, 30, 1)
    for logits in (
        wide[0],
        wide.movedim(2, 1),
        tokens.permute(1, 2, 0),
        single,
        single.as_strided((1, 30, 1), (3, 1, 7)),
        wide.movedim(2, 0),
        wide[:, :0].movedim(2, 1),
        wide[:0].movedim(2, 1),
    ):
        gradient = layout.gradient_like(logits)
        assert gradient.is_contiguous() == logits.is_contiguous()
        for expected, stride, size in zip(
            torch.empty_like(logits).stride(), gradient.stride(), logits.shape, strict=True
        ):
            assert expected == stride or size == 1, logits.stride()
    sliced = tokens[:, :, :21].permute(1, 2, 0)  # (4, 21, 6), rows 30 apart, and 120 where the batch goes on
    assert layout.gradient_like(sliced).stride() == (22, 1, 88)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tiles_of_long_gradients_begin_on_cache_lines(dtype: torch.dtype) -> None:
    """Which takes a tile more where the places before a row come to one, and none where rows begin on lines."""
    line = launch.LINE // dtype.itemsize
    memory = torch.zeros(4 * 50400 + 2 * line, dtype=dtype)
    begin = -(memory.data_ptr() // dtype.itemsize) % line
    for stride, offset, lined in (
        (50304, 0, True),
        (50304, line, True),
        (50304, 1, False),
        (50304 + line // 2, 0, False),
    ):
        logits = memory.as_strided((4, 50000), (stride, 1), begin + offset)
        assert layout.tile(logits).long and layout.tile(logits).overhang == (
            16 // dtype.itemsize - 1 if offset == 1 else 0
        )
        assert layout.tile(logits, logits).overhang == (0 if lined else line - 1)
    planes = memory.as_strided((1, 50000, 2), (50304, 1, 1), begin)
    assert layout.tile(planes, planes).overhang == line - 1


@pytest.mark.parametrize("warp", [32, 64])
@pytest.mark.parametrize("itemsize", [8, 4, 2])
@pytest.mark.parametrize("classes", [4104, 8192, 50257, 128256])
def test_a_thread_folds_all_that_it_has_of_a_tile(classes: int, itemsize: int, warp: int) -> None:
    """Unless lanes apart make pairs; and no more than that, for it would have to ask other threads."""

    def tile(pairs: bool) -> launch.Tile:
        return launch.choose_tile(
            classes, itemsize, classes_adjoin=True, rows_aligned=False, head_aligned=True, warp=warp, pairs=pairs
        )

    assert tile(False).long and tile(False).lanes == tile(False).depth * warp * tile(False).warps
    assert tile(True).depth == 1 and not tile(True).narrow
    assert tile(False).narrow == (itemsize == 2 and warp == 32)


def test_short_rows_of_16_bits_are_narrow() -> None:
    """But for few classes that begin anywhere, and rows side by side."""
    bfloat16 = torch.bfloat16
    for logits in (matrix(40, bfloat16), matrix(1000, bfloat16), matrix(1001, bfloat16), matrix(1000, torch.float16)):
        assert layout.tile(logits).narrow
    others = (
        matrix(32, bfloat16),
        matrix(57, bfloat16),
        matrix(121, bfloat16),
        torch.zeros(2, 21, 48, dtype=bfloat16),
        matrix(1000),
    )
    assert not any(layout.tile(each).narrow for each in others)
    amd = launch.choose_tile(1000, 2, classes_adjoin=True, rows_aligned=True, head_aligned=True, warp=64)
    assert not amd.narrow


@pytest.mark.parametrize(("capability", "packs"), [(7, False), (8, True), (10, True)])
def test_no_pairs_before_compute_capability_8(capability: int, packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no instruction that compares two numbers of 16 bits."""
    monkeypatch.setattr(layout, "_capability", lambda device: capability)
    assert layout.tile(matrix(SHORT, torch.float16)).narrow == packs


def test_rows_are_padded_as_far_as_their_storage_goes() -> None:
    """A last row that ends where its storage does has nothing behind it that could be read, and none is written."""
    for stride, classes, behind, padded in ((8, 5, 3, 8), (8, 5, 2, 5), (8, 8, 0, 8), (7, 5, 9, 5), (8, 3, 5, 4)):
        storage = torch.zeros(3 * stride + classes + behind)
        logits = storage.as_strided((4, classes), (stride, 1))
        assert layout.with_padding(logits).shape == (4, padded), (stride, classes, behind)
        assert layout.with_padding(logits[1:]).shape == (3, padded)
    assert layout.with_padding(torch.zeros(0, 5)).shape[0] == 0


def test_an_inner_dimension_promises_nothing_to_short_rows() -> None:
    logits = torch.zeros(2, 3, 8).as_strided((2, 8, 3), (24, 1, 8))
    assert layout.tile(logits).align == 1


def test_rows_side_by_side_are_read_together_from_a_boundary_on() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        dense = torch.zeros(2, 21, 48, dtype=dtype)
        assert layout.tile(dense).rows == layout.tile(dense, dense).rows == 128 * (16 // dtype.itemsize)
    odd = (
        torch.zeros(2, 21, 40),  # a multiple of 8: Triton looks for 16
        torch.zeros(1 + 2 * 21 * 48)[1:].view(2, 21, 48),
        torch.zeros(2, 21, 96)[:, :, ::2],
        torch.zeros(2, 21, 50)[:, :, :48],
    )
    for logits in odd:
        assert layout.tile(logits).plane
        assert layout.tile(torch.zeros(logits.shape), logits).plane


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("warp", [32, 64])
@pytest.mark.parametrize("backward", [False, True])
def test_tiles_of_rows_side_by_side(backward: bool, warp: int, itemsize: int) -> None:
    """Most places of a plane's tiles are rows of it, and each thread folds all classes of its own."""
    tiles = set()
    for inner in range(1, 5000):
        for rows_adjoin in (True, False) if inner % 16 == 0 else (False,):
            tile = launch.choose_tile_across(21, itemsize, inner, rows_adjoin=rows_adjoin, backward=backward, warp=warp)
            tiles.add(tile)
            assert tile.across and tile.turns == 1 and tile.plane == (not rows_adjoin and inner >= warp)
            assert tile.rows % (warp * tile.warps) == 0
            places = -(-inner // tile.rows) * tile.rows
            assert not tile.plane or places <= 1.25 * inner or tile.rows == warp
    assert len(tiles) <= 7


@pytest.mark.parametrize("other", [0, 2])
def test_classes_that_do_not_adjoin_take_their_stride(other: int) -> None:
    """In any tensor involved: a stride of 0 beside one of 1 is not dense."""
    apart = torch.zeros(4, 5000)
    apart = apart[:, :1].expand(4, 2500) if other == 0 else apart[:, ::2]
    dense = torch.zeros(4, 2500)
    for tensors in ((apart, dense), (dense, apart)):
        assert layout.tile(*tensors).lanes == 1
    assert layout.tile(dense, dense).lanes > 1


@pytest.mark.parametrize("rows", [1, 3, 64, 263, 265, 10**6])
@pytest.mark.parametrize("tiles", [1, 7, 1000])
def test_splits(rows: int, tiles: int) -> None:
    splits = launch.choose_splits(rows, tiles, 132)
    assert 1 <= splits <= tiles
    assert splits == 1 if rows * 2 > 4 * 132 else splits * rows <= 4 * 132


@pytest.mark.parametrize("rows", [1, 64, 10**4])
@pytest.mark.parametrize("tiles", [1, 3, 1000])
def test_turns(rows: int, tiles: int) -> None:
    """Programs take several tiles in turn only where that leaves twice as many as keep a GPU busy."""
    long = Tile(rows=1, lanes=256, vec=8, align=8, warps=4, long=True)
    turns = launch.choose_turns(long, rows, tiles, 132)
    even = -(-tiles // max(1, tiles // 4))  # no program has a few tiles that are left
    assert 1 <= turns <= even < 8 and (tiles % 4 or even <= 4)
    assert turns == 1 or rows * tiles // turns >= 8 * 132
    assert turns == even or rows * tiles < (even + 1) * 8 * 132
    side_by_side = Tile(rows=1024, lanes=1, vec=2, align=1, warps=4, across=True)
    turns = launch.choose_turns(side_by_side, 1024 * rows, tiles, 132)
    assert 1 <= turns <= tiles
    assert turns == 1 or rows * tiles // turns >= 8 * 132


@pytest.mark.parametrize("rows", [1, 10**3, 10**5, 10**7])
@pytest.mark.parametrize("classes", [8, 33, 1000, 1001, 4096, 50257])
def test_rows_in_turn_leave_enough_warps(rows: int, classes: int) -> None:
    tile = layout.tile(matrix(classes, torch.bfloat16))
    turns = launch.choose_row_turns(tile, rows, 132)
    assert 1 <= turns <= tile.turns <= 32
    assert turns == 1 or -(-rows // (turns * tile.rows)) * tile.warps >= 125 * 132
    assert tile.turns * tile.rows <= max(32 * tile.warps, tile.rows)  # no more than a row a thread
    assert turns == tile.turns or rows < 10**7
    if not tile.long:  # nor does the backward pass leave fewer
        turns = launch.choose_turns(tile, rows, 1, 132)
        assert 1 <= turns <= (1 if classes > 8 else launch.ROW_TURNS)
        assert turns == 1 or -(-rows // (turns * tile.rows)) * tile.warps >= 250 * 132


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("warp", [32, 64])
@pytest.mark.parametrize("aligned", [True, False])
def test_tiles_of_short_rows(aligned: bool, warp: int, dtype: torch.dtype) -> None:
    """Each holds a row, in no more pieces than it needs, and no thread has more logits than registers for them."""
    itemsize = dtype.itemsize
    tiles = set()
    for classes in range(2, 2 * launch.SHORT_ROW // itemsize + 2):
        for backward, in_place in ((False, False), (True, False), (False, True)):
            tile = launch.choose_tile(
                classes, itemsize, classes_adjoin=True, rows_aligned=aligned, head_aligned=not aligned,
                backward=backward, in_place=in_place, warp=warp,
            )  # fmt: skip
            in_two = dtype == torch.bfloat16 and warp == 32 and not in_place
            assert tile.long == ((classes + tile.overhang) * itemsize > launch.SHORT_ROW * (1 + in_two))
            if tile.long:
                continue
            tiles.add(tile)
            places, piece = classes + tile.overhang, tile.lanes * tile.vec
            assert tile.block >= places > tile.block - piece
            assert places * 5 >= tile.block * 4 or tile.pieces < 5 or warp == 64  # four fifths are filled
            assert tile.warps == (1 if places * itemsize <= launch.SHORT_ROW else 2)
            logits = tile.rows * tile.block / (warp * tile.warps)
            assert logits <= 128 / itemsize
            assert logits >= tile.vec or places <= 4 * tile.vec
            assert tile.pieces <= (launch.PIECES if warp == 32 else launch.PIECES // 2)
    assert len(tiles) <= 60  # of which a gradient's are half


@pytest.mark.parametrize("odd", [False, True])
def test_the_compiler_report_has_every_number_of_lanes(odd: bool) -> None:
    """With the most pieces, and with the fewest."""
    reported = {layout.tile(matrix(classes, torch.bfloat16)) for classes in CLASSES["short, odd" if odd else "short"]}
    pieces: dict[int, set[int]] = {}
    for classes in range(9, 4090, 2) if odd else range(8, 4097, 8):
        tile = layout.tile(matrix(classes, torch.bfloat16))
        assert not tile.long and tile.heads == odd
        pieces.setdefault(tile.lanes, set()).add(tile.pieces)
    assert {(lanes, number) for lanes, every in pieces.items() for number in (min(every), max(every))} <= {
        (tile.lanes, tile.pieces) for tile in reported
    }
