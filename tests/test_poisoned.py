"""Every element of a loss, a gradient and the statistics is written, and no scratch memory is read before it is.

Fresh memory is full of NaN, and of the largest integer, however it is asked for (torch.empty, new_empty, empty_like,
empty_strided, resize_, and the same from C++): results are bit for bit what they are in memory that nobody filled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from oracle import CASES, Case
from torch import Tensor

import cot_kernels
from cot_kernels.backends.triton import launch

# Shapes by the path that each takes through the backends.
PATHS = {
    "one row": (7,),
    "short rows": (5, 7),
    "short rows, aligned": (9, 64),
    "no rows": (0, 5),
    "class-major": (2, 5, 3, 4),
    "class-major, several tiles": (2, 40, 3),
    "class-major, no columns": (2, 5, 0),
    "one tile": (5, 1031),
    "one tile, aligned": (5, 1200),
    "split rows": (3, 5000),
    "several tiles, not split": (2, 5001),
}
LOSSES = [(CASES[0], name) for name in PATHS] + [(case, "short rows") for case in CASES[1:]]


@pytest.fixture
def fill(device: torch.device) -> Iterator[Callable[[bool], None]]:
    """Fresh memory is filled from now on, or is not. Always with deterministic operations, which filling asks for."""
    torch.use_deterministic_algorithms(True, warn_only=True)

    def switch(on: bool) -> None:
        torch.utils.deterministic.fill_uninitialized_memory = on  # type: ignore[attr-defined]
        assert bool(torch.empty(9, device=device).isnan().all()) or not on

    yield switch
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # as it begins
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def unsplit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows stay whole where there are many of them; two must do here."""
    if "not split" in request.node.callspec.params.get("name", "not split"):
        monkeypatch.setattr(launch, "choose_splits", lambda *sizes: 1)


def problem(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits with absent classes, and targets of which one is ignored where there are several."""
    shape = PATHS[name]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator)
    target = torch.randint(
        shape[min(1, len(shape) - 1)], shape[:1] + shape[2:] if len(shape) > 1 else (), generator=generator
    )
    logits = logits.masked_fill(torch.rand(shape, generator=generator) < 0.2, -torch.inf)
    if target.numel() > 1:
        target.view(-1)[1] = -100
    return logits.to(dtype).to(device), target.to(device)


def bits(tensor: Tensor) -> bytes:
    return (
        tensor.detach().cpu().contiguous().view(torch.int16 if tensor.itemsize == 2 else torch.int32).numpy().tobytes()
    )


@pytest.mark.parametrize(("case", "name"), LOSSES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses(case: Case, name: str, dtype: torch.dtype, device: torch.device, fill: Callable[[bool], None]) -> None:
    logits, target = problem(name, dtype, device)
    for reduction in ("mean", "none"):
        found = []
        for on in (False, True):
            fill(on)
            leaf = logits.clone().requires_grad_()
            loss = case.loss(leaf, target, reduction=reduction)
            found.append([bits(loss), bits(torch.autograd.grad(loss, leaf, torch.ones_like(loss))[0])])
        assert found[0] == found[1]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics(name: str, dtype: torch.dtype, device: torch.device, fill: Callable[[bool], None]) -> None:
    logits, target = problem(name, dtype, device)
    found = []
    for on in (False, True):
        fill(on)
        leaf = logits.clone().requires_grad_()
        values = cot_kernels.complement_statistics(leaf, target)
        gradient = torch.autograd.grad(values, leaf, [torch.ones_like(value) for value in values])[0]
        found.append([bits(each) for each in (*values, gradient)])
    assert found[0] == found[1]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("classes", [9, 1031])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_losses(
    reduction: str, classes: int, dtype: torch.dtype, device: torch.device, fill: Callable[[bool], None]
) -> None:
    """In chunks, and rows of an odd number of classes, whose buffer is wider than they are."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in ((5, 8), (classes, 8))]
    target = torch.tensor([1, -100, 0, 8, 2], device=device)
    found = []
    for on in (False, True):
        fill(on)
        leaves = [each.clone().requires_grad_() for each in tensors]
        loss, *parts = cot_kernels.linear_complement_entropy(
            *leaves, target, reduction=reduction, memory_budget=2 * classes * dtype.itemsize, return_parts=True
        )
        gradients = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
        found.append([bits(each) for each in (loss, *parts, *gradients)])
    assert found[0] == found[1]
