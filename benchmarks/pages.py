"""Pages of README and docs: tables stand between markers that bear their names."""

from __future__ import annotations

import re


def fill(text: str, name: str, content: str) -> str:
    """The text with what stands between the two markers of a name replaced."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    filled, count = re.subn(pattern, lambda match: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page must hold the markers of {name!r} once, found {count}")
    return filled
