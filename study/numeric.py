"""Tasks of numbers: scikit-learn's digits, MNIST-1D, and generated classes by the hundred and thousand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .data import Data, Part, in_three


def digits(limit: int | None) -> Data:
    """scikit-learn's 1,797 images of 8 x 8 pixels in [0, 1]: 300 to learn from, 500 for validation, 997 to test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return in_three(Part((images[order],), torch.from_numpy(found.target).long()[order]), 300, 500, limit)


def digits_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def mnist1d(limit: int | None) -> Data:
    """Signals of 40 values, from the package's generator and its own settings, but for their number.

    4,000 to learn from, as in the original; 2,000 for validation and 3,000 to test, where the original has 1,000.
    """
    from mnist1d.data import get_dataset_args, make_dataset

    settings = get_dataset_args()
    parts = (4000, 2000, 3000) if limit is None else (limit, limit, limit)
    settings.num_samples, settings.train_split = sum(parts), 1.0
    found = make_dataset(settings)
    signals = torch.from_numpy(found["x"]).float()[:, None]
    return in_three(Part((signals,), torch.from_numpy(found["y"]).long()), parts[0], parts[1], None)


def mnist1d_network() -> nn.Module:
    """Three convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv1d(1, 25, 5, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv1d(25, 25, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv1d(25, 25, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(25 * 5, 10),
    )


FEATURES = 64
SIBLINGS = 10  # classes of a family, which lie closer to each other than to the rest
LATENT = 16
SPREAD = 0.5  # of siblings; families have 1
NOISE = 0.45


def generated(classes: int, train: int, validation: int, test: int, limit: int | None) -> Data:
    """A mixture of Gaussians in families of ten classes, seen through a fixed random network: nobody's real data.

    x = W2 tanh(W1 (c_y + noise)) / scale, with W1 of 16 -> 128 and W2 of 128 -> 64.
    """
    generator = torch.Generator().manual_seed(classes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    centres = normal(classes // SIBLINGS, LATENT).repeat_interleave(SIBLINGS, dim=0) + SPREAD * normal(classes, LATENT)
    first, second = normal(LATENT, 128) / LATENT**0.5, normal(128, FEATURES) / 128**0.5
    target = torch.randint(classes, (train + validation + test,), generator=generator)
    features = torch.tanh((centres[target] + NOISE * normal(len(target), LATENT)) @ first) @ second
    return in_three(Part((features / features.std(),), target), train, validation, limit)


def generated_network(classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, classes))
