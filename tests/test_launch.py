"""What the launcher promises the compiler: wrong promises show on a GPU only, as wrong reads."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import Tensor

from benchmarks.launches import CLASSES
from cot_kernels import complement_cross_entropy
from cot_kernels.backends.triton import backend, launch
from cot_kernels.backends.triton.backend import _tile
from cot_kernels.backends.triton.launch import Tile
from cot_kernels.objectives import (
    ComplementEntropyObjective,
    CrossEntropyObjective,
    GuidedComplementEntropyObjective,
)

SHORT, LONG = 1000, 4096


def matrix(classes: int, dtype: torch.dtype = torch.float32, stride: int | None = None, offset: int = 0) -> Tensor:
    stride = classes if stride is None else stride
    return torch.zeros(offset + 4 * stride, dtype=dtype).as_strided((4, classes), (stride, 1), offset)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_on_a_boundary_are_promised(dtype: torch.dtype) -> None:
    in_16_bytes = 16 // dtype.itemsize
    assert _tile(matrix(SHORT, dtype)).align == in_16_bytes
    assert _tile(matrix(SHORT, dtype), matrix(SHORT, dtype)).align == in_16_bytes
    assert _tile(matrix(LONG, dtype)).align == in_16_bytes


@pytest.mark.parametrize(
    "logits",
    [matrix(SHORT, offset=1), matrix(SHORT, stride=SHORT + 1), matrix(SHORT - 1), matrix(SHORT - 1, stride=SHORT)],
    ids=["off a boundary", "odd stride", "odd number of classes", "odd number of classes, even stride"],
)
def test_short_rows_off_a_boundary_are_read_from_the_one_before(logits: Tensor) -> None:
    tile = _tile(logits)
    assert tile.align == 1 and tile.heads
    assert tile.overhang == 3 and tile.block >= min(logits.shape[1] + 3, 1024)
    other = torch.empty_strided(logits.shape, (logits.stride(0) + 1, 1))
    assert not _tile(logits, other).heads  # a gradient that begins elsewhere is written as it comes


# Around powers of two, the bounds of a tile, and of an access.
@pytest.mark.gpu
@pytest.mark.parametrize("num_classes", [2, 3, 8, 9, 31, 33, 100, 257, 1017, 1024, 2041, 2049])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_that_begin_anywhere(num_classes: int, dtype: torch.dtype) -> None:
    """Value and gradient; in place it leaves what lies between the rows and beside them alone, but for what pads rows
    that begin on 16-byte boundaries to whole accesses."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, objective = 5, CrossEntropyObjective(1.0, 0.7)
    for offset, padding in ((0, 0), (0, 1), (1, 0), (3, 2), (0, 8 - num_classes % 8)):
        stride = num_classes + padding
        kept = torch.randn(offset + rows * stride + 16, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        logits = kept.as_strided((rows, num_classes), (stride, 1), offset)
        target = torch.arange(rows, device=device) * 7 % num_classes
        target[3] = -100
        exact = logits.double().cpu().requires_grad_()
        expected = complement_cross_entropy(
            exact, target.cpu(), gamma=-0.7, normalization="none", reduction="none"
        )  # fmt: skip
        expected.sum().backward()
        assert exact.grad is not None
        loss, saved = backend.loss(logits, target, -100, objective, "none")
        gradients = [backend.gradient(logits, saved, torch.ones((), device=device))]
        assert backend._begin(gradients[0]) == backend._begin(logits)
        if offset == 1:  # one that begins elsewhere, as compilers have it
            elsewhere = torch.empty_like(logits)
            gradients.append(backend.gradient(logits, saved, torch.ones((), device=device), elsewhere))
        tolerance = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3}[dtype]
        torch.testing.assert_close(loss.flatten().double().cpu(), expected, rtol=3e-6, atol=3e-6)
        for found in (*gradients, None):
            if found is None:
                before = kept.clone()
                found = logits
                backend.value_and_gradient(logits, target, -100, objective, None, True)
                beside = torch.ones_like(kept, dtype=torch.bool)
                per_access = 16 // dtype.itemsize
                on_boundary = offset == 0 and stride % per_access == 0
                width = -(-num_classes // per_access) * per_access if on_boundary else num_classes
                beside.as_strided((rows, width), logits.stride(), offset).fill_(False)
                assert torch.equal(kept[beside], before[beside])
            error = (found.double().cpu() - exact.grad).norm() / exact.grad.norm()
            assert error <= tolerance, (offset, padding, error)
            assert not found[3].any()


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [33, 64, 200, 249, 257, 520, 1000, 1001, 1032, 2041, 2049])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_logit_anywhere_in_dense_rows(classes: int, dtype: torch.dtype) -> None:
    """Its maximum may lie in each piece of a row; and behind the last row, which ends on a boundary, is nothing."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = 16
    target = torch.arange(rows) * 5 % classes
    large = torch.linspace(0, classes - 1, rows).long()
    large[large == target] += 1
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[torch.arange(rows), large] = 200
    exact = logits.double().requires_grad_()
    expected = complement_cross_entropy(exact, target, gamma=-0.7, normalization="none", reduction="none")
    expected.sum().backward()
    assert exact.grad is not None
    on_device, objective = logits.to(device), CrossEntropyObjective(1.0, 0.7)
    loss, saved = backend.loss(on_device, target.to(device), -100, objective, "none")
    gradient = backend.gradient(on_device, saved, torch.ones((), device=device))
    torch.testing.assert_close(loss[0].double().cpu(), expected, rtol=3e-6, atol=3e-6)
    error = (gradient.double().cpu() - exact.grad).norm() / exact.grad.norm()
    assert error <= {torch.float32: 3e-6, torch.bfloat16: 8e-3}[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("classes", "split"), [(21, False), (40, False), (1000, False), (1003, False), (2056, False), (2501, True)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_of_any_size(
    dtype: torch.dtype, classes: int, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their largest is scaled, rounded and put right; from 2^16 on it is not scaled, and some rows rise beyond that."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not split:
        monkeypatch.setattr(launch, "choose_splits", lambda *arguments: 1)
    sizes = [0.0, 3.0, 100.0, 1021.0, 3e4] + [2.0**16, 1.0625 * 2**16, 1e6, 3e9, 1e29, 3e38] * (dtype == torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    rising = torch.linspace(0.9, 1, classes)
    rows = []
    for size in sizes:
        flat = size + torch.randn(classes, generator=generator)
        rows += [flat, size * rising, size * rising.flip(0)]
        if size < 1e30:  # below -1e30 there is nothing
            rows += [flat - 2 * size, -size * rising]
    logits = torch.stack(rows).to(dtype)
    target = torch.arange(len(rows)) * 7 % classes
    exact = logits.double().requires_grad_()
    expected = complement_cross_entropy(exact, target, gamma=-0.7, normalization="none", reduction="none")
    expected.sum().backward()
    on_device, objective = logits.to(device), CrossEntropyObjective(1.0, 0.7)
    loss, saved = backend.loss(on_device, target.to(device), -100, objective, "none")
    gradient = backend.gradient(on_device, saved, torch.ones((), device=device))
    in_one = backend.value_and_gradient(on_device, target.to(device), -100, objective, None, True)  # in their place
    for losses, gradients in ((loss[0], gradient), (in_one[0], on_device)):
        torch.testing.assert_close(losses.double().cpu(), expected, rtol=3e-6, atol=3e-6)
        assert exact.grad is not None
        errors = (gradients.double().cpu() - exact.grad).norm(dim=1)
        assert (errors <= 8e-3 * exact.grad.norm(dim=1) + 1e-12).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("classes", "split"), [(2, False), (40, False), (1000, False), (1003, False), (2056, False), (2501, True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_negentropy_is_never_positive_and_vanishes_beside_a_wrong_class(
    dtype: torch.dtype, classes: int, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 16-bit logits but for what the rounding of their level leaves, at most 2^-46 of the largest."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not split:
        monkeypatch.setattr(launch, "choose_splits", lambda *arguments: 1)
    # 2^r and 2^-r, each rounded, are no inverse of each other for the remainder r of most of these.
    largest = [1.5, 2.1, 4.12, 5.76, 7.3, 15.8, 31, 60, 233, 326, 896, 1757, 3444, 18521, 25930]
    logits = torch.full((3 * len(largest), classes), -50.0)
    logits[:, classes // 2] = torch.tensor(largest * 3)
    logits[len(largest) : 2 * len(largest), -1] = torch.tensor(largest)  # one more, and if few others
    logits[2 * len(largest) :, -1] = torch.tensor(largest) - 13.3
    logits[:, 0] = 1000 * torch.arange(3).repeat_interleave(len(largest))  # the target's
    logits = logits.to(dtype)
    target = torch.zeros(len(logits), dtype=torch.int64)
    wrong = logits[:, 1:].double()
    q = wrong.softmax(1)
    expected = (q * wrong.log_softmax(1)).sum(1)
    found = backend.statistics(logits.to(device), target.to(device), -100)[2].double().cpu()
    assert (found <= 0).all()
    error = (found - expected).abs()
    assert (error <= 3e-6 * expected.abs() + 1.5e-7).all()  # the rounding of a sum of 1 and little else
    alone = expected > -1e-12
    left = 0 if dtype == torch.float32 else 2.0**-46 * wrong[alone].abs().amax(1).clamp(min=1)
    assert alone.sum() >= 6 and (error[alone] <= 0.01 * expected[alone].abs() + left + 1e-33).all()


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [40, 131, 2056, 2051])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_no_number_in_either_half_of_a_register(
    dtype: torch.dtype, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-inf is nothing, and NaN makes its row NaN and no other, beside a target in the other half and elsewhere."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(launch, "choose_splits", lambda *arguments: 1)
    places = torch.cat([torch.arange(10), torch.arange(classes - 6, classes)])
    rows = torch.arange(16)
    target = torch.where(rows % 5 < 3, places ^ 1, places + classes // 2) % classes
    numbers = torch.randn(16, classes, generator=torch.Generator().manual_seed(0)).to(dtype)
    for value in (-torch.inf, torch.nan):
        logits = numbers.clone()
        logits[rows, places] = value
        wrong = logits.double()
        wrong[rows, target] = -torch.inf
        q = wrong.softmax(1)
        expected = wrong.logsumexp(1), torch.special.xlogy(q, q).sum(1)
        target_logit, *found, _ = backend.statistics(logits.to(device), target.to(device), -100)
        assert torch.equal(target_logit.cpu(), logits[rows, target].float())
        for of_rows, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(of_rows.double().cpu(), exact, rtol=3e-6, atol=3e-6, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [2, 40, 131, 2051])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_nothing_but_the_target_and_of_no_number(
    dtype: torch.dtype, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty complement, wrong classes that are all NaN, a target out of range or NaN; and beside them two rows that
    are as they are alone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(launch, "choose_splits", lambda *arguments: 1)
    logits = torch.randn(6, classes, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[1:3, 1:] = torch.tensor([[-torch.inf], [torch.nan]])
    logits[3, 0] = torch.nan
    target = torch.tensor([0, 0, 0, 0, classes, 1])
    whole = torch.tensor([0, 5])
    on_device = logits.to(device)
    _, lse, negentropy, _ = (
        each.cpu() if isinstance(each, Tensor) else each
        for each in backend.statistics(on_device, target.to(device), -100)
    )
    assert lse[1] == -torch.inf and negentropy[1] == 0
    assert lse[[2, 4]].isnan().all() and negentropy[[2, 4]].isnan().all() and lse[[0, 3, 5]].isfinite().all()
    for objective in (
        ComplementEntropyObjective(1.0, 1e-7), ComplementEntropyObjective(1.0, 0.0),
        GuidedComplementEntropyObjective(1.0, 1e-7, 0.5), CrossEntropyObjective(1.0, 0.7),
    ):  # fmt: skip
        loss, saved = backend.loss(on_device, target.to(device), -100, objective, "none")
        gradient = backend.gradient(on_device, saved, torch.ones((), device=device)).cpu()
        losses = loss[0].cpu()
        assert losses[1].abs() < 1e-30 and not gradient[1].any()
        assert losses[2:5].isnan().all() and gradient[2:5].isnan().all()
        alone, saved = backend.loss(on_device[whole], target[whole].to(device), -100, objective, "none")
        torch.testing.assert_close(losses[whole], alone[0].cpu(), rtol=1e-6, atol=1e-6)
        gradient_alone = backend.gradient(on_device[whole], saved, torch.ones((), device=device)).cpu()
        torch.testing.assert_close(gradient[whole], gradient_alone, rtol=8e-3, atol=1e-7)


def test_long_rows_need_equal_heads_in_logits_and_gradient() -> None:
    odd = matrix(50257)
    assert _tile(odd).align == 4  # alone, each row finds its own boundary
    assert _tile(odd, matrix(50257)).align == 4
    assert _tile(odd, matrix(50257, stride=50258)).align == 1
    assert _tile(odd, matrix(50257, offset=1)).align == 1
    assert _tile(matrix(SHORT), matrix(SHORT, stride=SHORT + 2)).align == 1
    assert _tile(matrix(SHORT), matrix(SHORT, stride=SHORT + 4)).align == 4  # as far from a boundary, if elsewhere


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 5, 1000, 1001, 50257])
def test_a_gradient_begins_as_far_from_a_boundary_as_its_logits(classes: int, dtype: torch.dtype) -> None:
    """With less than an access to a row that is not its own, or than a cache line to a long one."""
    per_access = 16 // dtype.itemsize
    boundary = launch.LINE if classes * dtype.itemsize > launch.SHORT_ROW else 16
    for stride in (0, *range(classes, classes + 2 * per_access)):
        for offset in (0, 1, per_access - 1, per_access):
            logits = matrix(classes, dtype, max(stride, 1), offset) if stride else matrix(classes, dtype).expand(4, -1)
            gradient = backend._gradient_like(logits)
            assert gradient.shape == logits.shape and gradient.stride(1) == 1
            assert _tile(logits, gradient).align == _tile(logits).align
            assert _tile(logits, gradient).heads == _tile(logits).heads or classes <= 4 * per_access
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
        gradient = backend._gradient_like(logits)
        assert gradient.is_contiguous() == logits.is_contiguous()
        for expected, stride, size in zip(
            torch.empty_like(logits).stride(), gradient.stride(), logits.shape, strict=True
        ):
            assert expected == stride or size == 1, logits.stride()
    sliced = tokens[:, :, :21].permute(1, 2, 0)  # (4, 21, 6), rows 30 apart, and 120 where the batch goes on
    assert backend._gradient_like(sliced).stride() == (22, 1, 88)


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
        assert _tile(logits).long and _tile(logits).overhang == (16 // dtype.itemsize - 1 if offset == 1 else 0)
        assert _tile(logits, logits).overhang == (0 if lined else line - 1)
    planes = memory.as_strided((1, 50000, 2), (50304, 1, 1), begin)
    assert _tile(planes, planes).overhang == line - 1


@pytest.mark.parametrize("warp", [32, 64])
@pytest.mark.parametrize("itemsize", [8, 4, 2])
@pytest.mark.parametrize("classes", [2056, 4096, 50257, 128256])
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
        assert _tile(logits).narrow
    others = (
        matrix(32, bfloat16),
        matrix(57, bfloat16),
        matrix(121, bfloat16),
        torch.zeros(2, 21, 48, dtype=bfloat16),
        matrix(1000),
    )
    assert not any(_tile(each).narrow for each in others)
    amd = launch.choose_tile(1000, 2, classes_adjoin=True, rows_aligned=True, head_aligned=True, warp=64)
    assert not amd.narrow


@pytest.mark.parametrize(("capability", "packs"), [(7, False), (8, True), (10, True)])
def test_no_pairs_before_compute_capability_8(capability: int, packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no instruction that compares two numbers of 16 bits."""
    monkeypatch.setattr(backend, "_capability", lambda device: capability)
    assert _tile(matrix(SHORT, torch.float16)).narrow == packs


def test_rows_are_padded_as_far_as_their_storage_goes() -> None:
    """A last row that ends where its storage does has nothing behind it that could be read, and none is written."""
    for stride, classes, behind, padded in ((8, 5, 3, 8), (8, 5, 2, 5), (8, 8, 0, 8), (7, 5, 9, 5), (8, 3, 5, 4)):
        storage = torch.zeros(3 * stride + classes + behind)
        logits = storage.as_strided((4, classes), (stride, 1))
        assert backend._with_padding(logits).shape == (4, padded), (stride, classes, behind)
        assert backend._with_padding(logits[1:]).shape == (3, padded)
    assert backend._with_padding(torch.zeros(0, 5)).shape[0] == 0


def test_an_inner_dimension_promises_nothing_to_short_rows() -> None:
    logits = torch.zeros(2, 3, 8).as_strided((2, 8, 3), (24, 1, 8))
    assert _tile(logits).align == 1


def test_rows_side_by_side_are_read_together_from_a_boundary_on() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        dense = torch.zeros(2, 21, 48, dtype=dtype)
        assert _tile(dense).rows == _tile(dense, dense).rows == 128 * (16 // dtype.itemsize)
    odd = (
        torch.zeros(2, 21, 40),  # a multiple of 8: Triton looks for 16
        torch.zeros(1 + 2 * 21 * 48)[1:].view(2, 21, 48),
        torch.zeros(2, 21, 96)[:, :, ::2],
        torch.zeros(2, 21, 50)[:, :, :48],
    )
    for logits in odd:
        assert _tile(logits).plane
        assert _tile(torch.zeros(logits.shape), logits).plane


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


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [
        *((2, 3, 16), (1, 21, 1040), (3, 2, 48), (2, 5, 2064), (1, 1100, 16)),  # 128 bits an access
        *((5, 7, 31), (2, 3, 33), (3, 21, 127), (2, 4, 300), (1, 21, 1025), (2, 70, 40)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_side_by_side(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Ignored rows are read with the others, and nothing of what they hold shows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).to(device, dtype)
    target = torch.randint(shape[1], (shape[0], shape[2]), generator=generator).to(device)
    target[:, ::5] = -100
    exact = logits.double().cpu().clone().requires_grad_()
    complement_cross_entropy(exact, target.cpu(), gamma=-0.7, normalization="none", reduction="sum").backward()
    logits[:, :, ::5] = torch.nan
    assert _tile(logits).across and exact.grad is not None
    loss, saved = backend.loss(logits, target, -100, CrossEntropyObjective(1.0, 0.7), "none")
    gradient = backend.gradient(logits, saved, torch.ones((), device=device))
    assert loss.isfinite().all() and not saved[1][[0, 2, 3, 4]].isnan().any()
    assert not gradient[:, :, ::5].any()
    error = (gradient.double().cpu() - exact.grad).norm() / exact.grad.norm()
    assert error <= {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3}[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(5, 20), (40, 20), (2, 3, 20), (2, 40, 20)])
@pytest.mark.parametrize("step", [0, 2])
def test_classes_apart_beside_a_gradient_whose_classes_adjoin(step: int, shape: tuple[int, ...]) -> None:
    """Every other class, or one for all: a gradient is dense, and its stride of 1 is a constant to the compiler."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wide = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    logits = (wide[..., ::2] if step else wide[..., :1].expand(*shape[:-1], 10)).movedim(-1, 1)
    target = torch.arange(wide.shape[:-1].numel(), device=device).view(wide.shape[:-1]) % 10
    exact = logits.double().cpu().requires_grad_()
    complement_cross_entropy(exact, target.cpu(), gamma=-0.7, normalization="none", reduction="sum").backward()
    _, saved = backend.loss(logits, target, -100, CrossEntropyObjective(1.0, 0.7), "sum")
    gradient = backend.gradient(logits, saved, torch.ones((), device=device))
    assert exact.grad is not None and _tile(logits, gradient).across
    torch.testing.assert_close(gradient.double().cpu(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [7, 33, 70, 128, 1000])
@pytest.mark.parametrize("step", [1, 2])
def test_a_transposed_matrix_is_one_plane(step: int, rows: int) -> None:
    """Or every other row of one, whose neighbours are apart."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    classes = 11
    logits = torch.randn(classes, rows * step, generator=torch.Generator().manual_seed(0)).to(device)[:, ::step].t()
    target = torch.arange(rows, device=device) % classes
    target[::5] = -100
    assert _tile(logits).plane == (rows >= 32 and (step == 2 or rows % 16 != 0))
    exact = logits.double().cpu().requires_grad_()
    complement_cross_entropy(exact, target.cpu(), gamma=-0.7, normalization="none", reduction="sum").backward()
    loss, saved = backend.loss(logits, target, -100, CrossEntropyObjective(1.0, 0.7), "none")
    gradient = backend.gradient(logits, saved, torch.ones((), device=device))
    assert exact.grad is not None and not loss[0, ::5].any()
    torch.testing.assert_close(gradient.double().cpu(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [1025, 4097, 5001])
@pytest.mark.parametrize("stride", [0, 3])
def test_long_rows_that_begin_anywhere_and_are_not_split(
    classes: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than are split on a small GPU, each of which begins elsewhere; what lies between them is NaN."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, multiprocessors = 17, 2
    assert launch.choose_splits(rows, 9, multiprocessors) == 1 < launch.choose_splits(2, 9, multiprocessors)
    monkeypatch.setattr(backend, "_multiprocessors", lambda device: multiprocessors)
    generator = torch.Generator().manual_seed(0)
    wide = torch.full((rows, classes + stride), torch.nan, device=device, dtype=torch.bfloat16)
    logits = wide[:, :classes]
    logits.copy_(torch.randn(rows, classes, generator=generator))
    target = torch.randint(classes, (rows,), generator=generator).to(device)
    loss, _ = backend.loss(logits, target, -100, CrossEntropyObjective(1.0, 0.7), "none")
    published = oracle.complement_cross_entropy(
        logits.double().cpu(), target.cpu(), gamma=-0.7 * (classes - 1), reduction="none"
    )
    torch.testing.assert_close(loss[0].double().cpu(), published, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("other", [0, 2])
def test_classes_that_do_not_adjoin_take_their_stride(other: int) -> None:
    """In any tensor involved: a stride of 0 beside one of 1 is not dense."""
    apart = torch.zeros(4, 5000)
    apart = apart[:, :1].expand(4, 2500) if other == 0 else apart[:, ::2]
    dense = torch.zeros(4, 2500)
    for tensors in ((apart, dense), (dense, apart)):
        assert _tile(*tensors).lanes == 1
    assert _tile(dense, dense).lanes > 1


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
    tile = _tile(matrix(classes, torch.bfloat16))
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
    for classes in range(2, launch.SHORT_ROW // itemsize + 2):
        for backward in (False, True):
            tile = launch.choose_tile(
                classes, itemsize, classes_adjoin=True, rows_aligned=aligned, head_aligned=not aligned,
                backward=backward, warp=warp,
            )  # fmt: skip
            assert tile.long == ((classes + tile.overhang) * itemsize > launch.SHORT_ROW)
            if tile.long:
                continue
            tiles.add(tile)
            places, piece = classes + tile.overhang, tile.lanes * tile.vec
            assert tile.block >= places > tile.block - piece
            assert places * 5 >= tile.block * 4 or tile.pieces < 5 or warp == 64  # four fifths are filled
            assert tile.warps == 1
            logits = tile.rows * tile.block / warp
            assert logits <= 128 / itemsize
            assert logits >= tile.vec or places <= 4 * tile.vec
            assert tile.pieces <= (launch.PIECES if warp == 32 else launch.PIECES // 2)
    assert len(tiles) <= 60  # of which a gradient's are half


@pytest.mark.parametrize("odd", [False, True])
def test_the_compiler_report_has_every_number_of_lanes(odd: bool) -> None:
    """With the most pieces, and with the fewest."""
    reported = {_tile(matrix(classes, torch.bfloat16)) for classes in CLASSES["short, odd" if odd else "short"]}
    pieces: dict[int, set[int]] = {}
    for classes in range(9, 2042, 2) if odd else range(8, 2049, 8):
        tile = _tile(matrix(classes, torch.bfloat16))
        assert not tile.long and tile.heads == odd
        pieces.setdefault(tile.lanes, set()).add(tile.pieces)
    assert {(lanes, number) for lanes, every in pieces.items() for number in (min(every), max(every))} <= {
        (tile.lanes, tile.pieces) for tile in reported
    }


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [20, 33, 64, 505, 1000, 1001, 2041, 5001])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_in_turn(classes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As published, and as one by one to the last bit: also in a last program that is not full, ignored and stray."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tile = _tile(matrix(classes, dtype))
    turns = min(tile.turns, 3)
    rows = 4 * tile.rows + 1
    assert turns > 1 or classes == 20
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator).to(device, dtype)
    target = torch.randint(classes, (rows,), generator=generator).to(device)
    target[1], target[2] = -100, classes  # the latter out of range
    logits[1] = torch.nan
    objective = CrossEntropyObjective(1.0, 0.7)

    def outcome() -> list[Tensor]:
        row_losses, saved = backend.loss(logits, target, -100, objective, "none")
        gradient = backend.gradient(logits, saved, torch.ones_like(row_losses))
        *statistics, _ = backend.statistics(logits, target, -100)
        assert not saved[1][[0, 2, 3, 4], 1].isnan().any()
        return [row_losses, gradient, *statistics]

    monkeypatch.setattr(launch, "choose_splits", lambda *sizes: 1)
    for choice in ("choose_row_turns", "choose_turns"):
        monkeypatch.setattr(launch, choice, lambda *sizes: 1)
    one_by_one = outcome()
    monkeypatch.setattr(launch, "choose_row_turns", lambda *sizes: turns)
    monkeypatch.setattr(launch, "choose_turns", lambda *sizes: 3)
    backend.forward_plans.clear()
    backend.gradient_plans.clear()
    for found, expected in zip(outcome(), one_by_one, strict=True):
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert one_by_one[0][0, 1] == 0 and one_by_one[0][0, 2].isnan() and one_by_one[0].isnan().sum() == 1
    assert not one_by_one[1][1].any() and not one_by_one[1][1].signbit().any()  # of an ignored row: 0, not -0
    target[2] = -100
    losses, gradient, *_ = outcome()
    kept = target != -100
    exact = logits.double().cpu()[kept.cpu()].requires_grad_()
    published = oracle.complement_cross_entropy(
        exact, target.cpu()[kept.cpu()], gamma=-0.7 * (classes - 1), reduction="none"
    )
    published.sum().backward()
    assert exact.grad is not None
    torch.testing.assert_close(losses[0, kept].double().cpu(), published, rtol=3e-6, atol=3e-6)
    error = (gradient[kept].double().cpu() - exact.grad).norm() / exact.grad.norm()
    assert error <= {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3}[dtype]
    mean, saved = backend.loss(logits, target, -100, objective, "mean")
    assert saved[1][-1].item() == pytest.approx(1 / (rows - 2))
    torch.testing.assert_close(mean, losses.sum() / (rows - 2), rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows", [5, 8, 11])
def test_many_partial_sums_are_folded_first(rows: int, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.randn(rows, 600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.arange(rows)
    target[2] = -100
    expected = complement_cross_entropy(logits, target, gamma=-0.7, normalization="none", reduction=reduction)
    objective = CrossEntropyObjective(1.0, 0.7)
    monkeypatch.setattr(launch, "FOLD_BLOCK", 4)
    loss, saved = backend.loss(logits.float().to(device), target.to(device), -100, objective, reduction)
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-6, atol=0)
    assert saved[1][-1].item() == (pytest.approx(1 / (rows - 1)) if reduction == "mean" else 1)
