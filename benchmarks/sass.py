"""NVIDIA's machine code as a graph, and the instructions that a thread executes on its usual way through it.

The usual way of a streaming kernel is the tile that needs no mask: of all ways that compute a tile at all, told by its
exponentials, the one with the fewest instructions. The tile of the target and the ends of a row take longer ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_EXPONENTIAL = "MUFU.EX2"


@dataclass(frozen=True)
class Instruction:
    predicated: bool
    operation: str  # with its modifiers
    operands: str


@dataclass(frozen=True)
class Path:
    """What one thread executes on the usual way."""

    instructions: int
    special: int  # of them by the special function unit
    in_loop: bool  # a turn of the main loop, or where there is none all from entry to exit


@dataclass(frozen=True)
class Program:
    instructions: list[Instruction]
    labels: dict[str, int]  # to the index of the next instruction

    @classmethod
    def parse(cls, sass: str) -> Program:
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in sass.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = len(instructions)
            elif found := _INSTRUCTION.search(line):
                instructions.append(Instruction(found[1] is not None, found[2], found[3].strip()))
        return cls(instructions, labels)

    def successors(self, index: int) -> list[int]:
        """Where a thread may go next; nowhere after its exit."""
        at = self.instructions[index]
        name = at.operation.split(".")[0]
        beyond = [index + 1] if index + 1 < len(self.instructions) else []
        if name == "EXIT":
            return beyond if at.predicated else []
        if name == "BRA":
            target = self.labels[re.findall(r"\.L_x_\d+", at.operands)[-1]]
            conditional = at.predicated or at.operands.startswith(("UP", "!UP", "UR"))
            return [target, *beyond] if conditional else [target]
        return beyond

    def shortest(self, start: int, end: int | None, exponentials: int) -> tuple[int, int] | None:
        """Instructions and special functions on the shortest way without turning back that computes ``exponentials``.

        From ``start`` up to and with ``end``, or where that is None to an exit.
        """
        best: dict[int, dict[int, tuple[int, int]]] = {start: {0: (0, 0)}}
        arrived: list[tuple[int, int]] = []
        for index in range(start, len(self.instructions) if end is None else end + 1):
            operation = self.instructions[index].operation
            onward = self.successors(index)
            for counted, (length, special) in best.pop(index, {}).items():
                state = (length + 1, special + operation.startswith("MUFU"))
                now = min(exponentials, counted + (operation == _EXPONENTIAL))
                leaves = index == end or (end is None and operation.startswith("EXIT"))
                if leaves and now == exponentials:
                    arrived.append(state)
                for after in onward:
                    if after > index:
                        ways = best.setdefault(after, {})
                        ways[now] = min(ways.get(now, state), state)
        return min(arrived, default=None)

    def usual_path(self, elements: int, loops: int = 1) -> Path:
        """The usual way through a tile of which a thread computes ``elements`` logits, in each of ``loops`` in turn."""
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
        if apart:
            counts = [found for found, *_ in apart[:loops]]
            if len(counts) < loops:
                raise ValueError(f"{len(counts)} loops of the kernel compute {elements} exponentials, not {loops}")
            return Path(sum(length for length, _ in counts), sum(special for _, special in counts), in_loop=True)
        whole = self.shortest(0, None, elements)
        if whole is None:
            raise ValueError(f"no way through the kernel computes {elements} exponentials")
        return Path(*whole, in_loop=False)
