"""Complement objective training without a Trainer: in plain PyTorch, and in Lightning Fabric.

    python -m examples.fabric

trains a small convolutional net on scikit-learn's digits both ways, each with COT and without, in seconds on a CPU;
both ways end with the same parameters. The recipe is the five numbered lines: per batch a step on cross-entropy, then,
after a fresh forward through the updated weights, one on the complement entropy. Without COT, line 1 leaves out its
second pair. Each step has an optimizer of its own here; to share one, name it twice. With a learning rate schedule,
step one scheduler per optimizer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from cot_kernels import complement_entropy
from examples.digits import Digits, DigitsNet

EPOCHS = 5


def build() -> tuple[nn.Module, SGD, SGD]:
    """The network, always with the same weights, and an optimizer for each of the two steps."""
    torch.manual_seed(0)
    network = DigitsNet().network
    return network, SGD(network.parameters(), lr=0.05), SGD(network.parameters(), lr=0.05)


def train_in_plain_pytorch(data: Digits, epochs: int = EPOCHS, cot: bool = True) -> nn.Module:
    """The trained network."""
    network, primary, secondary = build()
    loader = data.train_dataloader()
    steps = ((F.cross_entropy, primary), (complement_entropy, secondary))[: 2 if cot else 1]  # 1
    for _ in range(epochs):
        for images, digits in loader:
            for criterion, optimizer in steps:
                optimizer.zero_grad()  # 2
                loss = criterion(network(images), digits)  # 3
                loss.backward()  # type: ignore[no-untyped-call]  # 4
                optimizer.step()  # 5
    return network


def train_in_fabric(data: Digits, epochs: int = EPOCHS, cot: bool = True) -> nn.Module:
    """The same, on whatever accelerator, precision and strategy Fabric is given."""
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    network, primary, secondary = fabric.setup(*build())
    loader = fabric.setup_dataloaders(data.train_dataloader())
    steps = ((F.cross_entropy, primary), (complement_entropy, secondary))[: 2 if cot else 1]  # 1
    for _ in range(epochs):
        for images, digits in loader:
            for criterion, optimizer in steps:
                optimizer.zero_grad()  # 2
                loss = criterion(network(images), digits)  # 3
                fabric.backward(loss)  # 4
                optimizer.step()  # 5
    trained: nn.Module = network.module
    return trained


@torch.no_grad()
def evaluate(network: nn.Module, loader: DataLoader[tuple[Tensor, Tensor]]) -> tuple[float, float, float]:
    """Accuracy, cross-entropy and the complement entropy loss on the one batch of a loader."""
    images, digits = next(iter(loader))
    logits = network.eval()(images)
    accuracy = (logits.argmax(dim=1) == digits).double().mean().item()
    return accuracy, F.cross_entropy(logits, digits).item(), complement_entropy(logits, digits).item()


def main() -> None:
    data = Digits()
    data.setup()
    ways: dict[str, Callable[..., nn.Module]] = {
        "plain PyTorch": train_in_plain_pytorch,
        "Lightning Fabric": train_in_fabric,
    }
    print(f"Digits, {EPOCHS} epochs; on the test images:\n")
    print(f"{'':32}{'accuracy, %':>13}{'cross-entropy':>15}{'complement entropy loss':>25}")
    gaps = []
    for method, cot in (("cross-entropy", False), ("two-step COT", True)):
        networks = {name: train(data, cot=cot) for name, train in ways.items()}
        for name, network in networks.items():
            accuracy, cross_entropy, complement = evaluate(network, data.test_dataloader())
            print(f"{name:18}{method:14}{100 * accuracy:13.1f}{cross_entropy:15.4f}{complement:25.4f}")
        plain, fabric = (nn.utils.parameters_to_vector(network.parameters()) for network in networks.values())
        gaps.append((plain - fabric).abs().max().item())
    print(f"\nLargest difference between the parameters of the two ways: {max(gaps):.1g}")


if __name__ == "__main__":
    main()
