"""Where a loss is put: autocast, checkpointing, hooks, threads, processes, graphs. And what it keeps in memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from meter import Meter
from oracle import CASES, Case, draw
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cot_kernels
from cot_kernels import autograd
from cot_kernels.backends import aten


def problem(rows: int, classes: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits, target = draw(rows, classes, 2.0)
    return logits.to(dtype).to(device), target.to(device)


def interpreted(device: torch.device) -> bool:
    return device.type == "cpu" and "triton" in autograd.backend_for(torch.empty(1, 1)).__name__


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), leaf)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_autocast_changes_nothing(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Half-precision logits of an autocast region: the arithmetic is float32 and what is saved keeps their dtype."""
    logits, target = problem(6, 50, device, dtype)
    leaf = logits.requires_grad_()
    expected = case.loss(leaf, target)
    saved: list[Tensor] = []
    with (
        torch.autocast(device.type, dtype),
        torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t),
    ):
        loss = case.loss(leaf, target)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert torch.equal(gradient(loss, leaf), gradient(expected, leaf))
    assert [each.dtype for each in saved if each.data_ptr() == leaf.data_ptr()] == [dtype]
    with torch.autocast(device.type, dtype):
        inside = cot_kernels.complement_statistics(leaf, target)
        compiled = torch.ops.cot_kernels.row_statistics(leaf, target, -100)
    for value, of_operator in zip(inside, compiled[:3], strict=True):
        assert value.dtype == torch.float32 and torch.equal(value, of_operator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(dtype: torch.dtype, device: torch.device) -> None:
    """After the forward pass O(N) is held besides the logits; both passes together peak at one gradient more."""
    rows, classes = 8 if interpreted(device) else 64, 40_000
    leaf = torch.randn(rows, classes, device=device).to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,), device=device)
    per_row = 512 * rows
    scratch = 2 * aten.BLOCK_BYTES + 4 * classes * 4
    with Meter() as meter:
        loss = cot_kernels.complement_entropy(leaf, target)
        assert meter.alive <= per_row
        loss.backward()
    assert leaf.grad is not None and meter.alive <= leaf.grad.nbytes + per_row
    assert leaf.grad.nbytes < meter.peak <= leaf.grad.nbytes + per_row + scratch


def test_saved_tensors_are_the_logits_and_numbers_by_row(device: torch.device) -> None:
    rows, classes = 40, 1200
    logits, target = problem(rows, classes, device)
    leaf = logits.requires_grad_()
    for loss in [case.loss for case in CASES] + [cot_kernels.complement_statistics]:
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: (saved.append(t), t)[1], lambda t: t):
            loss(leaf, target)
        others = [each for each in saved if each.untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr()]
        assert len(others) == len(saved) - 1
        assert sum(each.numel() for each in others) <= 12 * rows


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, 30).to(device)
    inputs = torch.randn(5, 8, device=device).requires_grad_()
    target = torch.arange(5, device=device)

    def step(inputs: Tensor) -> Tensor:
        return cot_kernels.complement_cross_entropy(head(inputs), target)

    expected = gradient(step(inputs), inputs)
    step_again = checkpoint(step, inputs, use_reentrant=reentrant)
    step_again.backward()
    assert inputs.grad is not None and torch.equal(inputs.grad, expected)


def test_modes_without_gradients(device: torch.device) -> None:
    logits, target = problem(4, 9, device)
    leaf = logits.requires_grad_()
    with torch.no_grad():
        assert not cot_kernels.complement_entropy(leaf, target).requires_grad
    with torch.inference_mode():
        loss = cot_kernels.complement_entropy(leaf, target)
        assert loss.is_inference() and not loss.requires_grad
        made_within = logits.detach().clone()
    assert torch.equal(cot_kernels.complement_entropy(made_within, target), loss)
    assert not cot_kernels.complement_statistics(logits.detach(), target).negentropy.requires_grad


def test_hooks_see_the_loss_and_its_gradients(device: torch.device) -> None:
    logits, target = problem(4, 9, device)
    leaf = logits.requires_grad_()
    expected = gradient(cot_kernels.complement_entropy(leaf, target), leaf)  # before the hook, which acts on it as well
    module = cot_kernels.ComplementEntropy(9)
    seen: list[str] = []
    module.register_forward_hook(lambda *_: seen.append("forward"))
    module.register_full_backward_hook(lambda _, inputs, outputs: seen.append(f"backward {tuple(inputs[0].shape)}"))
    leaf.register_hook(lambda grad: grad * 2)
    loss = module(leaf, target)
    loss.register_hook(lambda grad: seen.append("loss"))
    loss.backward()
    assert seen == ["forward", "loss", "backward (4, 9)"]
    torch.testing.assert_close(leaf.grad, 2 * expected)


def test_threads(device: torch.device) -> None:
    """Data-parallel wrappers call a loss from several threads at once."""
    if interpreted(device):
        pytest.skip("Triton's interpreter has one state for all threads")
    problems = [problem(3 + number, 40 + number, device) for number in range(8)]

    def step(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        leaf = logits.clone().requires_grad_()
        loss = cot_kernels.complement_entropy(leaf, target)
        return loss.detach(), gradient(loss, leaf)

    expected = [step(*each) for each in problems]
    with ThreadPoolExecutor(4) as pool:
        for got, wanted in zip(pool.map(lambda each: step(*each), problems), expected, strict=True):
            assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def _in_another_process(module: nn.Module, logits: Tensor, target: Tensor, results: Any) -> None:
    leaf = logits.requires_grad_()
    loss = module(leaf, target)
    results.put((loss.item(), gradient(loss, leaf).tolist()))


def test_processes() -> None:
    logits, target = draw(4, 9, None)
    module = cot_kernels.ComplementEntropy(9)
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_in_another_process, args=(module, logits, target, results))
    process.start()
    loss, grad = results.get(timeout=120)
    process.join()
    leaf = logits.requires_grad_()
    assert loss == module(leaf, target).item()
    torch.testing.assert_close(torch.tensor(grad, dtype=logits.dtype), gradient(module(leaf, target), leaf))


def equal_to_dense(logits: Tensor, target: Tensor) -> None:
    """Loss and gradient of random values that lie as the logits do, and of the same that are dense."""
    values = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    leaf = logits.copy_(values).requires_grad_()
    loss = cot_kernels.complement_entropy(leaf, target)
    dense = values.to(logits.device).requires_grad_()
    expected = cot_kernels.complement_entropy(dense, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, leaf), gradient(expected, dense), rtol=1e-2, atol=1e-8)


@pytest.mark.parametrize("classes", [5, 1500])
def test_rows_far_apart(classes: int, device: torch.device) -> None:
    """A stride between rows beyond 2^31 elements; only the pages that are touched take memory."""
    stride = 2**31 + 64
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < 12 * stride:
        pytest.skip(f"needs {12 * stride / 2**30:.0f} GiB of GPU memory")
    storage = torch.empty(2 * stride + classes, dtype=torch.bfloat16, device=device)
    logits = storage.as_strided((3, classes), (stride, 1))
    equal_to_dense(logits, torch.arange(3, device=device))


@pytest.mark.parametrize("apart", ["planes", "classes", "rows"])
def test_rows_side_by_side_far_apart(apart: str, device: torch.device) -> None:
    """The last place beyond 2^31 elements by any of the three strides."""
    shape, strides = (2, 3, 32), [17, 5, 67]
    dim = ["planes", "classes", "rows"].index(apart)
    strides[dim] = 2**31 // (shape[dim] - 1) + 64
    size = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < 3 * size:
        pytest.skip(f"needs {3 * size / 2**30:.0f} GiB of GPU memory")
    logits = torch.empty(size, dtype=torch.bfloat16, device=device).as_strided(shape, strides)
    equal_to_dense(logits, torch.arange(2 * 32, device=device).view(2, 32) % 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
@pytest.mark.parametrize("classes", [100, 50257])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_graph(case: Case, classes: int) -> None:
    """Forward and backward, captured once and replayed on other values."""
    device = torch.device("cuda")
    leaf = torch.randn(64, classes, device=device).requires_grad_()
    target = torch.randint(classes, (64,), device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiled and warm before the capture
        for _ in range(2):
            gradient(case.loss(leaf, target), leaf)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = case.loss(leaf, target)
        grad = gradient(loss, leaf)
    with torch.no_grad():
        leaf.normal_()
        target.random_(classes)
    graph.replay()
    expected = case.loss(leaf, target)
    assert torch.equal(loss, expected) and torch.equal(grad, gradient(expected, leaf))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 12 GiB of GPU memory")
def test_more_than_2_to_the_31_logits() -> None:
    """The last rows lie beyond 2^31 elements, in the logits and in the gradient."""
    rows, classes = 17_000, 128_256
    device = torch.device("cuda")
    if torch.cuda.get_device_properties(device).total_memory < 5 * rows * classes * 2:
        pytest.skip("needs 22 GB of GPU memory")
    leaf = torch.randn(rows, classes, device=device, dtype=torch.bfloat16).requires_grad_()
    target = torch.randint(classes, (rows,), device=device)
    losses = cot_kernels.complement_entropy(leaf, target, reduction="none", normalization="none")
    grad = gradient(losses, leaf)
    last = leaf.detach()[-3:].clone().requires_grad_()
    expected = cot_kernels.complement_entropy(last, target[-3:], reduction="none", normalization="none")
    # Several programs share each of three rows, and add in another order than one alone. Rows differ by far more.
    torch.testing.assert_close(losses[-3:], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad[-3:], gradient(expected, last), rtol=1e-2, atol=1e-8)
