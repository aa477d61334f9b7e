"""The C++ backend: that it is there, its row formulas, and its vectors at every remainder and stride."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import RowTruth
from test_objectives import FORMULAS, IDS
from torch import Tensor

import cot_kernels
from cot_kernels import autograd
from cot_kernels.backends import accumulation_dtype, aten
from cot_kernels.backends.native import backend as native
from cot_kernels.objectives import ComplementEntropyObjective, CrossEntropyObjective, Objective

pytestmark = pytest.mark.skipif(native._rows is None, reason="not built: see test_it_is_built")
EXACT = ComplementEntropyObjective(1.0, 0.0)
TOLERANCE = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-13},
    torch.float32: {"rtol": 5e-6, "atol": 1e-6},
    torch.float16: {"rtol": 2e-3, "atol": 2e-4},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-3},
}


@pytest.mark.skipif(False, reason="")
def test_it_is_built() -> None:
    """`pip install` goes on without it where there is no compiler; a machine that runs this suite has one."""
    assert native._rows is not None, "the compiled backend is missing: pip install -e . -v tells why"
