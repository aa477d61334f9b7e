"""PTX executed on the CPU: what Triton's compiler made of a kernel, instruction by instruction, without a GPU.

Triton's interpreter shows that a kernel's Python is right. It contracts no multiplications, splits no accesses and
trusts no promise of alignment; the compiler does. Here all threads of a grid go through the compiled code together, a
NumPy array a register. An access that is not aligned to its width, or that touches no allocation, is an error.

Only what these kernels compile to is known (:mod:`ptx_code`): another instruction is an error too. Threads that have
gone different ways meet again where the threads of a warp, or of a program, wait for each other.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from ptx_arithmetic import BINARY, COMPARE, Array, arithmetic, dtype_of, permuted, to_bfloat16, to_half, unsigned
from ptx_code import Instruction, parse
from ptx_memory import ACCESS, Memory, Races

# Which threads execute an instruction: mostly all of them, and then nothing need be gathered and put back.
Threads: TypeAlias = "Array | slice"

WARP = 32
EVERYONE = slice(None)


@functools.lru_cache(maxsize=4096)
def _constant(operand: str, dtype: np.dtype[Any]) -> Array:
    """Of all threads: one number."""
    if operand == "global_smem":
        return np.zeros(1, dtype)
    hexadecimal = re.fullmatch(r"0[fd]([0-9A-Fa-f]+)", operand)  # of a number, and as wide as that
    mask = (1 << 8 * dtype.itemsize) - 1
    bits = int(hexadecimal[1], 16) if hexadecimal else int(operand.rstrip("U"), 0) & mask
    constant = np.full(1, bits, unsigned(dtype.itemsize)).view(dtype)
    constant.flags.writeable = False
    return constant


class Machine:
    """A grid of programs that executes one kernel: ``lanes`` threads, and every register for all of them."""

    def __init__(self, ptx: str, memory: Memory, programs: int, warps: int, shared_bytes: int, ordered: bool) -> None:
        self.races = Races(len(memory.bytes), warps * WARP) if ordered else None
        self.barriers = np.zeros(programs, np.int64)  # that each program has passed
        self.code, self.labels, self.parameters = parse(ptx)
        self.memory = memory
        self.threads = threads = warps * WARP
        self.lanes = programs * threads
        lane = np.arange(self.lanes)
        self.special = {
            "%tid.x": (lane % threads).astype(np.uint32),
            "%ctaid.x": (lane // threads).astype(np.uint32),
            "%nctaid.x": np.full(self.lanes, programs, np.uint32),
        }
        self.lane = lane
        self.together: int | None = 0  # where all threads are; and where not, of each
        self.place = np.zeros(self.lanes, np.int64)
        self.shared_bytes = -(-max(shared_bytes, ACCESS) // 256) * 256
        self.shared = np.full(programs * self.shared_bytes, 0xFF, np.uint8)
        self.shared_base = (lane // threads) * self.shared_bytes
        self.registers: dict[str, Array] = {}
        self.arguments: dict[str, int | float] = {}
        self.executed = 0  # instructions, of all threads

    def run(self, arguments: Sequence[int | float]) -> None:
        self.arguments = dict(zip(self.parameters, arguments, strict=True))
        end = len(self.code)
        with np.errstate(all="ignore"):
            while True:
                while (at := self.together) is not None:
                    if at == end:
                        return
                    self._step(at, self.code[at], EVERYONE)
                self._step_of_some()

    def _step_of_some(self) -> None:
        """An instruction of those that are furthest behind and need not wait."""
        first = int(self.place.min())
        if first == self.place.max():
            self.together = first
            return
        for at in np.unique(self.place[self.place < len(self.code)]):
            active = self._ready(self.code[at], np.flatnonzero(self.place == at))
            if len(active):
                self._step(int(at), self.code[at], active)
                return
        raise RuntimeError(f"threads wait for each other at {self.code[first].text}")

    def _ready(self, instruction: Instruction, active: Array) -> Array:
        """Of threads that are to execute an instruction, those that need not wait for others of their group."""
        group = {"bar": self.threads}.get(instruction.operation[0])
        if instruction.operation[0] in ("shfl", "redux", "ldmatrix", "stmatrix") or "warp" in instruction.operation:
            group = WARP
        if group is None:
            return active
        arrived = np.bincount(active // group, minlength=self.lanes // group)
        return active[arrived[active // group] == group]

    def _go(self, to: int, active: Threads) -> None:
        """Threads go on there, where all of them are or only some."""
        if active is EVERYONE:
            self.together = to
            return
        if self.together is not None:
            self.place[:], self.together = self.together, None
        self.place[active] = to

    def _count(self, active: Threads) -> int:
        return self.lanes if isinstance(active, slice) else len(active)

    def _step(self, at: int, instruction: Instruction, active: Threads) -> None:
        self._go(at + 1, active)
        self.executed += self._count(active)
        if instruction.predicate is not None:
            asked = self.registers[instruction.predicate][active] != instruction.negated
            if not asked.all():
                active = self.lane[active][asked]
        if not self._count(active):
            return
        name = instruction.operation[0]
        if name == "bra":
            self._go(self.labels[instruction.operands[0]], active)
        elif name in ("ret", "exit"):
            self._go(len(self.code), active)
        elif name == "bar":
            if "warp" not in instruction.operation or self.threads == WARP:
                self.barriers[np.unique(self.lane[active] // self.threads)] += 1
        elif name != "createpolicy":
            try:
                self._execute(instruction, active)
            except (KeyError, ValueError) as error:
                raise RuntimeError(f"{error}, in {instruction.text}") from error

    # Operands

    def _register(self, name: str) -> Array:
        """One that was never written holds garbage: NaN."""
        if name not in self.registers:
            kind = re.sub(r"\d+$", "", name)
            if kind == "%p":
                raise NotImplementedError(f"{name} is read, and was never written")
            size = {"%rs": 2, "%r": 4, "%f": 4, "%rd": 8, "%fd": 8}[kind]
            self.registers[name] = np.full(self.lanes, -1 & ((1 << 8 * size) - 1), unsigned(size))
        return self.registers[name]

    def _value(self, operand: str, dtype: np.dtype[Any], active: Threads) -> Array:
        if operand in self.special:
            return self.special[operand][active].view(dtype)
        if operand.startswith("%"):
            raw = self._register(operand)[active]
            if raw.dtype == np.bool_ or raw.dtype.itemsize == dtype.itemsize:
                return raw if raw.dtype == np.bool_ else raw.view(dtype)
            return raw.astype(unsigned(dtype.itemsize)).view(dtype)
        return _constant(operand, dtype)

    def _halves(self, operand: str, half: np.dtype[Any], active: Threads) -> Array:
        """Both of a packed operand, thread after thread."""
        packed = self._value(operand, unsigned(2 * half.itemsize), active)
        return np.ascontiguousarray(np.broadcast_to(packed, self._count(active))).view(half)

    def _predicate(self, operand: str, active: Threads) -> Array:
        kept: Array = self.registers[operand.lstrip("!")][active]
        return ~kept if operand.startswith("!") else kept

    def _set(self, operand: str, value: Array, active: Threads) -> None:
        if operand == "_":
            return
        value = value if value.dtype == np.bool_ else value.view(unsigned(value.dtype.itemsize))
        if operand not in self.registers:
            # In lanes that did not write it as well; but a predicate holds no more than False.
            held = np.zeros(self.lanes, value.dtype)
            self.registers[operand] = held if value.dtype == np.bool_ else ~held
        held = self.registers[operand]
        if held.dtype.itemsize != value.dtype.itemsize:  # the upper bits of a wider register
            value = value.astype(held.dtype)
        held[active] = value

    def _address(self, operand: str, active: Threads) -> Array:
        base, _, offset = operand.strip("[]").replace(" ", "").partition("+")
        size = 4 if base == "global_smem" or base in self.special else self.registers[base].dtype.itemsize
        address = self._value(base, np.dtype(f"i{size}"), active).astype(np.int64)
        return address + (int(offset) if offset else 0)

    # Instructions

    def _execute(self, instruction: Instruction, active: Threads) -> None:
        name, *modifiers = instruction.operation
        operands = instruction.operands
        kind = modifiers[-1] if modifiers else ""
        if name in ("ld", "st"):
            self._access(name, modifiers, operands, active, instruction.text)
        elif name in ("ldmatrix", "stmatrix"):
            self._matrix(name, modifiers, operands, active)
        elif name == "mov" and kind == "pred":
            plain = operands[1].lstrip("-").isdigit()
            self._set(
                operands[0],
                np.full(1, operands[1] != "0") if plain else self._predicate(operands[1], active),
                active,
            )
        elif name == "mov":
            self._move(operands, kind, active)
        elif name == "setp":
            dtype = dtype_of(kind)
            a, b = (self._value(each, dtype, active) for each in operands[1:3])
            self._set(operands[0], COMPARE[modifiers[0]](a, b), active)
        elif name == "selp":
            a, b = (self._value(each, dtype_of(kind), active) for each in operands[1:3])
            self._set(operands[0], np.where(self._predicate(operands[3], active), a, b), active)
        elif name == "cvt":
            self._convert(operands, modifiers, active)
        elif name == "shfl":
            # By the lanes of a warp: all of them are here, whichever way they came.
            by = self._value(operands[2], np.dtype("u4"), active).astype(np.int64)
            lane = self.lane[active]
            source = lane ^ by if "bfly" in modifiers else lane // WARP * WARP + by % WARP
            self._set(operands[0], self.registers[operands[1]][source], active)
        elif name == "prmt":
            a, b, selector = (self._value(each, np.dtype("u4"), active).astype(np.uint64) for each in operands[1:])
            self._set(operands[0], permuted(a | (b << np.uint64(32)), selector), active)
        elif name == "redux":
            pick = {("max", False): np.fmax, ("max", True): np.maximum}[modifiers[1], "NaN" in modifiers]
            warps = self.registers[operands[1]].view(dtype_of(kind)).reshape(-1, WARP)
            self._set(operands[0], np.repeat(pick.reduce(warps, axis=1), WARP)[active], active)
        elif kind == "pred":
            values = [self._predicate(each, active) for each in operands[1:]]
            self._set(operands[0], ~values[0] if name == "not" else BINARY[name](*values), active)
        elif kind == "bf16x2":
            values = [self._halves(each, np.dtype("u2"), active) for each in operands[1:]]
            wide = [(each.astype(np.uint32) << 16).view(np.float32) for each in values]
            halves = (arithmetic(name, modifiers, wide).view(np.uint32) >> 16).astype(np.uint16)
            self._set(operands[0], halves.view(np.uint32), active)
        elif kind.endswith("x2"):
            # Two lanes of a packed register, each in its own half.
            single = np.dtype(f"{dtype_of(kind[:-2]).str}")
            whole = [self._halves(each, single, active) for each in operands[1:]]
            self._set(operands[0], arithmetic(name, modifiers, whole).view(unsigned(2 * single.itemsize)), active)
        elif name in ("add", "sub") and modifiers[-2:] in (
            ["f32", "f16"],
            ["f32", "bf16"],
        ):  # the first is the narrower
            bits = self._value(operands[1], np.dtype("u2"), active)
            wide = (bits.astype(np.uint32) << 16).view(np.float32)
            first = wide if kind == "bf16" else bits.view(np.float16).astype(np.float32)
            self._set(operands[0], BINARY[name](first, self._value(operands[2], np.dtype("f4"), active)), active)
        elif name in ("mul", "mad") and modifiers[0] == "wide":
            dtype, wide = dtype_of(kind), np.dtype(f"{dtype_of(kind).kind}{2 * dtype_of(kind).itemsize}")
            result = self._value(operands[1], dtype, active).astype(wide) * self._value(operands[2], dtype, active)
            self._set(operands[0], result + self._value(operands[3], wide, active) if name == "mad" else result, active)
        else:
            dtype = dtype_of(kind)
            amount = np.dtype("u4")
            dtypes = [dtype, amount, amount] if name in ("shl", "shr", "bfe") else [dtype] * 3
            values = [self._value(each, of, active) for each, of in zip(operands[1:], dtypes, strict=False)]
            self._set(operands[0], arithmetic(name, modifiers, values), active)

    def _matrix(self, name: str, modifiers: list[str], operands: Sequence[str], active: Threads) -> None:
        """8 x 8 matrices of 16 bits in shared memory: eight threads have the addresses of the rows of each, and every
        thread of the warp two neighbours of a row, or where transposed of a column."""
        held, address = operands if name == "ldmatrix" else (operands[1], operands[0])
        rows = (self._address(address, active) + self.shared_base[active]).reshape(-1, WARP)
        lane = np.arange(WARP)
        elements = self.shared.view(np.uint16)
        for index, register in enumerate(each.strip() for each in held.strip("{}").split(",")):
            starts = rows[:, 8 * index : 8 * index + 8] // 2
            pairs = []
            for neighbour in (0, 1):
                row, column = lane // 4, 2 * (lane % 4) + neighbour
                if "trans" in modifiers:
                    row, column = column, row
                pairs.append((starts[:, row] + column).reshape(-1))
            if name == "ldmatrix":
                low, high = (elements[each].astype(np.uint32) for each in pairs)
                self._set(register, low | (high << np.uint32(16)), active)
            else:
                value = self._value(register, np.dtype("u4"), active)
                elements[pairs[0]] = value.astype(np.uint16)
                elements[pairs[1]] = (value >> np.uint32(16)).astype(np.uint16)

    def _move(self, operands: Sequence[str], kind: str, active: Threads) -> None:
        to, source = operands
        whole = unsigned(dtype_of(kind).itemsize)
        if to.startswith("{"):
            parts = [each.strip() for each in to.strip("{}").split(",")]
            piece = unsigned(whole.itemsize // len(parts))
            halves = self._value(source, whole, active).view(piece).reshape(-1, len(parts))
            for index, part in enumerate(parts):
                self._set(part, np.ascontiguousarray(halves[:, index]), active)
        elif source.startswith("{"):
            parts = [each.strip() for each in source.strip("{}").split(",")]
            piece = unsigned(whole.itemsize // len(parts))
            joined = np.empty((self._count(active), len(parts)), piece)
            for index, part in enumerate(parts):
                joined[:, index] = self._value(part, piece, active)
            self._set(to, joined.view(whole)[:, 0], active)
        else:
            self._set(to, self._value(source, whole, active), active)

    def _convert(self, operands: Sequence[str], modifiers: list[str], active: Threads) -> None:
        to, of = modifiers[-2:]
        if to in ("bf16x2", "f16x2"):
            one = to_bfloat16 if to == "bf16x2" else to_half
            high, low = (one(self._value(each, np.dtype("f4"), active)) for each in operands[1:3])
            self._set(operands[0], low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16)), active)
        elif to in ("bf16", "f16"):
            value = self._value(operands[1], np.dtype("f4"), active)
            self._set(operands[0], to_bfloat16(value) if to == "bf16" else to_half(value), active)
        elif of == "bf16":
            bits = self._value(operands[1], np.dtype("u2"), active)
            self._set(operands[0], (bits.astype(np.uint32) << np.uint32(16)).view(np.float32), active)
        else:
            self._set(operands[0], self._value(operands[1], dtype_of(of), active).astype(dtype_of(to)), active)

    def _access(self, name: str, modifiers: list[str], operands: Sequence[str], active: Threads, text: str) -> None:
        space, kind = modifiers[0], modifiers[-1]
        dtype = unsigned(dtype_of(kind).itemsize)
        if space == "param":
            signed = dtype_of(kind)
            given = self.arguments[operands[1].strip("[]")]
            if isinstance(given, float):
                value = np.full(1, given, np.float64)
            else:
                value = np.full(1, given & ((1 << 8 * signed.itemsize) - 1), dtype)
                if signed.kind == "i" and operands[0].startswith("%rd"):  # into a wider register, with its sign
                    value = value.view(signed).astype(np.int64)
            self._set(operands[0], value, active)
            return
        held, address = operands[:2] if name == "ld" else (operands[1], operands[0])  # a cache policy may follow
        names = [each.strip() for each in held.strip("{}").split(",")]
        at = self._address(address, active)
        if space == "shared":
            size = dtype.itemsize * len(names)
            memory, within = self.shared, (at >= 0) & (at + size <= self.shared_bytes)
            at = at + self.shared_base[active]
            if (at % size).any() or not within.all():
                raise ValueError(f"an access of shared memory is not aligned, or beside it: {text}")
            places = at[:, None] // dtype.itemsize + np.arange(len(names))
        else:
            memory = self.memory.bytes
            places = self.memory.places(at, dtype.itemsize, len(names), text)
            if self.races is not None:
                lane = self.lane[active]
                at = np.broadcast_to(at, lane.shape)
                self.races.access(
                    at, dtype.itemsize * len(names), lane, self.barriers[lane // self.threads], name == "st"
                )
        elements = memory.view(dtype)
        for index, register in enumerate(names):
            if name == "ld":
                self._set(register, elements[places[:, index]], active)
            else:
                elements[places[:, index]] = self._value(register, dtype, active)


def launch(
    ptx: str,
    memory: Memory,
    arguments: Sequence[int | float],
    programs: int,
    warps: int,
    shared: int,
    ordered: bool = False,
) -> int:
    """Runs a kernel. Returns the instructions executed, by all threads together.

    Args:
        arguments: of the kernel in their order; of a pointer, an address in the memory. Those that Triton adds at the
            end, for scratch that these kernels do not use, are not among them.
        ordered: whether it is an error that nothing orders two accesses of a place of which one writes.
    """
    machine = Machine(ptx, memory, programs, warps, shared, ordered)
    machine.run([*arguments, *[0] * (len(machine.parameters) - len(arguments))])
    return machine.executed
