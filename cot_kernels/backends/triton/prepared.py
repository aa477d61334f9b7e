"""Launches that are repeated: of one kernel, with the same numbers and with pointers of the same kinds.

With every launch Triton asks anew which compiled variant its arguments call for, which takes most of the time of a
launch, and of a small loss. A prepared launch asks once.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

Plan = TypeVar("Plan")

# Plans that are kept of each kind: of as many shapes as a program has, or all are forgotten.
MOST_PLANS = 512


class Plans(dict[tuple[Any, ...], Plan], Generic[Plan]):
    """What was found out about calls, by all that it depends on."""

    def keep(self, key: tuple[Any, ...], plan: Plan) -> Plan:
        if len(self) >= MOST_PLANS:
            self.clear()
        self[key] = plan
        return plan


def settle_keys(*functions: Any) -> None:
    """Asks for the keys of device functions in Triton's cache on disk, in an order that is always the same.

    Into a key go the constants of those functions that it calls which have been asked for theirs before (Triton 3.7).
    Left to chance, a kernel would be compiled anew in a process that calls the losses in another order.
    """
    for function in functions:
        if isinstance(function, JITFunction):  # the interpreter's have none
            function.cache_key  # noqa: B018


def _wanted(hook: Any) -> bool:
    """A hook of Triton's; from 3.5 on there always is one, which may have nobody to tell."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _profiled() -> bool:
    return _wanted(knobs.runtime.launch_enter_hook) or _wanted(knobs.runtime.launch_exit_hook)


class Prepared:
    """A launch of ``programs`` programs of a kernel whose arguments are pointers, then numbers, then constants.

    Whoever keeps one must not give it pointers of another dtype, or of another remainder by 16, for the variant that
    its first launch was compiled to would be wrong for them.
    """

    __slots__ = ("_arguments", "_compiled", "_run", "constants", "kernel", "numbers", "options", "programs")

    def __init__(
        self, kernel: Any, programs: int, numbers: tuple[int | float, ...], constants: dict[str, Any], **options: int
    ) -> None:
        self.kernel, self.programs, self.numbers = kernel, programs, numbers
        self.constants, self.options = constants, options
        self._compiled: Any = None
        self._run: Any = None
        self._arguments: tuple[Any, ...] = ()

    def __call__(self, device: int, *pointers: Tensor) -> None:
        """``device``: the number of the current one, or -1."""
        compiled = self._compiled
        if compiled is None or _profiled():
            self._by_triton(pointers)
            return
        self._run(
            self.programs, 1, 1, driver.active.get_current_stream(device), compiled.function, compiled.packed_metadata,
            None, None, None, *map(Tensor.data_ptr, pointers), *self._arguments,
        )  # fmt: skip

    def _by_triton(self, pointers: tuple[Tensor, ...]) -> None:
        """The first time; and every time where a profiler wants to be told, whose variant is not kept: it may be an
        instrumented one. None comes from the interpreter. On AMD a variant depends on the sizes of tensors too."""
        compiled = self.kernel[(self.programs,)](*pointers, *self.numbers, **self.constants, **self.options)
        if compiled is not None and not _profiled() and torch.version.hip is None:
            constants = (self.constants[name] for name in self.kernel.arg_names if name in self.constants)
            self._arguments, self._run = (*self.numbers, *constants), compiled.run
            self._compiled = compiled
