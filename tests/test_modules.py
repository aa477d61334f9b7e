"""The modules: thin, picklable, and strict about the number of classes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from oracle import draw

import cot_kernels
from cot_kernels import ComplementCrossEntropy, ComplementEntropy, GuidedComplementEntropy

MODULES: list[tuple[Any, Any, dict[str, Any]]] = [
    (ComplementEntropy, cot_kernels.complement_entropy, {"eps": 0.0, "reduction": "sum", "normalization": "none"}),
    (GuidedComplementEntropy, cot_kernels.guided_complement_entropy, {"alpha": 0.5, "eps": 1e-3, "ignore_index": 1}),
    (ComplementCrossEntropy, cot_kernels.complement_cross_entropy, {"gamma": -3.0, "normalization": "classes"}),
]


@pytest.mark.parametrize(("module", "function", "options"), MODULES)
def test_modules_are_their_functions(module: Any, function: Any, options: dict[str, Any]) -> None:
    logits, target = draw(6, 8, None)
    for arguments in ({}, options):
        expected = function(logits, target, **arguments)
        for criterion in (module(8, **arguments), module(**arguments)):
            assert torch.equal(criterion(logits, target), expected)
            for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
                assert torch.equal(other(logits, target), expected) and repr(other) == repr(criterion)
            assert not list(criterion.parameters()) and not criterion.state_dict()


@pytest.mark.parametrize("module", [ComplementEntropy, GuidedComplementEntropy, ComplementCrossEntropy])
def test_number_of_classes_is_checked(module: Any) -> None:
    with pytest.raises(ValueError, match=r"input must have num_classes = 10 classes, got 8 in shape \(2, 8\)"):
        module(10)(torch.zeros(2, 8), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="got 9 in shape"):
        module(10)(torch.zeros(9), torch.tensor(0))
    assert module(10)(torch.zeros(2, 10, 3), torch.zeros(2, 3, dtype=torch.long)).isfinite()
    for wrong in (1, 0, 2.5):
        with pytest.raises(ValueError, match="num_classes must be None or an int of at least 2"):
            module(wrong)


def test_representation_tells_the_settings() -> None:
    assert repr(ComplementEntropy(10, eps=0.0)) == (
        "ComplementEntropy(num_classes=10, ignore_index=-100, reduction=mean, eps=0.0, normalization=classes)"
    )
