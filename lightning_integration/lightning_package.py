"""Lightning, under whichever of its two names is in use: `pl` is `lightning.pytorch` or `pytorch_lightning`."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lightning.pytorch as pl
else:
    # The two packages are separate copies, and each Trainer knows the callbacks and modules of its own only: the
    # one that is already imported is the one whose Trainer will be used.
    names = sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules)
    for name in names:
        try:
            pl = import_module(name)
            break
        except ModuleNotFoundError:
            continue
    else:
        raise ModuleNotFoundError(
            'this part of lightning_integration needs Lightning: pip install "cot-kernels[lightning]"'
        )

Callback = pl.Callback

__all__ = ["Callback", "pl"]
