"""Machine code as a graph, and the instructions that a thread executes on its usual way through it.

The usual way of a streaming kernel is the tile that needs no mask: of all ways that compute a tile at all, told by its
exponentials, the one with the fewest instructions. The tile of the target and those at the ends of a row take others.
"""

from __future__ import annotations

import functools
import heapq
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeAlias

Way: TypeAlias = tuple[int, int, tuple[int, ...]]  # instructions, of them special functions, and the blocks passed


@dataclass(frozen=True)
class Instruction:
    """``jumps`` to a label, ``leaves`` the kernel, and may go on with the next instruction instead.

    A load from global memory ``loads`` registers; any instruction waits for those that it ``names``.
    """

    exponential: bool = False
    special: bool = False  # by the special function unit; on AMD, a transcendental one
    exchange: bool = False  # between the threads of a warp
    jumps: str | None = None
    leaves: bool = False
    goes_on: bool = True
    loads: frozenset[int] = frozenset()
    names: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Path:
    """What one thread executes: in a turn of the main loop, or loops, in a turn of the loop around it, and once.

    Nothing is counted twice: ``around`` is what a turn of the outer loop takes beside the main loop, and ``once`` what
    lies beside both. Without an outer loop ``around`` is None. ``masked`` are turns on the next shortest way and on the
    longest, where the main loop has more than one that computes. ``waits`` is how often the thread waits for global
    memory in a turn of each main loop, ``waits_around`` in one of the outer loop beside, ``waits_once`` beside both.
    """

    turn: int
    turn_special: int
    once: int
    once_special: int
    around: int | None = None
    around_special: int = 0
    masked: tuple[int, int] | None = None
    waits: tuple[int, ...] = ()
    waits_around: int = 0
    waits_once: int = 0


@dataclass(frozen=True)
class Block:
    """Instructions that are executed one after the other, and the blocks that may come next."""

    length: int
    special: int
    exponentials: int
    exchanges: bool
    leaves: bool
    onward: list[int]


@dataclass(frozen=True)
class Program:
    instructions: list[Instruction]
    labels: dict[str, int]  # to the index of the next instruction

    @functools.cached_property
    def starts(self) -> list[int]:
        """The first instruction of each block."""
        whole = self.instructions
        ends = {index + 1 for index, at in enumerate(whole) if at.jumps or at.leaves or not at.goes_on}
        return sorted({0, *ends, *self.labels.values()} - {len(whole)})

    @functools.cached_property
    def blocks(self) -> list[Block]:
        whole, starts = self.instructions, self.starts
        number = {start: block for block, start in enumerate(starts)}
        found = []
        for start, end in zip(starts, [*starts[1:], len(whole)], strict=True):
            held, last = whole[start:end], whole[end - 1]
            onward = [] if last.jumps is None else [number[self.labels[last.jumps]]]
            if last.goes_on and end < len(whole):
                onward.append(number[end])
            special, exponentials = sum(at.special for at in held), sum(at.exponential for at in held)
            exchanges = any(at.exchange for at in held)
            found.append(Block(end - start, special, exponentials, exchanges, last.leaves, onward))
        return found

    def shortest(
        self,
        start: int,
        end: int | None,
        exponentials: int,
        through: Collection[int] = (),
        back: bool = False,
    ) -> Way | None:
        """The shortest way that computes ``exponentials``.

        From the block ``start`` up to and with ``end``, or where that is None to an exit; ``through`` one of some
        blocks, if any are given; without turning back unless ``back``.
        """
        ways: list[tuple[int, int, int, int, bool, tuple[int, ...]]] = [(0, 0, start, exponentials, bool(through), ())]
        seen: set[tuple[int, int, bool]] = set()
        while ways:
            length, special, at, missing, wanting, passed = heapq.heappop(ways)
            if (at, missing, wanting) in seen:
                continue
            seen.add((at, missing, wanting))
            block = self.blocks[at]
            length, special = length + block.length, special + block.special
            missing, wanting = max(0, missing - block.exponentials), wanting and at not in through
            if not missing and not wanting and (at == end if end is not None else block.leaves):
                return length, special, (*passed, at)
            if at != end:
                for after in block.onward:
                    if back or after > at:
                        heapq.heappush(ways, (length, special, after, missing, wanting, (*passed, at)))
        return None

    def turns(self, exponentials: int, through: Collection[int] = (), back: bool = False) -> list[tuple[Way, int, int]]:
        """The shortest way around each loop that computes ``exponentials``, its first block and its last."""
        return sorted(
            (found, first, last)
            for last, block in enumerate(self.blocks)
            for first in block.onward
            if first <= last and (found := self.shortest(first, last, exponentials, through, back))
        )

    def waits(self, way: Way, turns: int = 1) -> int:
        """How often a thread waits for global memory on the last of so many turns of a way.

        Instructions are issued in their order: the first that needs what was loaded waits, and by then all has come
        that was asked for before.
        """
        asked: set[int] = set()
        for _ in range(turns):
            count = 0
            for block in way[2]:
                for at in self.instructions[self.starts[block] : self.starts[block] + self.blocks[block].length]:
                    if at.names & asked:
                        count += 1
                        asked.clear()
                    asked |= at.loads
        return count

    def masked_turns(self, usual: int, first: int, last: int, exponentials: int) -> tuple[int, int] | None:
        """Instructions of the loop's next shortest way, and of the longest one, which take other blocks."""
        ways = (self.shortest(first, last, exponentials, through=(block,)) for block in range(first + 1, last))
        others = [way[0] for way in ways if way and way[0] > usual]
        return (min(others), max(others)) if others else None

    def usual_path(self, elements: int, loops: int = 1, nested: bool = False) -> Path:
        """The usual way through a tile of which a thread computes ``elements`` logits, in each of ``loops`` in turn.

        Where ``nested``, the one loop lies in another, in which threads exchange what they found. Without a loop, from
        entry to exit, all counts as one turn.
        """
        apart: list[tuple[Way, int, int]] = []
        for turn in self.turns(elements):
            if all(turn[1] > last or turn[2] < first for _, first, last in apart):
                apart.append(turn)
        # A loop whose turn begins before its head is entered by turning back.
        whole = self.shortest(0, None, elements * loops) or self.shortest(0, None, elements * loops, back=True)
        if whole is None:
            raise ValueError(f"no way through the kernel computes {elements * loops} exponentials")
        if not apart:
            return Path(*whole[:2], 0, 0, waits=(self.waits(whole),))
        if len(apart) < loops:
            raise ValueError(f"{len(apart)} loops of the kernel compute {elements} exponentials, not {loops}")
        length = sum(found[0] for found, *_ in apart[:loops])
        special = sum(found[1] for found, *_ in apart[:loops])
        ways = [self.masked_turns(found[0], first, last, elements) for found, first, last in apart[:loops]]
        known = [way for way in ways if way is not None]
        masked = (sum(least for least, _ in known), sum(most for _, most in known)) if known == ways else None
        waits = tuple(self.waits(found, turns=2) for found, *_ in apart[:loops])
        in_all = self.waits(whole)
        if not nested:
            beside = (whole[0] - length, whole[1] - special)
            return Path(length, special, *beside, masked=masked, waits=waits, waits_once=max(0, in_all - sum(waits)))
        exchanging = [number for number, block in enumerate(self.blocks) if block.exchanges]
        outer, *_ = self.turns(elements, exchanging, back=True)[0]
        beside = (whole[0] - outer[0], whole[1] - outer[1])
        around = self.waits(outer, turns=2)
        return Path(
            length, special, *beside, outer[0] - length, outer[1] - special, masked,
            waits, max(0, around - sum(waits)), max(0, in_all - around),
        )  # fmt: skip


_SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_REGISTER = re.compile(r"\bR(\d+)(\.64)?")
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
            # A call of a place within the kernel is a jump; that of a function comes back.
            places = re.findall(r"\.L_x_\d+", operands) if name in ("BRA", "CALL") else []
            jumps = places[-1] if places else None
            conditional = predicate is not None or operands.startswith(("UP", "!UP", "UR"))
            named = [(int(number), 2 if pair else 1) for number, pair in _REGISTER.findall(operands)]
            loaded = range(0)
            if name == "LDG" and named:
                width = re.search(r"\.(64|128|256)\b", operation)
                loaded = range(named[0][0], named[0][0] + (int(width[1]) // 32 if width else 1))
            instructions.append(
                Instruction(
                    operation == "MUFU.EX2", name == "MUFU", name == "SHFL", jumps, name == "EXIT",
                    goes_on=conditional or not (places or name == "EXIT"),
                    loads=frozenset(loaded),
                    names=frozenset(first + more for first, size in named for more in range(size)),
                )
            )  # fmt: skip
    return Program(instructions, labels)


_GCN_LABEL = re.compile(r"(\.LBB\d+_\d+):")
_GCN = re.compile(r"\s+((?:s|v|ds|global|buffer|flat|scratch)_\w+)\s*([^;]*)")
_EXCHANGE = re.compile(r"dpp|row_|quad_perm|ds_bpermute|ds_swizzle|permlane|readlane")
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
                    bool(_EXCHANGE.search(f"{operation} {operands}")),
                    jumps,
                    operation == "s_endpgm",
                    goes_on=operation not in ("s_branch", "s_endpgm"),
                )
            )
    return Program(instructions, labels)
