"""Random shapes, strides, dtypes, absent classes, ignored rows, options and upstream gradients, against float64.

A few hundred cases in the suite, always the same; `make fuzz` runs tens of thousands of new ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import oracle
import pytest
import torch
from oracle import RowTruth
from torch import Tensor

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

import cot_kernels

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
LOSSES = ("complement_entropy", "guided_complement_entropy", "complement_cross_entropy", "cross_entropy")
NORMALIZATIONS = ("classes", "complement", "entropy", "none")

UNDERFLOW = 1e-25  # what float32 may lose: its smallest normal number, divided by an eps of 1e-12

on_a_cpu = pytest.mark.parametrize("device", ["native", "aten", "aten-blocks"], indirect=True)
on_triton = pytest.mark.parametrize("device", [pytest.param("triton", marks=pytest.mark.gpu)], indirect=True)
few = settings(max_examples=max(10, settings.default.max_examples // 32))  # the interpreter takes its time


@dataclass(frozen=True)
class Problem:
    logits: Tensor  # as they are passed: any shape, strides and dtype
    target: Tensor
    ignore_index: int
    reduction: str
    upstream: Tensor  # shaped like the loss, and of its dtype

    @property
    def classes(self) -> int:
        return self.logits.shape[min(1, self.logits.dim() - 1)]

    def rows(self, tensor: Tensor) -> Tensor:
        """(rows, K) of anything shaped like the logits."""
        return (tensor.movedim(1, -1) if tensor.dim() > 1 else tensor).reshape(-1, self.classes)


def laid_out(values: Tensor, order: tuple[int, ...], steps: list[int], offset: int, expanded: int | None) -> Tensor:
    """The values with their dimensions in the given order in memory, each with a step, after an offset, amid NaN.

    Along ``expanded`` all values are those of the first place, and there is one of them in memory.
    """
    shape = list(values.shape)
    if expanded is not None:
        values = values.narrow(expanded, 0, 1)
    sizes = [values.shape[dim] * steps[dim] for dim in order]
    poison = torch.nan if values.is_floating_point() else 77
    memory = torch.full((offset + math.prod(sizes),), poison, dtype=values.dtype)[offset:].view(sizes)
    view = memory.permute([order.index(dim) for dim in range(values.dim())])
    view = view[tuple(slice(None, None, step) for step in steps)]
    return view.copy_(values).expand(shape)


def accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@st.composite
def layouts(draw: st.DrawFn, values: Tensor, expands: bool) -> Tensor:
    dims = range(values.dim())
    if not values.dim() or draw(st.booleans()):
        return values
    full = [dim for dim in dims if values.shape[dim]]
    return laid_out(
        values,
        tuple(draw(st.permutations(dims))),
        [draw(st.integers(1, 2)) for _ in dims],
        draw(st.integers(0, 3)),
        draw(st.none() | st.sampled_from(full)) if expands and full else None,
    )


@st.composite
def problems(draw: st.DrawFn, reductions: tuple[str, ...] = ("mean", "sum", "none")) -> Problem:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    classes = draw(st.integers(2, 40) | st.sampled_from([64, 129, 256, 1025, 2100]))
    inner = draw(st.lists(st.sampled_from([1, 2, 2, 3, 3, 0]), max_size=2))
    shape = draw(st.sampled_from([(classes,), (draw(st.sampled_from([4, 3, 5, 2, 6, 1, 0])), classes, *inner)]))
    target_shape = shape[:1] + shape[2:] if len(shape) > 1 else ()

    dtype = draw(st.sampled_from(FLOATS))
    magnitude = draw(st.sampled_from([1.0, 1.0, 3.0, 8.0, 0.0, 1e-20, 100.0, 1e4, 1e20]))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    values = values * min(magnitude, torch.finfo(dtype).max / 8) + draw(st.sampled_from([0.0, -7.0, 50.0]))
    values = values.to(dtype)

    integer = draw(st.sampled_from([each for each in INTEGERS if torch.iinfo(each).max >= classes - 1]))
    target = torch.randint(classes, target_shape, generator=generator).to(integer)
    ignore_index = draw(st.sampled_from([-100, -1, 0, classes - 1, classes, 255, -(2**63), 2**63 - 1]))
    if torch.iinfo(integer).min <= ignore_index <= torch.iinfo(integer).max:
        left_out = torch.rand(target_shape, generator=generator) < draw(st.sampled_from([0.0, 0.2, 0.4, 1.0]))
        target = target.masked_fill(left_out, ignore_index)

    absent = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.0, 0.2, 0.5, 0.95, 1.0]))
    index = target.long().clamp(0, classes - 1).unsqueeze(min(1, len(target_shape)))
    if draw(st.booleans()):  # the target's own logit is there
        absent.scatter_(min(1, len(shape) - 1), index, False)
    values = draw(layouts(values.masked_fill(absent, -torch.inf), True))
    if values.is_contiguous() and draw(st.booleans()):  # whatever an ignored row holds
        junk = (target.long() == ignore_index).unsqueeze(min(1, len(target_shape)))
        values = values.masked_fill(junk, draw(st.sampled_from([torch.nan, torch.inf])))

    reduction = draw(st.sampled_from(reductions))
    loss_shape = target_shape if reduction == "none" else ()
    apart = torch.randn((*loss_shape, 2), generator=generator).to(accumulated(dtype))[..., 0]
    one = apart.new_full((), -2.5).expand(loss_shape)
    upstream = draw(st.sampled_from([apart, apart, one, torch.ones_like(apart), torch.zeros_like(apart)]))
    return Problem(values, draw(layouts(target, False)), ignore_index, reduction, upstream)


@st.composite
def objectives(draw: st.DrawFn, name: str, classes: int) -> tuple[dict[str, Any], Any]:
    """Options of a loss, and the formula that it then has in b and S."""
    eps = draw(st.sampled_from([1e-7, 0.0, 1e-12, 1e-3, 1.0]))
    normalization = draw(st.sampled_from([each for each in NORMALIZATIONS if classes > 2 or each != "entropy"]))
    if name == "complement_entropy":
        by = oracle.divisor(normalization, classes)
        options = {"eps": eps, "normalization": normalization}
        return options, lambda b, s: oracle.complement_entropy_of(b, s, eps) / by
    if name == "guided_complement_entropy":
        # With eps = 0 a fractional power of a probability that float32 cannot hold would be told from 0.
        alpha = draw(st.sampled_from([1 / 3, 0.0, 1.0, 2.0] if eps else [0.0, 1.0, 2.0]))
        options = {"eps": eps, "alpha": alpha}
        return options, lambda b, s: oracle.guided_complement_entropy_of(b, s, eps, alpha) / math.log(classes)
    if name == "complement_cross_entropy":
        gamma = draw(st.sampled_from([-1.0, 0.0, 2.0, -0.3]))
        options = {"gamma": gamma, "normalization": normalization}
        weight = -gamma / oracle.divisor(normalization, classes)
        return options, partial(oracle.cross_entropy_of, weight=weight)
    return {}, partial(oracle.cross_entropy_of, weight=0.0)


def partials(formula: Any, truth: RowTruth) -> tuple[Tensor, Tensor]:
    """dl/db and dl/dS, where p and 1 - p are so small that only their being there counts."""
    leaves = truth.log_odds.clamp(-600, 600).requires_grad_(), truth.negentropy.clone().requires_grad_()
    f_lse, f_negentropy = torch.autograd.grad(formula(*leaves).sum(), leaves, materialize_grads=True)
    return f_lse, f_negentropy


def unit(problem: Problem) -> float:
    """A few roundings, however large the logits are: their differences are what counts."""
    return 16 * (2.0**-52 if problem.logits.dtype == torch.float64 else 2.0**-23)


def worst(got: Tensor, true: Tensor, bound: Tensor) -> str:
    place = ((got - true).abs() / bound).nan_to_num(torch.inf).argmax()
    got, true, bound = (float(each.reshape(-1)[place]) for each in (got, true, bound))
    return f"got {got!r}, true {true!r} within {bound!r} at {int(place)}"


def assert_gradient(problem: Problem, gradient: Tensor, true: Tensor, size: Tensor, tolerance: float) -> None:
    """Each element within ``tolerance`` of ``size``, the sum of what it is made of, and a rounding to its dtype."""
    assert gradient.dtype == problem.logits.dtype and gradient.shape == problem.logits.shape
    got = problem.rows(gradient.detach().cpu().double())
    bound = tolerance * size + UNDERFLOW
    if gradient.dtype in (torch.float16, torch.bfloat16):
        info = torch.finfo(gradient.dtype)
        bound = bound + info.eps * true.abs() + info.smallest_normal * info.eps
    assert bool(((got - true).abs() <= bound).all()), worst(got, true, bound)


def sizes(truth: RowTruth, target: Tensor, f_target: Tensor, f_lse: Tensor) -> Tensor:
    """What the elements of a gradient are made of, without their signs: a logit's rounding grows with its depth."""
    depth = 1 - truth.log_q.clamp(min=-1e4)
    size = truth.log_q.exp() * depth**2 * f_lse[:, None]
    return size.scatter(1, target[:, None], f_target[:, None])


def check_loss(name: str, data: st.DataObject, device: torch.device) -> None:
    problem = data.draw(problems())
    options, formula = data.draw(objectives(name, problem.classes))
    before = problem.logits.clone()
    leaf = problem.logits.to(device).detach().requires_grad_()
    loss = getattr(cot_kernels, name)(
        leaf,
        problem.target.to(device),
        ignore_index=problem.ignore_index,
        reduction=problem.reduction,
        **options,
    )
    assert loss.dtype == problem.upstream.dtype and loss.shape == problem.upstream.shape
    (gradient,) = torch.autograd.grad(loss, leaf, problem.upstream.to(device))
    torch.testing.assert_close(problem.logits, before, rtol=0, atol=0, equal_nan=True)

    target = problem.target.long().reshape(-1)
    kept = target != problem.ignore_index
    count = int(kept.sum())
    logits = problem.rows(problem.logits.double())
    assert not problem.rows(gradient.cpu())[~kept].any()
    values = loss.detach().cpu().double()
    if problem.reduction == "none":
        assert not values.reshape(-1)[~kept].any()
        values, weights = values.reshape(-1)[kept], problem.upstream.double().reshape(-1)[kept]
    else:
        weights = problem.upstream.double().expand(count) / (count if problem.reduction == "mean" else 1)
    target, truth = target[kept], RowTruth.of(logits[kept], target[kept])

    true = formula(truth.log_odds, truth.negentropy)
    f_lse, f_negentropy = partials(formula, truth)
    # u carries the rounding of b, and the logarithm of u is as large as b.
    depth = 1 + truth.negentropy.abs() + truth.log_odds.abs().clamp(max=100)
    rough = f_negentropy.abs() * depth * (1 + options.get("alpha", 0.0))
    tolerance = unit(problem)
    bound = tolerance * (rough * depth + ("cross" in name) * true.abs().nan_to_num(posinf=0.0)) + UNDERFLOW
    if problem.reduction != "none":
        true, bound = true.sum(), bound.sum()
    if problem.reduction == "mean":
        true, bound = true / count, bound / max(count, 1)
    finite = true.isfinite()
    assert torch.equal(values.isfinite(), finite), (values, true)
    assert bool(((values - true).abs() <= bound)[finite].all()), (values, true, bound)

    # Nothing is left to take a gradient of where the target and every other class are absent.
    some = (logits[kept] != -torch.inf).any(1)
    everything = torch.zeros(len(kept), problem.classes, dtype=torch.float64)
    size = everything.clone()
    everything[kept] = truth.gradient(target, -f_lse * weights, f_lse * weights, f_negentropy * weights)
    rough = (f_lse.abs() + rough) * weights.abs()
    size[kept] = torch.where(some[:, None], sizes(truth, target, rough * depth, rough * depth), torch.inf)
    assert_gradient(problem, gradient, everything, size, tolerance)


def check_statistics(problem: Problem, wanted: set[int], device: torch.device) -> None:
    leaf = problem.logits.to(device).detach().requires_grad_()
    got = cot_kernels.complement_statistics(leaf, problem.target.to(device), ignore_index=problem.ignore_index)
    assert all(each.dtype == problem.upstream.dtype and each.shape == problem.target.shape for each in got)
    upstreams = [problem.upstream.roll(place).to(device) for place in range(3)]
    (gradient,) = torch.autograd.grad([got[each] for each in wanted], leaf, [upstreams[each] for each in wanted])

    target = problem.target.long().reshape(-1)
    kept = target != problem.ignore_index
    rows = [each.detach().cpu().double().reshape(-1) for each in got]
    assert not any(each[~kept].any() for each in rows) and not problem.rows(gradient.cpu())[~kept].any()
    target_logit, complement_lse, negentropy = (each[kept] for each in rows)
    target, truth = target[kept], RowTruth.of(problem.rows(problem.logits.double())[kept], target[kept])
    assert torch.equal(target_logit, truth.target_logit)
    tolerance = unit(problem)
    depth = 1 + truth.negentropy.abs()
    torch.testing.assert_close(complement_lse, truth.complement_lse, rtol=tolerance, atol=tolerance)
    assert bool(((negentropy - truth.negentropy).abs() <= tolerance * depth).all())

    f_target, f_lse, f_negentropy = (
        upstreams[each].cpu().double().reshape(-1)[kept] * (each in wanted) for each in range(3)
    )
    everything = torch.zeros(len(kept), problem.classes, dtype=torch.float64)
    size = everything.clone()
    everything[kept] = truth.gradient(target, f_target, f_lse, f_negentropy)
    size[kept] = sizes(truth, target, f_target.abs(), f_lse.abs() + f_negentropy.abs() * depth)
    assert_gradient(problem, gradient, everything, size, tolerance)


@pytest.mark.filterwarnings("ignore:.*got 2 classes")
@pytest.mark.parametrize("name", LOSSES)
@on_a_cpu
@given(data=st.data())
def test_losses(name: str, data: st.DataObject, device: torch.device) -> None:
    check_loss(name, data, device)


@pytest.mark.filterwarnings("ignore:.*got 2 classes")
@pytest.mark.parametrize("name", LOSSES)
@on_triton
@few
@given(data=st.data())
def test_losses_in_triton(name: str, data: st.DataObject, device: torch.device) -> None:
    check_loss(name, data, device)


@on_a_cpu
@given(problem=problems(reductions=("none",)), wanted=st.sets(st.integers(0, 2), min_size=1))
def test_statistics(problem: Problem, wanted: set[int], device: torch.device) -> None:
    check_statistics(problem, wanted, device)


@on_triton
@few
@given(problem=problems(reductions=("none",)), wanted=st.sets(st.integers(0, 2), min_size=1))
def test_statistics_in_triton(problem: Problem, wanted: set[int], device: torch.device) -> None:
    check_statistics(problem, wanted, device)


@pytest.mark.parametrize("case", oracle.CASES, ids=str)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 6),
    classes=st.integers(2, 40),
    margin=st.none() | st.floats(0, 20),
)
def test_the_truth_is_the_published_formula(
    case: oracle.Case, seed: int, rows: int, classes: int, margin: float | None
) -> None:
    logits, target = oracle.draw(rows, classes, margin, seed)
    truth = RowTruth.of(logits, target)
    formula = {
        "complement_entropy": lambda b, s: oracle.complement_entropy_of(b, s, 1e-7) / classes,
        "complement_entropy, exact": lambda b, s: oracle.complement_entropy_of(b, s, 0.0) / classes,
        "guided_complement_entropy": lambda b, s: (
            oracle.guided_complement_entropy_of(b, s, 1e-7, 1 / 3) / math.log(classes)
        ),
        "complement_cross_entropy": partial(oracle.cross_entropy_of, weight=2.0 / (classes - 1)),
        "cross_entropy": partial(oracle.cross_entropy_of, weight=0.0),
    }[case.name]
    weights = torch.linspace(-1, 2, rows, dtype=torch.float64)
    values, gradient = oracle.gradient_of(case.published, logits, target, weights)
    torch.testing.assert_close(formula(truth.log_odds, truth.negentropy), values, rtol=1e-8, atol=1e-10)
    f_lse, f_negentropy = partials(formula, truth)
    true = truth.gradient(target, -f_lse * weights, f_lse * weights, f_negentropy * weights)
    torch.testing.assert_close(true, gradient, rtol=1e-6, atol=1e-10)
