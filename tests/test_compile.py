"""torch.compile, torch.export, fake and meta tensors, and the registered operators that serve them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import CASES, Case, on_each_backend
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import cot_kernels
from cot_kernels import operators

Call = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def problem(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=dtype)
    return logits, torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)


def both(loss: Call, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, target)
    value.sum().backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


CALLS: dict[str, Call] = {
    **{str(case): case.loss for case in CASES},
    "module": cot_kernels.ComplementEntropy(10),
    "sum, ignoring a class": lambda logits, target: cot_kernels.complement_entropy(
        logits, target, ignore_index=3, reduction="sum", normalization="entropy"
    ),
    "unreduced": lambda logits, target: cot_kernels.guided_complement_entropy(logits, target, reduction="none"),
    "statistics": lambda logits, target: torch.stack(tuple(cot_kernels.complement_statistics(logits, target))),
}


@on_each_backend
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_compiled_whole(name: str, dynamic: bool, device: torch.device) -> None:
    """One graph, the eager values, and with dynamic shapes one compilation for every batch size."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS[name], fullgraph=True, dynamic=dynamic, backend=counter)
    compilations = []
    for rows in (4, 6, 300):
        logits, target = (each.to(device) for each in problem(rows, 10, seed=rows))
        torch.testing.assert_close(
            both(compiled, logits, target), both(CALLS[name], logits, target), rtol=1e-6, atol=1e-7
        )
        compilations.append(counter.frame_count)
    assert compilations[0] > 0
    assert compilations[-1] == compilations[0] if dynamic else compilations[-1] > compilations[0]


@on_each_backend
@pytest.mark.parametrize(("shape", "dtype"), [((64, 1000), torch.float32), ((2, 21, 6, 5), torch.bfloat16)], ids=str)
def test_compiled_by_inductor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """A head, the loss and the backward pass of both in one compiled step."""
    scale = torch.tensor(1.5, dtype=dtype, device=device)
    logits, target = (each.to(device) for each in problem(*shape))

    def step(logits: Tensor, target: Tensor) -> Tensor:
        return cot_kernels.complement_cross_entropy(logits * scale, target) * 2

    # Its cache knows a graph by its code, which does not tell the backend that the test has chosen.
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = both(torch.compile(step, fullgraph=True), logits.to(dtype), target)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(compiled, both(step, logits.to(dtype), target), rtol=tolerance, atol=tolerance / 10)


@on_each_backend
@pytest.mark.parametrize(("first", "dynamic"), [(0, False), (0, True), (1, True)])
def test_a_slice_of_padded_rows_by_inductor(first: int, dynamic: bool, device: torch.device) -> None:
    """Its gradient, of padded rows itself, reaches the whole of it."""
    wide, target = (each.to(device) for each in problem(6, 16))

    def step(wide: Tensor, target: Tensor) -> Tensor:
        return cot_kernels.complement_cross_entropy((wide * 1.5)[:, first : first + 13], target % 13)

    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = both(torch.compile(step, fullgraph=True, dynamic=dynamic), wide, target)
    torch.testing.assert_close(compiled, both(step, wide, target), rtol=1e-6, atol=1e-7)


@on_each_backend
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_slice_of_as_many_rows_as_data_tell(backend: str, device: torch.device) -> None:
    wide, target = (each.to(device) for each in problem(20, 40))
    keep = target % 2 == 0

    def step(wide: Tensor, target: Tensor) -> Tensor:
        rows = keep.nonzero()[:, 0]
        return cot_kernels.complement_cross_entropy(wide[rows][:, :31], target[rows] % 31)

    with (
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
        torch._inductor.config.patch(force_disable_caches=True),
    ):
        compiled = both(torch.compile(step, fullgraph=True, backend=backend), wide, target)
    torch.testing.assert_close(compiled, both(step, wide, target), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dynamic", [False, True])
def test_transposed_trailing_dimensions_under_the_compiler(dynamic: bool) -> None:
    logits, target = problem(2, 7, 5, 6)
    compiled = torch.compile(cot_kernels.complement_entropy, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    logits, target = logits.transpose(2, 3), target.transpose(1, 2)
    torch.testing.assert_close(
        both(compiled, logits, target), both(cot_kernels.complement_entropy, logits, target), rtol=1e-6, atol=1e-7
    )


def test_errors_and_warnings_under_the_compiler() -> None:
    compiled = torch.compile(cot_kernels.complement_entropy, backend="aot_eager")
    logits, target = problem(3, 5)
    with pytest.raises(TypeError, match=r"integer class indices, got torch\.float32"):
        compiled(logits, logits[:, 0])
    with pytest.raises(ValueError, match=r"target must have shape \(3,\)"):
        compiled(logits, target[:2])
    with pytest.raises(IndexError, match="target 9 is out of bounds for 5 classes"):
        compiled(logits, torch.tensor([0, 1, 9]))
    whole = torch.compile(cot_kernels.complement_entropy, fullgraph=True, backend="aot_eager")
    whole(logits[:, :2], target % 2)  # the warning of two classes would break the graph


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 7)
        self.criterion = cot_kernels.ComplementCrossEntropy(7)

    def forward(self, inputs: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.head(inputs), target)
        return loss


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    """A model with its loss, for any batch size, there and back through a file."""
    model = Classifier()
    rows = torch.export.Dim("rows", min=2)
    example = (torch.randn(4, 5), torch.randint(7, (4,)))
    shapes = {"inputs": {0: rows}, "target": {0: rows}}
    program = torch.export.export(model, example, dynamic_shapes=shapes, strict=strict)
    assert "cot_kernels.row_loss.default" in {str(node.target) for node in program.graph.nodes}
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    inputs, target = torch.randn(9, 5), torch.randint(7, (9,))
    torch.testing.assert_close(loaded(inputs, target), model(inputs, target))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_meta_and_fake_tensors(case: Case) -> None:
    """Shapes and dtypes without arithmetic: what memory planners and deferred initialisation ask for."""
    for reduction, shape in (("mean", ()), ("none", (3, 4))):
        leaf = torch.empty(3, 7, 4, device="meta", dtype=torch.bfloat16).requires_grad_()
        loss = case.loss(leaf, torch.empty(3, 4, device="meta", dtype=torch.long), reduction=reduction)
        loss.sum().backward()
        assert loss.shape == shape and loss.is_meta and loss.dtype == torch.float32
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape and leaf.grad.dtype == leaf.dtype
        with FakeTensorMode():
            fake = torch.randn(3, 7, 4, requires_grad=True)
            loss = case.loss(fake, torch.zeros(3, 4, dtype=torch.long), reduction=reduction)
            loss.sum().backward()
            assert loss.shape == shape and fake.grad is not None and fake.grad.shape == fake.shape


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", CALLS)
def test_jit_trace(name: str) -> None:
    traced = torch.jit.trace(lambda *tensors: CALLS[name](*tensors), problem(4, 10))
    for rows in (4, 9):
        logits, target = problem(rows, 10, seed=rows)
        torch.testing.assert_close(both(traced, logits, target), both(CALLS[name], logits, target))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace_of_linear_losses() -> None:
    """Traced with a weight that needs no gradient; it gives one nevertheless."""
    weight = problem(10, 5)[0]

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return cot_kernels.linear_complement_cross_entropy(hidden, weight, target)

    traced = torch.jit.trace(loss, (problem(4, 5)[0].requires_grad_(), weight, torch.arange(4)))
    for rows in (4, 9):
        hidden, target = problem(rows, 5, seed=rows)
        leaves = [each.requires_grad_() for each in (hidden, weight.clone())]
        torch.testing.assert_close(*(torch.autograd.grad(each(*leaves, target), leaves) for each in (traced, loss)))


class Labels(Tensor):
    """A subclass that computes nothing itself."""

    @staticmethod
    def __new__(cls, data: Tensor) -> Labels:
        return Tensor._make_subclass(cls, data)  # type: ignore[return-value]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_graphs_traced_by_make_fx_hold_no_values(case: Case) -> None:
    """Small problems are computed outside of ATen in eager mode, where a tracer would record their results."""

    def step(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss = case.loss(logits, target)
        return loss, torch.autograd.grad(loss, logits)[0]

    logits, target = problem(4, 7)
    traced = make_fx(step)(logits.requires_grad_(), target)
    other, labels = problem(4, 7, seed=1)
    torch.testing.assert_close(traced(other, labels), step(other.requires_grad_(), labels))


def test_linear_losses_traced_by_make_fx_hold_no_values() -> None:
    def step(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss = cot_kernels.linear_complement_cross_entropy(hidden, weight, target)
        return loss, torch.autograd.grad(loss, weight)[0]

    weight = torch.randn(7, 7).requires_grad_()
    traced = make_fx(step)(problem(4, 7)[0], weight, problem(4, 7)[1])
    other, labels = problem(4, 7, seed=1)
    torch.testing.assert_close(traced(other, weight, labels), step(other, weight, labels))


def test_targets_that_are_not_plain_tensors() -> None:
    logits, target = problem(4, 7)
    expected = cot_kernels.complement_entropy(logits, target)
    plain = cot_kernels.complement_entropy(logits, Labels(target)).as_subclass(Tensor)
    torch.testing.assert_close(plain, expected)  # an operator returns row losses: the sum rounds otherwise
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert cot_kernels.complement_entropy(logits, mode.from_tensor(target)).shape == ()
        assert isinstance(cot_kernels.complement_entropy(logits, target), FakeTensor)


OPERANDS = [
    pytest.param((6, 7), torch.float32, id="matrix"),
    pytest.param((6, 7), torch.float64, id="float64"),
    pytest.param((4, 9), torch.bfloat16, id="half"),
    pytest.param((3, 5, 4), torch.float32, id="class-major"),
    pytest.param((0, 5), torch.float32, id="no rows"),
    pytest.param((2, 5, 0), torch.float32, id="no columns"),
]


def check_loss(
    shape: tuple[int, ...], dtype: torch.dtype, objective: str, parameters: list[float], device: Any
) -> None:
    logits, target = (each.to(device) for each in problem(*shape, dtype=dtype))
    logits.requires_grad_()
    target.view(-1)[1:2] = -100
    arguments = (logits, target, -100, objective, parameters)
    torch.library.opcheck(operators.row_loss, arguments)
    loss, state = operators.row_loss(*arguments)
    upstream = torch.randn_like(loss).requires_grad_()
    torch.library.opcheck(operators.row_loss_gradient, (*arguments, state, upstream))


@on_each_backend
@pytest.mark.parametrize(("shape", "dtype"), OPERANDS)
def test_opcheck_of_operands(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    check_loss(shape, dtype, "complement_entropy", [0.2, 1e-7], device)


@on_each_backend
@pytest.mark.parametrize(
    ("objective", "parameters"), [("guided_complement_entropy", [0.6, 1e-7, 0.3]), ("cross_entropy", [1.0, 0.2])]
)
def test_opcheck_of_objectives(objective: str, parameters: list[float], device: torch.device) -> None:
    check_loss((6, 7), torch.float32, objective, parameters, device)


@on_each_backend
@pytest.mark.parametrize(("shape", "dtype"), OPERANDS)
def test_opcheck_of_statistics(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    logits, target = (each.to(device) for each in problem(*shape, dtype=dtype))
    logits.requires_grad_()
    torch.library.opcheck(operators.row_statistics, (logits, target, -100))
    *values, state = operators.row_statistics(logits, target, -100)
    upstreams: list[Any] = [torch.randn_like(value).requires_grad_() for value in values]
    torch.library.opcheck(operators.row_statistics_gradient, (logits, target, -100, state, *upstreams))


@on_each_backend
@pytest.mark.parametrize("layout", ["dense", "padded", "off a boundary", "transposed", "every other class", "expanded"])
def test_operators_keep_to_the_strides_they_announce(layout: str, device: torch.device) -> None:
    logits, target = (each.to(device) for each in problem(6, 8))
    strided = {
        "dense": logits,
        "padded": F.pad(logits, (0, 5))[:, :8],
        "off a boundary": F.pad(logits, (1, 8))[:, 1:9],
        "transposed": logits.t().contiguous().t(),
        "every other class": logits.repeat_interleave(2, 1)[:, ::2],
        "expanded": logits[:1].expand(6, 8),
    }[layout]
    arguments = (strided.detach().requires_grad_(), target, -100, "cross_entropy", [1.0, 0.0])
    torch.library.opcheck(operators.row_loss, arguments)
    loss, state = operators.row_loss(*arguments)
    torch.library.opcheck(operators.row_loss_gradient, (*arguments, state, torch.ones_like(loss)))


def test_shapes_on_a_gpu_that_is_not_there() -> None:
    """The operators announce the state of the backend that will run them, which is the device's."""
    from cot_kernels.backends.triton import backend

    with FakeTensorMode():
        logits = torch.empty(8, 100, 3, device="cuda", dtype=torch.bfloat16)
        target = torch.empty(8, 3, device="cuda", dtype=torch.long)
        assert cot_kernels.complement_entropy(logits, target).device.type == "cuda"
        _, state = operators.row_loss(logits, target, -100, "cross_entropy", [1.0, 0.0])
        assert state.shape == (backend.LOSS_STATE, 8, 3) and state.dtype == torch.float32
        upstream = state.new_empty(target.shape)
        gradient = operators.row_loss_gradient(logits, target, -100, "cross_entropy", [1.0, 0.0], state, upstream)
        assert gradient.shape == logits.shape and gradient.dtype == logits.dtype
