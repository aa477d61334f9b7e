"""The complement loss is tried once before any step: what that finds, and that training does not notice."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from integrations.loops import adam, adamw, largest_gap, published_complement_entropy, sgd, two_step_loop
from torch import Tensor, nn

from cot_kernels import ComplementEntropy, complement_entropy
from lightning_integration import ComplementObjectiveEngine, ComplementObjectiveTraining, causal_lm_logits_and_targets

# Lightning's advice about loaders, loggers and step counts has no place in a unit test's output.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

LATE = [{}, {"start_epoch": 1}, {"every_n_steps": 5}]


@pytest.fixture(params=["mixin", "callback"])
def refused(request: pytest.FixtureRequest, classifier: Any, network: Any, loader: Any, trainer: Any) -> Any:
    """Trains with a function for the logits and an objective that must be refused before `training_step` runs."""

    def fit(
        error: type[Exception],
        message: str,
        logits: Any = lambda module, batch: (module(batch[0]), batch[1]),
        objective: Any = published_complement_entropy,
        net: nn.Module | None = None,
    ) -> None:
        for late in LATE:
            if request.param == "mixin":
                cls = type("Mixed", (classifier,), {"complement_logits": logits})
                module = cls(net or network(), adam, ComplementObjectiveEngine(objective, **late))
                run = trainer()
            else:
                module = classifier(net or network(), adam, None)
                run = trainer(callbacks=[ComplementObjectiveTraining(objective, logits=logits, **late)])
            with pytest.raises(error, match=message):
                run.fit(module, loader)
            assert module.calls == 0

    return fit


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (lambda m, b: m(b[0]), TypeError, r"a pair of Tensors \(logits, targets\), got a Tensor of shape \(4, 5\)"),
        (lambda m, b: None, TypeError, "a pair of Tensors .*got a NoneType: pass logits=function"),
        (lambda m, b: (m(b[0]), b[1], b[1]), TypeError, "got a tuple of 3: Tensor, Tensor, Tensor"),
        (lambda m, b: (m(b[0]), [1] * 4), TypeError, "got a tuple of 2: Tensor, list"),
        (lambda m, b: (m(b[0]).long(), b[1]), TypeError, "floating-point Tensor .*dtype torch.int64"),
        (lambda m, b: (m(b[0]).detach(), b[1]), TypeError, "with their graph, .*without detach"),
        (lambda m, b: (m(b[0]), b[1].double()), TypeError, "class indices, an integer Tensor .*torch.float64"),
        (lambda m, b: (m(b[0]), b[1] > 2), TypeError, "class indices, an integer Tensor .*torch.bool"),
        (lambda m, b: (m(b[0])[:, :1], b[1] * 0), ValueError, r"got 1 in shape \(4, 1\): without wrong classes"),
    ],
)
def test_what_logits_return(refused: Any, logits: Any, error: Any, message: str) -> None:
    refused(error, message, logits)


@pytest.mark.parametrize(
    ("objective", "error", "message"),
    [
        (lambda logits, targets: 0.5, TypeError, "objective must return a scalar Tensor, got a float"),
        (lambda logits, targets: None, TypeError, "objective must return a scalar Tensor, got a NoneType"),
        (lambda logits, targets: logits.sum(dim=1), ValueError, r"must return a scalar, got shape \(4,\): take the"),
        (lambda logits, targets: logits.sum().detach(), TypeError, r"does not require grad.*without detach\(\)"),
    ],
)
def test_what_objectives_return(refused: Any, objective: Any, error: Any, message: str) -> None:
    refused(error, message, objective=objective)


@pytest.mark.parametrize("cls", [ComplementObjectiveEngine, ComplementObjectiveTraining])
def test_a_class_is_no_objective(cls: Any) -> None:
    with pytest.raises(TypeError, match=r"got the class ComplementEntropy: pass an instance.*ComplementEntropy\(\)"):
        cls(ComplementEntropy)


@pytest.mark.parametrize("late", LATE)
def test_a_forward_with_other_arguments(
    late: dict[str, int], classifier: Any, network: Any, loader: Any, trainer: Any
) -> None:
    class Masked(classifier):  # type: ignore[misc]
        def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
            raise AssertionError

    module = Masked(network(), adam, None)
    message = r"forward of Masked cannot be called with x .*missing a required argument: 'mask'\): pass logits=function"
    with pytest.raises(TypeError, match=message):
        trainer(callbacks=[ComplementObjectiveTraining(**late)]).fit(module, loader)
    assert module.calls == 0


def test_a_forward_without_an_entry_of_the_batch(classifier: Any, network: Any, rows: Any, trainer: Any) -> None:
    module = classifier(network(), adam, None)
    loader = torch.utils.data.DataLoader([{"inputs": rows[0], "ids": rows[1], "labels": rows[1]}], batch_size=None)
    with pytest.raises(TypeError, match=r"\['ids', 'inputs'\] of the batch alone \(got an unexpected .*'ids'\)"):
        trainer(callbacks=[ComplementObjectiveTraining()]).fit(module, loader)
    assert module.calls == 0


def test_errors_of_the_modules_own_are_left_alone(classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    class Broken(classifier):  # type: ignore[misc]
        def forward(self, inputs: Tensor) -> Tensor:
            raise TypeError("of its own")

    with pytest.raises(TypeError, match=r"^of its own$"):
        trainer(callbacks=[ComplementObjectiveTraining()]).fit(Broken(network(), adam, None), loader)


@pytest.mark.parametrize("late", LATE)
def test_two_classes_warn_before_the_first_step(late: dict[str, int], classifier: Any, rows: Any, trainer: Any) -> None:
    warned: list[bool] = []

    class Binary(classifier):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            warned.append(any("2 classes" in str(warning.message) for warning in caught))
            return super().training_step(batch, batch_idx)  # type: ignore[no-any-return]

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows[0], rows[1] % 2), batch_size=22)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = Binary(nn.Linear(6, 2).double(), adam, None)
        trainer(callbacks=[ComplementObjectiveTraining(**late)], max_epochs=1).fit(module, loader)
    assert warned == [True]


class Noisy(nn.Module):
    """BatchNorm, Dropout, noise of NumPy and of Python, a buffer that is replaced and one that is changed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 5)
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("mean", None)
        self.register_buffer("sum", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.passes = self.passes + 1
        assert isinstance(self.sum, Tensor)
        self.sum.add_(inputs.sum().detach())
        hidden = F.dropout(torch.tanh(self.norm(self.first(inputs))), 0.5, self.training)
        logits: Tensor = self.last(hidden) + random.random() + torch.tensor(numpy.random.rand(5))
        return logits


def noisy() -> nn.Module:
    torch.manual_seed(3)
    return Noisy().double()


class InOrder:
    """The batches of a loader without the random number that it draws each epoch."""

    def __init__(self, loader: Any) -> None:
        self.batches = list(loader)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


@pytest.fixture
def seeded() -> Iterator[Callable[[], None]]:
    states = random.getstate(), numpy.random.get_state()

    def seed() -> None:
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)

    with torch.random.fork_rng():
        yield seed
    random.setstate(states[0])
    numpy.random.set_state(states[1])


@pytest.mark.parametrize("way", ["mixin", "callback"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_training_does_not_notice(
    way: str, accumulate: int, seeded: Any, pl: ModuleType, classifier: Any, loader: Any, trainer: Any
) -> None:
    class Seed(pl.Callback):  # type: ignore[name-defined,misc]
        def on_train_start(self, trainer: Any, module: Any) -> None:
            seeded()

    expected, batches = noisy(), InOrder(loader)
    seeded()
    optimizers = [adamw(expected.parameters()) for _ in range(2)]
    two_step_loop(expected, batches.batches, *optimizers, accumulate=accumulate)

    mixin = way == "mixin"
    module = classifier(noisy(), adamw, ComplementObjectiveEngine(published_complement_entropy) if mixin else None)
    cot = [] if mixin else [ComplementObjectiveTraining(published_complement_entropy)]
    trainer(callbacks=[*cot, Seed()], accumulate_grad_batches=accumulate).fit(module, batches)
    assert largest_gap(module.network, expected) < 1e-10


def test_no_gradients_are_left(classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    class Watching(classifier):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.calls == 0:
                assert all(parameter.grad is None for parameter in self.parameters())
                assert self.network[1].num_batches_tracked == 0
            return super().training_step(batch, batch_idx)  # type: ignore[no-any-return]

    module = Watching(network(), adam, None)
    trainer(callbacks=[ComplementObjectiveTraining()], max_epochs=1).fit(module, loader)
    assert module.calls == len(loader)


def test_resumed_training_equals_uninterrupted(
    seeded: Any, pl: ModuleType, classifier: Any, loader: Any, trainer: Any, tmp_path: Any
) -> None:
    """The first batch after a resume is a rehearsal too."""

    class Seed(pl.Callback):  # type: ignore[name-defined,misc]
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            seeded()

    def fit(module: Any, epochs: int, **options: Any) -> Any:
        run = trainer(max_epochs=epochs, callbacks=[ComplementObjectiveTraining(), Seed()])
        run.fit(module, InOrder(loader), **options)
        return run

    whole, first, resumed = (classifier(noisy(), adamw, None) for _ in range(3))
    fit(whole, 4)
    fit(first, 2).save_checkpoint(tmp_path / "two.ckpt")
    fit(resumed, 4, ckpt_path=tmp_path / "two.ckpt")
    assert largest_gap(resumed.network, whole.network) == 0.0


def test_once_a_training(classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    calls: list[int] = []

    def counted(logits: Tensor, targets: Tensor) -> Tensor:
        calls.append(len(targets))
        return complement_entropy(logits, targets)

    cot = ComplementObjectiveTraining(counted, start_epoch=1)
    for _ in range(2):
        calls.clear()
        trainer(callbacks=[cot]).fit(classifier(network(), sgd, None), loader)
        assert len(calls) == 1 + len(loader)


def test_batches_that_logits_take_apart(classifier: Any, network: Any, rows: Any, trainer: Any) -> None:
    class Mapped(classifier):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch["x"]), batch["y"])

    def logits(module: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        targets = batch.pop("y")
        return module(batch.pop("x")), targets

    module = Mapped(network(), adam, None)
    loader = torch.utils.data.DataLoader([{"x": rows[0], "y": rows[1]}], batch_size=None)
    trainer(callbacks=[ComplementObjectiveTraining(logits=logits)], max_epochs=1).fit(module, loader)
    expected = network()
    two_step_loop(expected, [rows], adam(expected.parameters()), adam(expected.parameters()), epochs=1)
    assert largest_gap(module.network, expected) < 1e-8


def test_optimizers_that_evaluate_twice(classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    class Sharpness(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            return super().step(closure)

    module = classifier(network(), lambda parameters: Sharpness(parameters, lr=0.1), None)
    with pytest.raises(RuntimeError, match="does not support Sharpness, which evaluates its loss more than once a ste"):
        trainer(callbacks=[ComplementObjectiveTraining()]).fit(module, loader)


def test_optimizers_without_a_learning_rate(classifier: Any, network: Any, loader: Any, trainer: Any) -> None:
    class Fixed(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"size": 0.1})

    for primary, other in ((Fixed, "separate"), (Fixed, "shared"), (sgd, Fixed)):
        module = classifier(network(), primary, None)
        with pytest.raises(ValueError, match='Fixed has groups without "lr", to which lr_ratio applies: use an optim'):
            trainer(callbacks=[ComplementObjectiveTraining(optimizer=other)]).fit(module, loader)
        assert module.calls == 0


def test_causal_logits_of_a_batch_without_labels() -> None:
    with pytest.raises(TypeError, match='a batch must be a mapping with "labels", got a list of 1: Tensor'):
        causal_lm_logits_and_targets(nn.Identity(), [torch.zeros(2, 3)])  # type: ignore[arg-type]
