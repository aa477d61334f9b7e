"""The memory of a GPU that is not there: what lies beside an allocation, and who accessed a place."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

ACCESS = 16  # bytes: an allocation ends on a multiple of it
_PAGE = 1 << 16  # between allocations: what runs over the end of one finds nothing

_NOBODY, _SEVERAL = -1, -2
_UNIT = 2  # bytes, of the smallest number that a kernel writes


class Memory:
    """Allocations in a space of addresses of its own."""

    def __init__(self) -> None:
        # Of each allocation: where it starts, where its content ends, and where the last access of 16 bytes to it.
        self.starts, self.contents, self.ends = (np.zeros(0, np.int64) for _ in range(3))
        self.bytes = np.zeros(_PAGE, np.uint8)

    def allocate(self, content: bytes) -> int:
        start = len(self.bytes)
        padded = -(-len(content) // ACCESS) * ACCESS
        room = np.full(-(-(padded + 1) // _PAGE) * _PAGE, 0xFF, np.uint8)  # NaN, where it is read
        room[: len(content)] = np.frombuffer(content, np.uint8)
        self.bytes = np.concatenate((self.bytes, room))
        self.starts = np.append(self.starts, start)
        self.contents = np.append(self.contents, start + len(content))
        self.ends = np.append(self.ends, start + padded)
        return start

    def places(self, address: Array, size: int, count: int, text: str) -> Array:
        """Which elements of ``size`` bytes there are from the addresses on: [lanes, count].

        A load may take what fills up the last 16 bytes of an allocation, a store may not.
        """
        address = address.view(np.int64)
        if (address % (size * count)).any():
            raise ValueError(f"an access of {size * count} bytes is not aligned to them: {text}")
        at = np.searchsorted(self.starts, address, side="right") - 1
        ends = self.contents if "st.global" in text else self.ends
        if (at < 0).any() or (address + size * count > ends[at]).any():
            raise ValueError(f"an access lies beside every allocation: {text}")
        return address[:, None] // size + np.arange(count)


class Races:
    """Who wrote each place of global memory last, and who has read it since.

    Two threads may access a place that one of them writes only where a barrier of their program lies between.
    """

    def __init__(self, memory_bytes: int, threads: int) -> None:
        places = -(-memory_bytes // _UNIT)
        self.threads = threads  # of a program
        self.writer, self.reader, self.reading_program = (np.full(places, _NOBODY) for _ in range(3))
        self.written, self.read = (np.zeros(places, np.int64) for _ in range(2))  # how many barriers before

    def access(self, address: Array, size: int, thread: Array, barriers: Array, write: bool) -> None:
        """Accesses of ``size`` bytes from ``address`` on, by threads that have met so many ``barriers``."""
        place = address.astype(np.int64)[:, None] // _UNIT + np.arange(-(-size // _UNIT))
        thread, barriers = (np.broadcast_to(each[:, None], place.shape) for each in (thread, barriers))
        program = thread // self.threads
        self._ordered(self.writer, self.writer[place] // self.threads, self.written, place, thread, program, barriers)
        if write:
            self._ordered(self.reader, self.reading_program[place], self.read, place, thread, program, barriers)
            self.writer[place], self.written[place], self.reader[place] = thread, barriers, _NOBODY
            return
        # Those of its program that read before its last barrier are ordered with all that follows.
        fresh = (self.reader[place] == _NOBODY) | (
            (self.reading_program[place] == program) & (self.read[place] < barriers)
        )
        for known, of in ((self.reader, thread), (self.reading_program, program)):
            kept = np.where(fresh | (known[place] == of), of, _SEVERAL)
            known[place] = kept
            known[place[known[place] != kept]] = _SEVERAL  # others in the same instruction
        self.read[place] = barriers

    @staticmethod
    def _ordered(
        known: Array,
        known_program: Array,
        when: Array,
        place: Array,
        thread: Array,
        program: Array,
        barriers: Array,
    ) -> None:
        before = known[place]
        others = (before != _NOBODY) & (before != thread)
        if (others & ~((known_program == program) & (when[place] < barriers))).any():
            raise ValueError("threads access a place that one of them writes, and no barrier lies between")
