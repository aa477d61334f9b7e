"""The text of PTX, read: instructions, and those that are known to :mod:`ptx`."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    operation: tuple[str, ...]  # split at the dots
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    text: str


# What the kernels compile to, with every modifier: another one may mean something else.
_INT, _UINT, _FLOAT = r"[su](16|32|64)", r"u(16|32|64)", r"f(32|64)"
_KNOWN = re.compile(
    "|".join(
        (
            r"ld\.param\.[busf](8|16|32|64)",
            r"ld\.global(\.L1::evict_\w+)?(\.L2::cache_hint)?(\.v[24])?\.b(8|16|32|64)",
            r"st\.global(\.v[24])?\.b(8|16|32|64)",
            r"(ld|st)\.shared(\.v[24])?\.b(8|16|32|64)",
            r"(ld|st)matrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16",
            r"mov\.([busf](16|32|64)|pred)",
            r"setp\.(eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|nan|num)\.[busf](16|32|64)",
            r"selp\.[busf](16|32|64)",
            rf"cvt\.[su](8|16|32|64)\.[su](8|16|32|64)|cvt\.{_FLOAT}\.(bf16|f16)|cvt\.rn\.b?f16(x2)?\.f32",
            r"cvt\.rn\.f32\.(f64|s32|u32)|cvt\.f64\.f32|cvt\.rn\.f64\.[su](32|64)",
            r"shfl\.sync\.(bfly|idx)\.b32|redux\.sync\.max(\.NaN)?\.f32|prmt\.b32",
            r"(and|or|xor|not)\.(b(16|32|64)|pred)|(add|sub)\.s16x2",
            rf"(add|sub|mul\.lo|mad\.lo|div|rem|max|min|neg|abs|shr)\.{_INT}|shl\.b(16|32|64)|shr\.{_UINT}",
            r"(mul|mad)\.wide\.[su](16|32)|bfe\.[su]32",
            r"(add|sub|mul)(\.rn)?(\.ftz)?\.(f32|f64|f32x2)|fma\.rn(\.ftz)?\.(f32|f64|f32x2)|(add|sub)\.rn\.f32\.b?f16",
            rf"(max|min)(\.NaN)?\.{_FLOAT}|(neg|abs)(\.ftz)?\.{_FLOAT}|max\.f16(x2)?|max(\.NaN)?\.bf16x2",
            r"div\.(full\.f32|approx\.ftz\.f32|rn\.f32|rn\.f64)",
            r"(ex2|lg2|rcp|sqrt)\.approx(\.ftz)?\.f32|rcp\.approx\.ftz\.f64",
            r"bar\.(warp\.)?sync|bra(\.uni)?|ret|createpolicy\.fractional\.L2::\w+\.b64",
        )
    )
)

_LINE = re.compile(r"^(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*?);?$")


@functools.lru_cache(maxsize=64)
def parse(ptx: str) -> tuple[list[Instruction], dict[str, int], list[str]]:
    """Instructions, labels, and the names of the parameters, of the one kernel of a module."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    parameters = re.findall(r"^\s*\.param\s.*?(\w+)[,\s]*$", ptx, flags=re.MULTILINE)
    entry = ptx[ptx.index("\n{", ptx.index(".entry")) + 2 :]
    body = re.sub(r"//[^\n]*", "", entry[: entry.index("\n}")])
    for line in body.splitlines():
        for part in re.findall(r"[^;]+;|\$\w+:", line):
            text = part.strip("{} \t")
            if text.endswith(":"):
                labels[text[:-1]] = len(instructions)
            elif text and not text.startswith("."):
                found = _LINE.match(text)
                if found is None or not _KNOWN.fullmatch(found[3]):
                    raise NotImplementedError(f"not understood: {text}")
                operands = tuple(each.strip() for each in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", found[4]))
                operation = tuple(re.split(r"\.|::", found[3]))
                instructions.append(Instruction(operation, operands, found[2], found[1] == "!", text))
    return instructions, labels, parameters
