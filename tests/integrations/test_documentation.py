"""The Python in README and docs runs as it stands there, with the names that the text takes as given."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def run(page: str, heading: str, **given: Any) -> dict[str, Any]:
    """Runs the blocks of a section, one after the other; the names they leave."""
    text = (ROOT / page).read_text(encoding="utf-8")
    level, section = re.split(rf"^(#+) {re.escape(heading)}$", text, flags=re.MULTILINE)[1:]
    section = re.split(rf"^{level} ", section, flags=re.MULTILINE)[0]
    blocks = re.findall(r"^( *)```python\n(.*?)^\1```$", section, flags=re.MULTILINE | re.DOTALL)
    assert blocks
    for _, block in blocks:
        exec(textwrap.dedent(block), given)
    return given


def test_classes_are_weighted_around_a_loss() -> None:
    """The block compares itself with F.cross_entropy, -100 among the targets."""
    run(
        "docs/pytorch.md",
        "What does not work",
        torch=torch,
        logits=torch.randn(5, 10),
        target=torch.tensor([3, -100, 0, 9, -100]),
    )
