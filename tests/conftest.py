"""Two backends, one suite: ATen on the CPU, and Triton on a GPU where there is one, in its interpreter where not."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # The interpreter is chosen when a kernel is decorated. Set for that moment only: the rest of the suite must see
    # the CPU path that users get.
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):  # imported by the interpreter on its first run, with the same choice
        import triton.experimental.gluon  # noqa: F401
import twin_kernel  # noqa: E402, F401

import cot_kernels.autograd  # noqa: E402
from cot_kernels.backends import aten  # noqa: E402
from cot_kernels.backends.triton import backend as triton_backend  # noqa: E402

if not HAS_GPU:
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(params=["aten", "aten-blocks", pytest.param("triton", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device to put tensors on; the losses run on the backend that the test is parametrised with.

    "aten-blocks" sends small problems through the path that ATen keeps for large ones, in several blocks.
    """
    if request.param == "triton":
        monkeypatch.setattr(cot_kernels.autograd, "backend_for", lambda logits: triton_backend)
        return torch.device("cuda" if HAS_GPU else "cpu")
    monkeypatch.setattr(cot_kernels.autograd, "backend_for", lambda logits: aten)
    if request.param == "aten-blocks":
        monkeypatch.setattr(aten, "FEW_ELEMENTS", 0)
        monkeypatch.setattr(aten, "BLOCK_BYTES", 256)
    return torch.device("cpu")
