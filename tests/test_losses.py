"""Every loss, on both backends, against the published formula in float64."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from oracle import CASES, Case, RowTruth, complement_entropy, cross_entropy_of, draw, gradient_of, relative_error
from torch.nn import functional as F

import cot_kernels
from cot_kernels.backends.triton import layout

CLASSES = [2, 3, 127, 128, 129, 1000, 4096, 32000, 50257, 128256]
MARGINS = [None, 0.0, 5.0, 10.0, 15.0, 20.0]


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("margin", MARGINS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("ignore:.*got 2 classes")
def test_float32_equals_the_published_formula(
    case: Case, margin: float | None, classes: int, device: torch.device
) -> None:
    rows = 17 if classes < 1000 else 5 if classes < 32000 else 1
    logits, target = draw(rows, classes, margin)
    logits = logits.float().double()
    weights = torch.randn(rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    true_loss, true_gradient = gradient_of(case.published, logits, target, weights)

    loss, gradient = gradient_of(case.loss, logits.float().to(device), target.to(device), weights)

    assert loss.dtype == gradient.dtype == torch.float32
    settled = complement_entropy(logits, target, eps=0.0, reduction="none").abs() * classes > 1e-3
    loss_error = (loss.double().cpu() - true_loss).abs() / true_loss.abs().clamp(min=1)
    assert loss_error[settled].max().item() <= 1e-6 if settled.any() else True
    if classes == 2 and "complement_entropy" in case.name and true_gradient.norm() < 1e-3:
        return  # one wrong class: the gradient is zero, or the epsilon's own, which has no relative accuracy to ask for
    assert relative_error(gradient, true_gradient) <= (2e-6 if margin is None else 5e-6)


@pytest.mark.parametrize("classes", [3, 129, 1000, 32000])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_equals_the_published_formula(case: Case, classes: int, device: torch.device) -> None:
    logits, target = draw(5, classes, 3.0)
    weights = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    true_loss, true_gradient = gradient_of(case.published, logits, target, weights)

    loss, gradient = gradient_of(case.loss, logits.to(device), target.to(device), weights)

    torch.testing.assert_close(loss.cpu(), true_loss, rtol=1e-10, atol=1e-12)
    assert relative_error(gradient, true_gradient) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [10, 129, 1000, 4096, 50257])
@pytest.mark.parametrize("margin", [None, 8.0, 20.0], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_precision_rounds_only_what_it_returns(
    case: Case, margin: float | None, classes: int, dtype: torch.dtype, device: torch.device
) -> None:
    rows = 9 if classes < 1000 else 3
    logits, target = draw(rows, classes, margin)
    logits = logits.to(dtype)
    # Upstream gradients that keep the products within the range of float16.
    weights = torch.full(
        (rows,), 512.0 * (classes if case.name.startswith("complement_entropy") else 1), dtype=torch.float64
    )
    true_loss, true_gradient = gradient_of(case.published, logits.double(), target, weights)

    loss, gradient = gradient_of(case.loss, logits.to(device), target.to(device), weights)

    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    assert relative_error(loss, true_loss) <= 1e-5
    unit_roundoff = torch.finfo(dtype).eps / 2
    error = (gradient.double().cpu() - true_gradient).abs()
    # 5e-6 of the row's norm is what float32 may be off by before the rounding; subnormals round to a fixed step.
    bound = 2 * unit_roundoff * true_gradient.abs() + torch.finfo(dtype).smallest_normal * 2 * unit_roundoff
    assert bool((error <= bound + 5e-6 * true_gradient.norm(dim=1, keepdim=True)).all())


@pytest.mark.parametrize("value", [30.0, 100.0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_saturated_rows(case: Case, value: float, device: torch.device) -> None:
    """Targets far above and far below the rest: finite, and the published formula in float64."""
    logits, target = draw(6, 40, None)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    logits.scatter_(1, target[:, None], (signs * value)[:, None])
    weights = torch.ones(6, dtype=torch.float64)
    loss, gradient = gradient_of(case.loss, logits.float().to(device), target.to(device), weights)
    true_loss, true_gradient = gradient_of(case.published, logits.float().double(), target, weights)
    assert bool(loss.isfinite().all()) and bool(gradient.isfinite().all())
    torch.testing.assert_close(loss.cpu().double(), true_loss, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(gradient.cpu().double(), true_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("eps", [1e-46, 9e-31])
def test_an_eps_that_float32_cannot_divide_by_is_refused(eps: float) -> None:
    """At 1e-35 the loss would not fade out as published: the quotient is beyond float32."""
    logits, target = torch.tensor([[200.0, 0.0, 0.0]]), torch.tensor([0])
    with pytest.raises(ValueError, match="eps must be 0 or at least 1e-30, got"):
        cot_kernels.complement_entropy(logits, target, eps=eps)


def test_the_smallest_eps_fades_the_loss_out(device: torch.device) -> None:
    logits, target = draw(5, 10, 80.0)
    true = complement_entropy(logits, target, eps=1e-30, reduction="none")
    loss = cot_kernels.complement_entropy(logits.float().to(device), target.to(device), eps=1e-30, reduction="none")
    torch.testing.assert_close(loss.cpu().double(), true, rtol=1e-4, atol=1e-7)


def test_a_guide_that_overflows_is_infinite(device: torch.device) -> None:
    logits, target = draw(3, 6, 1.0)
    logits, target = logits.float().to(device), target.to(device)
    loss = cot_kernels.guided_complement_entropy(logits, target, eps=1e30, alpha=3.0, reduction="none")
    assert not bool(loss.isfinite().any())


def test_classes_at_the_floor_are_absent_from_an_empty_complement(device: torch.device) -> None:
    logits = torch.tensor([[1.0, -1e30, -1e30], [1.0, -2e30, -torch.inf]], device=device).requires_grad_()
    statistics = cot_kernels.complement_statistics(logits, torch.zeros(2, dtype=torch.int64, device=device))
    assert statistics.complement_lse.tolist() == [-torch.inf] * 2 and statistics.negentropy.tolist() == [0.0] * 2
    sums = [statistics.negentropy, statistics.complement_lse]
    (gradient,) = torch.autograd.grad(sums, logits, [torch.ones_like(each) for each in sums])
    assert gradient.abs().sum().item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classes_above_the_floor_are_there(dtype: torch.dtype, device: torch.device) -> None:
    logits = torch.full((1, 4), -9.99e29, dtype=dtype, device=device).requires_grad_()
    loss = cot_kernels.cross_entropy(logits, torch.ones(1, dtype=torch.int64, device=device))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(math.log(4))
    torch.testing.assert_close(gradient.cpu(), torch.tensor([[0.25, -0.75, 0.25, 0.25]], dtype=dtype))


@pytest.mark.parametrize("shape", [(2, 40000), (2, 3000), (20, 3000), (4, 70), (2, 7, 40), (2, 70, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_logits_there_are(
    dtype: torch.dtype, shape: tuple[int, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a running sum that a class of 3e38 makes nothing, not even a product with it may overflow."""
    monkeypatch.setattr(layout, "multiprocessors", lambda device: 2)  # so that twenty long rows are not split
    logits = torch.zeros(shape, dtype=dtype)
    logits[:, 1] = logits[:, -2] = 3e38
    logits[:, 2] = -3e38
    leaf = logits.to(device).requires_grad_()
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64, device=device)
    statistics = cot_kernels.complement_statistics(leaf, target)
    torch.testing.assert_close(statistics.negentropy.cpu(), torch.full(target.shape, -math.log(2)))
    loss = cot_kernels.complement_entropy(leaf, target, normalization="none", reduction="sum")
    assert loss.item() == pytest.approx(-math.log(2) * target.numel(), rel=1e-5)
    assert torch.autograd.grad(loss, leaf)[0].abs().max().item() < 1e-6


def test_equal_logits(device: torch.device) -> None:
    logits = torch.zeros(3, 50, device=device)
    target = torch.tensor([0, 7, 49], device=device)
    negentropy = cot_kernels.complement_statistics(logits, target).negentropy
    torch.testing.assert_close(negentropy.cpu(), torch.full((3,), -3.8918202981), rtol=1e-6, atol=0)
    gradient = gradient_of(cot_kernels.complement_entropy, logits, target, torch.ones(3), eps=0.0)[1]
    assert gradient.abs().max().item() < 1e-8


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("classes", [6, 1500])
def test_masked_classes_are_absent(case: Case, classes: int, device: torch.device) -> None:
    """A class at -inf, or at the lowest finite number, changes nothing but the K that the loss is divided by."""
    logits, target = draw(4, classes, 1.0)
    target = target % (classes // 2)
    logits[:, classes // 2 :] = -torch.inf
    weights = torch.ones(4, dtype=torch.float64)
    for absent in (-torch.inf, torch.finfo(torch.float32).min):
        masked = logits.masked_fill(logits == -torch.inf, absent).float()
        loss, gradient = gradient_of(case.loss, masked.to(device), target.to(device), weights)
        kept = logits[:, : classes // 2]
        true_loss, true_gradient = gradient_of(case.published, kept, target, weights)
        if case.name == "complement_cross_entropy":
            weight = 2.0 / (classes - 1)
            negentropy = cot_kernels.complement_statistics(kept.to(device), target.to(device)).negentropy.cpu()
            true_loss = F.cross_entropy(kept, target, reduction="none") + weight * negentropy
        elif case.name == "guided_complement_entropy":
            true_loss = true_loss * torch.log(torch.tensor(classes / 2)) / torch.log(torch.tensor(float(classes)))
        elif case.name != "cross_entropy":
            true_loss, true_gradient = true_loss / 2, true_gradient / 2
        torch.testing.assert_close(loss.double().cpu(), true_loss, rtol=2e-6, atol=1e-7)
        assert gradient[:, classes // 2 :].abs().max().item() == 0
        if case.name[:18] == "complement_entropy" or case.name == "cross_entropy":
            assert relative_error(gradient[:, : classes // 2], true_gradient) < 5e-6


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_finite_complement_class_and_none(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    logits = torch.full((4, 5), -torch.inf, dtype=dtype, device=device)
    logits[0, :2] = torch.tensor([1.0, 2.0])  # target and one other
    logits[1, 0] = 3.0  # the target alone
    logits[2, 1:3] = torch.tensor([0.5, 0.25])  # the target itself is masked, and in the last row all are
    target = torch.zeros(4, dtype=torch.int32, device=device)
    loss, gradient = gradient_of(case.loss, logits, target, torch.ones(4))
    assert bool(gradient.isfinite().all())
    assert not gradient[3, 1:].any()  # to the target itself the limit of dl/dz_g
    statistics = cot_kernels.complement_statistics(logits, target)
    assert statistics.negentropy[:2].abs().max().item() <= 1e-6
    assert statistics.complement_lse.tolist()[:2] == [2.0, -torch.inf]
    assert loss[1].item() == pytest.approx(0.0, abs=1e-7)
    if "cross_entropy" in case.name:
        assert loss[2].item() == torch.inf
    else:
        assert bool(loss.isfinite().all())


@pytest.mark.parametrize("classes", [5, 100, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e8, 1e9, 4e9, 1e20])
def test_logits_whose_last_digit_is_more_than_an_exponent(
    magnitude: float, dtype: torch.dtype, classes: int, device: torch.device
) -> None:
    """From 1e9 on numbers of float32 are 64 apart: nothing of how a maximum was rounded may reach an exponential."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(6, classes, generator=generator, dtype=torch.float64) * magnitude).to(dtype)
    target = torch.randint(classes, (6,), generator=generator)
    logits[0] = logits[0, 0]
    logits[1, ::3] = logits[1].max()
    logits[2], logits[2, target[2]] = -magnitude, 3.0
    leaf = logits.to(device).requires_grad_()
    losses = cot_kernels.complement_cross_entropy(
        leaf, target.to(device), gamma=-0.7, normalization="none", reduction="none"
    )
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    truth = RowTruth.of(logits.double(), target)
    true = cross_entropy_of(truth.log_odds, truth.negentropy, 0.7)
    torch.testing.assert_close(losses.cpu().double(), true, rtol=1e-5, atol=1e-5)
    miss = truth.log_odds.sigmoid()
    expected = truth.gradient(target, -miss, miss, torch.full_like(miss, 0.7))
    torch.testing.assert_close(gradient.cpu().double(), expected, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("fill", [-torch.inf, torch.inf, torch.nan, 3e38, -3e38])
def test_extreme_logits_are_no_reason_to_warn(case: Case, fill: float) -> None:
    """Nor are they a reason to fail: overflow is part of the arithmetic."""
    logits, target = draw(4, 6, 200.0)
    logits[0], logits[1, 2] = fill, fill
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient_of(case.loss, logits.float(), target, torch.ones(4))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nan_and_positive_infinity_are_not_hidden(case: Case, device: torch.device) -> None:
    logits, target = draw(4, 9, None)
    target[:] = 0
    logits[0, 4] = torch.nan
    logits[1, 1:] = torch.nan
    logits[2, 4] = torch.inf
    logits[3, 0] = torch.nan  # the target's own
    loss, gradient = gradient_of(case.loss, logits.float().to(device), target.to(device), torch.ones(4))
    assert bool(loss.isnan().all())
    assert bool(gradient.isnan().any(1).all())


def test_exact_mode_does_not_see_the_target_logit(device: torch.device) -> None:
    logits, target = draw(7, 33, None)
    logits = logits.float().to(device)
    moved = logits.scatter(1, target.to(device)[:, None], 25.0)
    weights = torch.ones(7)
    loss, gradient = gradient_of(cot_kernels.complement_entropy, logits, target.to(device), weights, eps=0.0)
    again, gradient_again = gradient_of(cot_kernels.complement_entropy, moved, target.to(device), weights, eps=0.0)
    assert torch.equal(loss, again)
    assert torch.equal(gradient, gradient_again)
    assert gradient.gather(1, target.to(device)[:, None]).abs().max().item() == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_shift_of_the_row_changes_nothing(case: Case, device: torch.device, request: pytest.FixtureRequest) -> None:
    """Logits on a grid of 1/256 shift without rounding, so any difference would be ours: L itself is never rounded.

    Triton's interpreter rounds the product within a multiply-add, which no GPU does: a small shift must do there.
    """
    interpreted = request.node.callspec.params["device"] == "triton" and device.type == "cpu"
    shift = 4 if interpreted else 1000
    logits, target = draw(5, 70, 2.0)
    logits = (logits * 256).round() / 256
    weights = torch.ones(5)
    loss, gradient = gradient_of(case.loss, logits.float().to(device), target.to(device), weights)
    shifted, shifted_gradient = gradient_of(case.loss, (logits + shift).float().to(device), target.to(device), weights)
    torch.testing.assert_close(shifted, loss, rtol=2e-6, atol=2e-7)
    assert relative_error(shifted_gradient, gradient) < 2e-6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_sums_to_zero(case: Case, device: torch.device) -> None:
    logits, target = draw(6, 300, 1.0)
    gradient = gradient_of(case.loss, logits.to(device), target.to(device), torch.ones(6))[1]
    assert gradient.sum(1).abs().max().item() < 1e-14


def test_cross_entropy_is_accurate_where_torch_rounds_to_zero(device: torch.device) -> None:
    logits = torch.tensor([[20.0, 0.0, 0.0]], device=device)
    loss = cot_kernels.cross_entropy(logits, torch.tensor([0], device=device))
    assert loss.item() == pytest.approx(2 * 2.061153622438558e-09, rel=1e-5)
