"""The C++ backend: that it is there, its row formulas, and its vectors on every level that this processor has."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from oracle import CASES, Case, draw, gradient_of
from test_objectives import FORMULAS, IDS
from test_objectives import rows as rows_of_formulas
from torch import Tensor

import cot_kernels
from cot_kernels import autograd
from cot_kernels.backends import aten
from cot_kernels.backends.native import backend as native
from cot_kernels.objectives import Objective


def test_it_is_built() -> None:
    """`pip install` goes on without it where there is no compiler; whoever runs this suite has one."""
    assert native._rows is not None, "the compiled backend is missing: `pip install -v -e .` says why"
    assert autograd.backend_for(torch.empty(1, 2)) is native
    assert native.level() == native._rows.levels()[-1] != ""


@pytest.fixture(params=[0, 1, 2], ids=["level 0", "level 1", "level 2"])
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    levels = native._rows.levels()
    if request.param >= len(levels):
        pytest.skip(f"this processor has the levels {', '.join(levels)}")
    native._rows.use(request.param)
    yield request.param
    native._rows.use(len(levels) - 1)


def partials(objective: Objective, log_odds: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """l and dl/db, dl/dS of rows with the complement's logits [N, 3] and these log-odds, as the state has them."""
    shift = others.amax(1, True)
    weights = (others - shift).exp()
    total = weights.sum(1)
    logits = torch.cat((((shift[:, 0] + total.log()) - log_odds).unsqueeze(1), others), 1)
    loss, (_, state) = native.loss(logits, torch.zeros(len(logits), dtype=torch.int64), -100, objective, "none")
    return loss, -state[3], state[1] * total


@pytest.mark.parametrize(("objective", "formula"), FORMULAS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_twins(
    objective: Objective, formula: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, level: int
) -> None:
    """The row formulas in C++ are those of PyTorch, from which cross-entropy to confidence nothing is left of."""
    log_odds, _ = rows_of_formulas()
    ends = torch.tensor([-700.0, -104.0, -88.0, 88.0, 104.0, 700.0], dtype=torch.float64)
    log_odds = torch.cat((log_odds, ends)).to(dtype)
    others = torch.randn(len(log_odds), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    others -= others.logsumexp(1, True)  # so that the target's logit is minus the log-odds, to the last bit or so
    found = partials(objective, log_odds, others)
    q = others.double().softmax(1)
    true = objective.rows(log_odds.double(), (q * q.log()).sum(1))
    tolerance = {"rtol": 1e-10, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-7}
    for got, expected in zip(found, true, strict=True):
        torch.testing.assert_close(got.double(), expected, **tolerance)


SHAPES = [(5, classes) for classes in (2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 100, 1025, 2500)] + [
    (2, 2, 1), (3, 5, 4), (2, 21, 37), (2, 40, 16), (1, 300, 3),
]  # fmt: skip


def layouts(logits: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values at several strides."""
    yield "adjoining", logits
    yield "every other class", logits.repeat_interleave(2, 1)[:, ::2]
    yield "odd beginnings", torch.cat((logits, logits), 1)[:, logits.shape[1] - 1 :][:, 1 : logits.shape[1] + 1]
    dims = list(range(logits.dim()))
    for order in itertools.permutations(dims):
        if list(order) != dims:
            back = [order.index(dim) for dim in dims]
            yield f"in memory {order}", logits.permute(order).contiguous().permute(back)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_shape_and_stride_as_in_float64(shape: tuple[int, ...], dtype: torch.dtype, level: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(dtype)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    target.view(-1)[-1] = -100
    values.movedim(1, -1)[target == -100] = torch.nan  # must not show
    upstream = torch.randn(target.shape, generator=generator, dtype=torch.float64)
    objective = FORMULAS[-1][0]
    true, saved = aten.loss(values.double(), target, -100, objective, "none")
    true_gradient = aten.gradient(values.double(), saved, upstream.view_as(true))
    rounding = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for name, logits in layouts(values):
        before = logits.clone()
        loss, saved = native.loss(logits, target, -100, objective, "none")
        gradient = native.gradient(logits, saved, upstream.to(loss.dtype))
        torch.testing.assert_close(loss.double(), true.view_as(loss), rtol=min(rounding, 2e-6), atol=1e-7, msg=name)
        assert (gradient.double() - true_gradient).norm() <= rounding * true_gradient.norm(), name
        assert gradient.dtype == dtype
        assert torch.equal(logits.nan_to_num(), before.nan_to_num()), name
        assert not gradient.movedim(1, -1)[target == -100].any(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_read_exactly_and_written_to_the_nearest(dtype: torch.dtype, level: int) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    logits = torch.stack((every, torch.zeros_like(every)), 1)
    target = torch.zeros(len(every), dtype=torch.int64)
    read, _, _, saved = native.statistics(logits, target, -100)
    assert torch.equal(read.nan_to_num(nan=1.5), every.float().nan_to_num(nan=1.5))
    assert torch.equal(read.isnan(), every.isnan())

    # Each of these, what lies halfway to the next one, and the neighbours of that in float32.
    near = every.float()[every.isfinite()]
    halfway = (near + torch.nextafter(near.to(dtype), torch.full_like(near, torch.inf).to(dtype)).float()) / 2
    values = torch.cat(
        (near, halfway, *(torch.nextafter(halfway, torch.full_like(halfway, to)) for to in (-torch.inf, torch.inf)))
    )
    values = torch.cat((values, torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 65519.99, 65520.0])))
    logits = torch.zeros(len(values), 2, dtype=dtype)
    target = torch.zeros(len(values), dtype=torch.int64)
    *_, saved = native.statistics(logits, target, -100)
    zeros = torch.zeros_like(values)
    written = native.statistics_gradient(logits, saved, values, zeros, zeros)[:, 0]
    assert torch.equal(written.isnan(), values.isnan())
    assert torch.equal(written.nan_to_num(nan=1.5), values.to(dtype).nan_to_num(nan=1.5))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_threads_share_rows_without_a_trace(case: Case) -> None:
    """Rows are computed alike by whichever thread takes them; sums of blocks may round otherwise."""
    logits, target = draw(700, 101, 3.0)
    weights = torch.rand(700, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append((*gradient_of(case.loss, logits.float(), target, weights), case.loss(logits.float(), target)))
    finally:
        torch.set_num_threads(threads)
    for loss, gradient, mean in found[1:]:
        assert torch.equal(loss, found[0][0]) and torch.equal(gradient, found[0][1])
        torch.testing.assert_close(mean, found[0][2])


def test_without_a_compiler_pytorch_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = draw(6, 9, 1.0)
    leaf = logits.float().requires_grad_()
    expected = torch.autograd.grad(cot_kernels.complement_entropy(leaf, target), leaf)[0]
    monkeypatch.setattr(native, "_rows", None)
    assert autograd.backend_for(leaf) is aten and native.level() == ""
    torch.testing.assert_close(torch.autograd.grad(cot_kernels.complement_entropy(leaf, target), leaf)[0], expected)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match="too few arguments"):
        native._rows.loss(0, 1)
    logits = native._rows_of(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), -100)
    with pytest.raises(TypeError, match="too many arguments"):
        native._rows.statistics(*logits, 0, 0, 0)
    with pytest.raises(TypeError, match="an integer"):
        native._rows.statistics("float32", *logits[1:], 0, 0)
    with pytest.raises(TypeError, match="at most 3 numbers"):
        native._rows.statistics(*logits[:2], (0, 3, 1, 1), *logits[3:], 0, 0)
    with pytest.raises(ValueError, match="levels"):
        native._rows.use(9)
