"""What the libraries say beside a progress bar, and a reader of it need not know."""

from __future__ import annotations

import logging
import warnings

from transformers.utils import logging as transformers_logging


def silence() -> None:
    """Keeps the libraries from writing that over the progress bar."""
    # Which devices were found, that training reached its last epoch, tips. Warnings and errors stay.
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # That the classification head is newly initialised, as it must be, and a bar for reading the weights.
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # The texts are tokenised already: worker processes would only cost their start.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning's own use of a deprecated torch function.
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
