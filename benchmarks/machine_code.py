"""Machine code as a graph, and the instructions that a thread executes on its usual way through it.

The usual way of a streaming kernel is the tile that needs no mask: of all ways that compute a tile at all, told by its
exponentials, the one with the fewest instructions. The tile of the target and the ends of a row take longer ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """``jumps`` to a label, ``leaves`` the kernel, and may go on with the next instruction instead."""

    exponential: bool = False
    special: bool = False  # by the special function unit; on AMD, a transcendental one
    jumps: str | None = None
    leaves: bool = False
    goes_on: bool = True


@dataclass(frozen=True)
class Path:
    """What one thread executes: in a turn of the main loop, or loops, and once beside them."""

    turn: int
    turn_special: int
    once: int
    once_special: int


@dataclass(frozen=True)
class Program:
    instructions: list[Instruction]
    labels: dict[str, int]  # to the index of the next instruction

    def successors(self, index: int) -> list[int]:
        """Where a thread may go next; nowhere after its exit."""
        at = self.instructions[index]
        onward = [] if at.jumps is None else [self.labels[at.jumps]]
        return [*onward, index + 1] if at.goes_on and index + 1 < len(self.instructions) else onward

    def shortest(self, start: int, end: int | None, exponentials: int) -> tuple[int, int] | None:
        """Instructions and special functions on the shortest way without turning back that computes ``exponentials``.

        From ``start`` up to and with ``end``, or where that is None to an exit.
        """
        best: dict[int, dict[int, tuple[int, int]]] = {start: {0: (0, 0)}}
        arrived: list[tuple[int, int]] = []
        for index in range(start, len(self.instructions) if end is None else end + 1):
            at = self.instructions[index]
            onward = self.successors(index)
            for counted, (length, special) in best.pop(index, {}).items():
                state = (length + 1, special + at.special)
                now = min(exponentials, counted + at.exponential)
                leaves = index == end or (end is None and at.leaves)
                if leaves and now == exponentials:
                    arrived.append(state)
                for after in onward:
                    if after > index:
                        ways = best.setdefault(after, {})
                        ways[now] = min(ways.get(now, state), state)
        return min(arrived, default=None)

    def usual_path(self, elements: int, loops: int = 1) -> Path:
        """The usual way through a tile of which a thread computes ``elements`` logits, in each of ``loops`` in turn.

        Without a loop, from entry to exit, all counts as one turn.
        """
        turns = [
            (found, target, index)
            for index in range(len(self.instructions))
            for target in self.successors(index)
            if target < index and (found := self.shortest(target, index, elements))
        ]
        apart: list[tuple[tuple[int, int], int, int]] = []
        for turn in sorted(turns):
            if all(turn[1] > last or turn[2] < first for _, first, last in apart):
                apart.append(turn)
        whole = self.shortest(0, None, elements * loops)
        if not apart:
            if whole is None:
                raise ValueError(f"no way through the kernel computes {elements * loops} exponentials")
            return Path(*whole, 0, 0)
        if len(apart) < loops:
            raise ValueError(f"{len(apart)} loops of the kernel compute {elements} exponentials, not {loops}")
        length, special = (sum(found[at] for found, *_ in apart[:loops]) for at in (0, 1))
        if whole is not None:
            return Path(length, special, whole[0] - length, whole[1] - special)
        # A turn begins before the head of its loop: in its place the way of a row without tiles.
        beside = self.shortest(0, None, 0)
        assert beside is not None
        return Path(length, special, *beside)


_SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_SASS_LABEL = re.compile(r"(\.L_x_\d+):")


def parse_sass(text: str) -> Program:
    """NVIDIA's machine code, as nvdisasm prints it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _SASS_LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _SASS.search(line):
            predicate, operation, operands = found[1], found[2], found[3].strip()
            name = operation.split(".")[0]
            jumps = re.findall(r"\.L_x_\d+", operands)[-1] if name == "BRA" else None
            conditional = predicate is not None or operands.startswith(("UP", "!UP", "UR"))
            instructions.append(
                Instruction(
                    operation == "MUFU.EX2", name == "MUFU", jumps, name == "EXIT",
                    goes_on=conditional or name not in ("BRA", "EXIT"),
                )
            )  # fmt: skip
    return Program(instructions, labels)


_GCN_LABEL = re.compile(r"(\.LBB\d+_\d+):")
_GCN = re.compile(r"\s+((?:s|v|ds|global|buffer|flat|scratch)_\w+)\s*([^;]*)")
_TRANSCENDENTAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_")


def parse_gcn(text: str) -> Program:
    """AMD's assembly. Its branches are a wavefront's: what single lanes skip is executed, and counted."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _GCN_LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _GCN.match(line):
            operation, operands = found[1], found[2].strip()
            jumps = operands if operation.startswith(("s_branch", "s_cbranch")) else None
            instructions.append(
                Instruction(
                    operation.startswith("v_exp_"),
                    bool(_TRANSCENDENTAL.match(operation)),
                    jumps,
                    operation == "s_endpgm",
                    goes_on=operation not in ("s_branch", "s_endpgm"),
                )
            )
    return Program(instructions, labels)
