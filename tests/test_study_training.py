"""The recipes of the study, its criteria and its measures, against independent ones."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from study_problems import METHOD_NAMES, small_part, small_task
from torch import Tensor, nn

from cot_kernels import reference
from study.data import Part
from study.methods import CONFIGURATIONS, METHODS, Recipe, Step, confidence_penalty, cross_entropy, focal
from study.metrics import evaluate, predict, score
from study.training import Training

# ------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # before the first second step
def test_two_steps_are_those_of_a_plain_loop(optimizer: Any, separate: bool, every: int) -> None:
    task, part = small_task(optimizer=optimizer, rate=0.05), small_part()

    def complement(logits: Tensor, target: Tensor) -> Tensor:
        return reference.complement_entropy(logits, target)

    recipe = Recipe((Step(cross_entropy), Step(complement, separate, rate=0.5 if separate else 1.0, every=every)))
    training = Training(task, part, recipe, 0.05, seed=3, epochs=3)
    plain = copy.deepcopy(training.network)
    training.run()

    def make(rate: float) -> torch.optim.Optimizer:
        if optimizer == "sgd":
            return torch.optim.SGD(plain.parameters(), rate, momentum=0.9)
        return torch.optim.AdamW(plain.parameters(), rate, weight_decay=0.0)

    first = make(0.05)
    second = make(0.025) if separate else first
    order, batches, taken = torch.Generator().manual_seed(3), 12, 0
    for _ in range(3):
        permuted = torch.randperm(40, generator=order)
        for start in range(0, 40, 10):
            index = permuted[start : start + 10]
            warm = 0.05 * batches
            factor = (taken + 1) / (warm + 1)
            if taken >= warm:
                factor = 0.5 * (1 + math.cos(math.pi * (taken - warm) / (batches - warm)))
            taken += 1
            for group in first.param_groups:
                group["lr"] = 0.05 * factor
            first.zero_grad()
            F.cross_entropy(plain(part.inputs[0][index]), part.target[index]).backward()
            first.step()
            if taken % every == 0:
                for group in second.param_groups:
                    group["lr"] = (0.025 if separate else 0.05) * factor
                second.zero_grad()
                reference.complement_entropy(plain(part.inputs[0][index]), part.target[index]).backward()
                second.step()
    for ours, theirs in zip(training.network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_step_may_have_another_criterion_on_the_batches_between() -> None:
    taken: list[str] = []

    def noted(name: str) -> Any:
        return lambda logits, target: taken.append(name) or F.cross_entropy(logits, target)

    recipe = Recipe((Step(noted("fourth"), every=4, otherwise=noted("other")),))
    Training(small_task(), small_part(), recipe, 0.1, seed=0, epochs=2).run()
    assert taken == ["other", "other", "other", "fourth"] * 2


def test_methods_of_a_seed_start_alike_and_see_the_same_batches() -> None:
    task, part = small_task(), small_part()
    trainings = [
        Training(task, part, METHODS[name].recipe(0.5, "sgd"), 0.1, seed=5, epochs=2) for name in ("ce", "cot", "gce")
    ]
    orders = [torch.cat(list(training.order())) for training in trainings]
    weights = [nn.utils.parameters_to_vector(training.network.parameters()) for training in trainings]
    assert all(torch.equal(orders[0], order) for order in orders)
    assert all(torch.equal(weights[0], vector) for vector in weights)
    twice = Training(task, part, METHODS["ce_twice"].recipe(0.0, "sgd"), 0.1, seed=5, epochs=2)
    assert twice.batches == 2 * trainings[0].batches
    assert torch.equal(torch.cat(list(twice.order()))[: len(orders[0])], orders[0])


def test_weight_decay_reaches_the_optimizer() -> None:
    ends = []
    for strength in (0.0, 0.5):
        recipe = METHODS["weight_decay"].recipe(strength, "sgd")
        network = Training(small_task(), small_part(), recipe, 0.1, seed=0, epochs=3).run()
        ends.append(nn.utils.parameters_to_vector(network.parameters()).norm().item())
    assert ends[1] < 0.9 * ends[0]


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_every_method_learns(name: str) -> None:
    method, part = METHODS[name], small_part(200)
    recipe = method.recipe(method.strengths[len(method.strengths) // 2], "sgd")
    training = Training(small_task(epochs=20), part, recipe, 1.0 if name == "gce" else 0.1, seed=0, epochs=20)
    assert evaluate(training.run(), part, small_task(), attacked=False)["score"] > 0.8


# ------------------------------------------------------------------------------------------- criteria


def logits_and_target() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(12, 5, generator=generator, dtype=torch.float64)
    target = torch.randint(5, (12,), generator=generator)
    target[[2, 7]] = -100
    return logits.requires_grad_(), target


def test_confidence_penalty() -> None:
    logits, target = logits_and_target()
    rows = target >= 0
    entropy = torch.distributions.Categorical(logits=logits[rows]).entropy().mean()
    expected = F.cross_entropy(logits[rows], target[rows]) - 0.3 * entropy
    torch.testing.assert_close(confidence_penalty(logits, target, weight=0.3), expected)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal(gamma: float) -> None:
    logits, target = logits_and_target()
    rows = target >= 0
    right = logits[rows].softmax(dim=1).gather(1, target[rows, None])
    torch.testing.assert_close(focal(logits, target, gamma), ((1 - right) ** gamma * -right.log()).mean())


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_gradients_are_finite_on_certain_and_ignored_rows(name: str) -> None:
    logits, target = logits_and_target()
    certain = (100 * F.one_hot(target.clamp_min(0), 5)).double().requires_grad_()
    method = METHODS[name]
    for strength in method.strengths:
        for step in method.recipe(strength, "sgd").steps:
            for each in (logits, certain):
                (gradient,) = torch.autograd.grad(step.criterion(each, target), each)
                assert gradient.isfinite().all()
                assert not gradient[target < 0].any()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_every_method_has_as_many_configurations(kind: Any) -> None:
    assert {len(set(method.configurations(kind))) for method in METHODS.values()} == {CONFIGURATIONS}


# ------------------------------------------------------------------------------------------- measures


def test_measures_of_known_logits() -> None:
    class Given(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            return rows

    logits, target = logits_and_target()
    part = Part((logits.detach(),), target)
    found = evaluate(Given(), part, small_task(classes=5), attacked=False)
    rows, classes = logits.detach()[target >= 0], target[target >= 0]
    assert found["score"] == pytest.approx((rows.argmax(1) == classes).double().mean().item())
    assert found["nll"] == pytest.approx(F.cross_entropy(rows, classes).item())
    wrong = rows.masked_fill(F.one_hot(classes, 5).bool(), -math.inf)
    q = wrong.softmax(dim=1)
    expected = -torch.special.xlogy(q, q).sum(1).mean().item()
    assert found["complement_entropy"] == pytest.approx(expected)
    p, right = (each.numpy() for each in (rows.softmax(1).amax(1), rows.argmax(1) == classes))
    bins = np.minimum((p * 15).astype(int), 14)
    gaps = [abs(right[bins == b].mean() - p[bins == b].mean()) * (bins == b).mean() for b in set(bins)]
    assert found["calibration_error"] == pytest.approx(sum(gaps), abs=1e-6)


def test_f1_pools_all_classes_but_the_first() -> None:
    target = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
    found = torch.tensor([0, 0, 2, 1, 0, 2, 3, 1])
    task = small_task(score="f1")
    precision, recall = 3 / 5, 3 / 5
    assert score(F.one_hot(found).double(), target, task) == pytest.approx(
        2 * precision * recall / (precision + recall)
    )
    assert score(torch.zeros(8, 4).double(), target, task) == 0.0
    assert score(torch.eye(4).double()[:1], target[:1], task) == 0.0  # none there, none found


def test_attacks_move_each_input_by_their_strength_and_raise_the_loss() -> None:
    part = small_part(60)
    network = Training(small_task(), part, METHODS["ce"].recipe(0.0, "sgd"), 0.1, 0, epochs=5).run()
    losses = [F.cross_entropy(*predict(network, part, attack=strength)).item() for strength in (0.0, 0.1, 0.3)]
    assert losses[0] < losses[1] < losses[2]
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    predict(network, part, attack=0.1)
    torch.testing.assert_close((seen[-1] - part.inputs[0]).abs(), torch.full_like(part.inputs[0], 0.1))
    found = evaluate(network, part, small_task(), attacked=True)
    assert found["score"] >= found["score_attack_1"] >= found["score_attack_2"]


def test_a_network_without_finite_logits_says_nothing() -> None:
    class Broken(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            return rows[:, :4] * math.nan

    found = evaluate(Broken(), small_part(), small_task(), attacked=True)
    assert found["diverged"] == 1 and found["nll"] == pytest.approx(math.log(4))
    assert all(math.isfinite(value) for value in found.values())
