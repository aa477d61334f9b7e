"""Where logits lie does not matter: strides, channels last, dimensions in any order, and what is read in place."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import draw, gradient_of, relative_error
from torch import Tensor
from torch.nn import functional as F

import cot_kernels
from cot_kernels.backends.native import backend as native
from cot_kernels.dispatch import _as_rows


def strided(name: str, rows: int, classes: int) -> Tensor:
    """Logits of one value in the memory layout that the name tells."""
    dense = torch.randn(rows, classes, generator=torch.Generator().manual_seed(0))
    if name == "transposed":
        return dense.t().contiguous().t()
    if name == "every other row":
        return dense.repeat_interleave(2, 0)[::2]
    if name == "every other class":
        return dense.repeat_interleave(2, 1)[:, ::2]
    if name == "off a boundary":
        return torch.cat((torch.zeros(rows, 1), dense), 1)[:, 1:]
    if name == "storage offset":
        return torch.cat((torch.zeros(3), dense.flatten()))[3:].view(rows, classes)
    if name == "expanded":
        return dense[:1].expand(rows, classes)
    return dense


LAYOUTS = [
    "dense",
    "transposed",
    "every other row",
    "every other class",
    "off a boundary",
    "storage offset",
    "expanded",
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [7, 1000, 1031])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(layout: str, classes: int, dtype: torch.dtype, device: torch.device) -> None:
    logits = strided(layout, 6, classes)
    target = torch.randint(classes, (6,), generator=torch.Generator().manual_seed(1))
    moved = strided(layout, 6, classes).to(device).to(dtype) if layout == "dense" else None
    if moved is None:
        moved = torch.empty_strided((6, classes), logits.stride(), dtype=dtype, device=device)
        if layout == "expanded":
            moved = logits[:1].to(dtype).to(device).expand(6, classes)
        else:
            moved.copy_(logits)
    leaf = moved.detach().requires_grad_()
    loss = cot_kernels.complement_entropy(leaf, target.to(device))
    (gradient,) = torch.autograd.grad(loss, leaf)
    dense = moved.detach().cpu().double().contiguous().requires_grad_()
    true = cot_kernels.reference.complement_entropy(dense, target)
    (true_gradient,) = torch.autograd.grad(true, dense)
    assert loss.item() == pytest.approx(true.item(), abs=1e-6)
    assert relative_error(gradient, true_gradient) < (2e-6 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("classes", [10, 1030, 5000])
def test_logits_expanded_along_the_classes(classes: int, device: torch.device) -> None:
    """One number a row in memory: nothing may be read past it."""
    leaf = torch.randn(4, 1, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    target = torch.arange(4, device=device)
    logits = leaf.expand(4, classes)
    loss = cot_kernels.cross_entropy(logits, target)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(math.log(classes), rel=1e-6)
    expected = (torch.full((4, classes), 1 / classes) - F.one_hot(target.cpu(), classes)) / 4
    torch.testing.assert_close(gradient.cpu(), expected, rtol=1e-5, atol=1e-8)


def test_signs_that_are_still_to_change(device: torch.device) -> None:
    """The imaginary part of a conjugate is a view of numbers of the other sign, marked as such."""
    logits, target = draw(4, 9, None)
    weights = torch.linspace(-1, 2, 4, dtype=torch.float64)
    loss, gradient = gradient_of(cot_kernels.complement_cross_entropy, logits.to(device), target.to(device), weights)

    def view(values: Tensor) -> Tensor:
        return torch.complex(values, -values).to(device).conj().imag

    assert view(logits).is_neg()
    leaf = view(logits).requires_grad_()
    again = cot_kernels.complement_cross_entropy(leaf, target.to(device), reduction="none")
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(torch.autograd.grad(again, leaf, view(weights))[0], gradient)


def test_channels_last_segmentation(device: torch.device) -> None:
    logits = torch.randn(2, 6, 5, 7, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    target = torch.randint(6, (2, 5, 7), generator=torch.Generator().manual_seed(1))
    leaf = logits.to(device).requires_grad_()
    loss = cot_kernels.complement_entropy(leaf, target.to(device))
    dense = logits.double().contiguous().requires_grad_()
    true = cot_kernels.reference.complement_entropy(dense, target)
    assert loss.item() == pytest.approx(true.item(), abs=1e-7)
    assert relative_error(torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(true, dense)[0]) < 2e-6


def test_channels_last_logits_are_taken_as_rows_without_a_copy() -> None:
    logits = torch.randn(2, 6, 5, 7).to(memory_format=torch.channels_last)
    rows, target = _as_rows(logits, torch.zeros(2, 5, 7, dtype=torch.long))
    assert rows.shape == (70, 6) and rows.is_contiguous() and rows.data_ptr() == logits.data_ptr()
    assert target.shape == (70,)
    # Channels last within each image, but images apart: not rows of one matrix.
    apart = torch.randn(4, 6, 5, 7).to(memory_format=torch.channels_last)[::2]
    rows, _ = _as_rows(apart, torch.zeros(2, 5, 7, dtype=torch.long))
    torch.testing.assert_close(rows.flatten(), apart.flatten(2).flatten())


@pytest.mark.parametrize("order", [(0, 1, 3, 2, 4), (0, 1, 4, 2, 3), (2, 4, 0, 3, 1), (3, 1, 0, 4, 2)])
def test_trailing_dimensions_in_any_order(order: tuple[int, ...], device: torch.device) -> None:
    logits = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)).permute(order)
    classes, *rows = logits.shape[1], logits.shape[0], *logits.shape[2:]
    target = torch.randint(classes, rows, generator=torch.Generator().manual_seed(1))
    leaf = logits.to(device).requires_grad_()
    assert leaf.stride() == logits.stride()
    upstream = torch.randn(rows)
    dense = logits.double().contiguous().requires_grad_()
    true = cot_kernels.reference.complement_entropy(dense, target, reduction="none")
    loss = cot_kernels.complement_entropy(leaf, target.to(device), reduction="none")
    torch.testing.assert_close(loss.cpu().double(), true, rtol=1e-5, atol=1e-7)
    gradient = torch.autograd.grad(loss, leaf, upstream.to(device))[0]
    assert relative_error(gradient, torch.autograd.grad(true, dense, upstream.double())[0]) < 2e-6
    for value, expected in zip(
        cot_kernels.complement_statistics(leaf, target.to(device)),
        cot_kernels.complement_statistics(dense.to(device), target.to(device)),
        strict=True,
    ):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (0, 3, 1, 2), (0, 3, 2, 1), (3, 0, 2, 1)])
def test_transposed_trailing_dimensions_are_read_where_they_are(
    order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(2, 6, 5, 7).permute(order)
    seen = []
    monkeypatch.setattr(native, "loss", lambda logits, *rest: seen.append(logits) or (logits.sum(), ()))
    cot_kernels.cross_entropy(logits, torch.zeros(logits.shape[0], *logits.shape[2:], dtype=torch.long))
    assert seen[0].data_ptr() == logits.data_ptr() and seen[0].numel() == logits.numel()
