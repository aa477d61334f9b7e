"""What the compiler makes of the kernels that are launched, with no GPU: registers, spills, accesses, instructions.

``python -m benchmarks.compile_report`` compiles what the calls of :mod:`.launches` launch, for sm_80, sm_90, sm_100 and
gfx942, reads the cubins with the disassembler that the triton wheel carries and AMD's assembly as it is, and writes one
JSON object a compiled kernel. It must run without TRITON_INTERPRET, which replaces the compiler.

With ``--known FILE``, a report of before, a kernel is not compiled again that would be compiled from the same, by the
same compiler, and read by the same code: what the file says of it is taken.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import triton

from benchmarks import reports
from benchmarks.arguments import at_least_one, needs_the_compiler, output_file
from benchmarks.bounds import GPUS, Prediction, Work, predict, programs_at_once, warps_at_most
from benchmarks.environment import environment
from benchmarks.launches import DTYPES, TARGETS, Case, Launch, cases, launches
from benchmarks.machine_code import Program, parse_gcn, parse_sass
from benchmarks.progress import progress
from cot_kernels.backends.triton import backend, monoid
from cot_kernels.backends.triton import launch as launch_table
from cot_kernels.backends.triton import layout as memory_layout

# The kernels whose work grows with the classes, and how often they move a logit from or to device memory: reading it,
# reading it and writing its gradient. The second read of value_and_gradient is from the L2 cache.
MOVED = {"statistics": 1, "split": 1, "gradient": 2, "value_and_gradient": 2}
STREAMING = tuple(MOVED)

# What a row of the report follows from, beside its kernel: what is launched, with which arguments, and how it is read.
_READERS = [
    *(Path(__file__).parent / f"{name}.py" for name in ("bounds", "compile_report", "launches", "machine_code")),
    *(Path(str(module.__file__)) for module in (backend, launch_table, memory_layout)),
]

Identity: TypeAlias = tuple[str, int, str]  # target, classes, and Triton's hash of a kernel


@dataclass(frozen=True)
class Report:
    """What was read from a compiled kernel; None where it is not counted."""

    case: Case  # the first that launches it
    kernel: str
    hash: str  # Triton's, of all that was compiled
    wide_access_promised: bool
    registers: int
    stack_bytes: int
    spill_bytes: int
    global_loads: dict[str, int]
    global_stores: dict[str, int]
    gap_operations: list[str] | None  # floating-point operations of the lines that subtract one shift from another
    narrow_offsets: int  # products of the number of rows in 32 bits
    accesses: int | None = None  # of 16 bytes, that hold the logits that a thread has of a tile
    loop_per_logit: float | None = None  # instructions of a turn on the usual way, see :mod:`.machine_code`
    loop_special_per_logit: float | None = None  # of them by the special function unit
    a_row: int | None = None  # of a program that takes rows in turn: instructions of a thread a row, beside the tiles
    once: int | None = None  # instructions of a thread beside the turns: entry, reduction, objective, exit
    executed_per_logit: float | None = None  # of turns and of what is once, over the logits of the rows
    target_per_logit: float | None = None  # of a long row: instructions of the turn that meets the target
    end_per_logit: float | None = None  # and of one that meets an end of the row
    off_path: int | None = None  # instructions of the kernel beside the usual way: those, and ignored rows
    shared_bytes: int = 0
    occupancy: float = 0.0  # share of the warps that a multiprocessor can hold
    bytes_in_flight: int | None = None  # of one multiprocessor: what its threads load in a turn, over their waits in it
    waits: int | None = None  # for global memory, in a turn of the main loops
    waits_beside: int | None = None  # in a turn of the loop around it, and once
    work: Work | None = None  # what a warp does, and the bytes of a logit and of its row: see :mod:`.bounds`
    predicted: tuple[Prediction, ...] = ()  # see :mod:`.bounds`


def _sass_tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _accesses(sass: str, instruction: str) -> dict[str, int]:
    """How many global accesses of each width, in bits, the machine code holds."""
    widths: dict[str, int] = {}
    for modifiers in re.findall(rf"\b{instruction}((?:\.\w+)*)", sass):
        width = re.search(r"\.(8|16|32|64|128|256)\b", modifiers.replace(".U", ".").replace(".S", "."))
        key = width[1] if width else "32"
        widths[key] = widths.get(key, 0) + 1
    return widths


def _gcn_accesses(assembly: str, kind: str) -> dict[str, int]:
    """The same for AMD's assembly, whose mnemonics end in dwordx4, dword, ushort and the like."""
    widths: dict[str, int] = {}
    for suffix in re.findall(rf"\b(?:global|buffer|flat)_{kind}_(\w+)", assembly):
        words = re.search(r"(?:dword|b)(x?)(\d+)?", suffix)
        key = "16 or 8" if "short" in suffix or "byte" in suffix or not words else str(int(words[2] or 1) * 32)
        widths[key] = widths.get(key, 0) + 1
    return widths


def _gap_operations(ptx: str) -> list[str]:
    """The operations that PTX attributes to the lines `gap = ...`, where a product must not be contracted into them."""
    lines = Path(monoid.__file__).read_text().splitlines()
    gaps = {number for number, line in enumerate(lines, 1) if line.strip().startswith("gap = ")}
    files = set(re.findall(r'\.file\s+(\d+)\s+"[^"]*monoid\.py"', ptx))
    found, at = set(), 0
    for line in ptx.splitlines():
        if location := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            at = int(location[2]) if location[1] in files else 0
        elif at in gaps and (operation := re.match(r"\s*(fma|add|sub|mul|neg)\.\S*f(?:32|64)(?:x2)?\b", line)):
            found.add(operation[1])
    return sorted(found)


def bytes_of_a_row(launch: Launch) -> int:
    """Of device memory, beside the logits and their gradient: the target, in int64, and numbers in float32."""
    given = launch.arguments
    numbers: int = {
        "statistics": 5 if given.get("REDUCES") else 6 if given.get("OBJECTIVE") else 8,  # the state, and values
        "split": 3 * given.get("splits", 1),
        "gradient": 5,
        "value_and_gradient": 3 + given.get("HAS_UPSTREAM", False),
    }[launch.kernel]
    return 8 + 4 * numbers


def work_of(case: Case, launch: Launch, program: Program, registers: int) -> dict[str, Any]:
    """What the instructions and resources of a kernel come to, a logit and a multiprocessor."""
    about = launch.compiled.metadata
    target, warps, shared = case.target, about.num_warps, about.shared
    programs = programs_at_once(target, registers, warps, shared)
    found: dict[str, Any] = {"shared_bytes": shared, "occupancy": programs * warps / warps_at_most(target)}
    given, itemsize = launch.arguments, DTYPES[case.dtype].itemsize
    if launch.kernel not in STREAMING or not given.get("GRADIENT", True) or case.dtype == "fp64":
        return found  # exp2 of a float64 is a subroutine
    threads = TARGETS[target].warp_size * warps
    twice = launch.kernel == "value_and_gradient"
    rows = given.get("ROWS", 1)
    block = given.get("PIECES", 1) * (given.get("WIDTH") or given["LANES"] * given["VEC"])
    held = rows * block // threads  # places of a tile, a thread
    nested = launch.kernel == "statistics" and given["LONG"] and given["TURNS"] > 1
    path = program.usual_path(held, loops=1 + twice, nested=nested)
    heads = given["ALIGN"] > 1 if launch.kernel == "split" else given.get("HEADS", False)
    overhang = given["VEC"] - 1 if heads else 0
    row_tiles = -(-(case.classes + overhang) // block)
    long = given.get("LONG", True)
    tiles = given["turns"] if launch.kernel == "gradient" else -(-row_tiles // given.get("splits", 1))
    turns = given["turns"] if launch.kernel == "statistics" else 1  # of rows
    logits = turns * rows * case.classes * tiles / row_tiles / threads  # of rows, without what fills their last tile
    # The tile of the target and, where they are cut short, those at the ends: of the tiles of a row, so many.
    cut = (case.classes % block > 0) + (case.layout == "long, odd" and not twice)
    target_tile, end_tile = path.masked if long and path.masked else (path.turn, path.turn)
    if target.startswith("gfx"):  # one of its ways is there and never taken: the longest for both
        target_tile = end_tile
    a_tile = path.turn + (target_tile - path.turn + min(cut, row_tiles - 1) * (end_tile - path.turn)) / row_tiles
    executed = path.once + turns * ((path.around or 0) + tiles * a_tile)  # by a thread
    special = path.once_special + turns * (path.around_special + tiles * path.turn_special)
    # The second loop over a long row reads what is in the L2 cache.
    first_waits, near_waits = path.waits[0], sum(path.waits[1:])
    waits = path.waits_once + turns * (path.waits_around + tiles * first_waits)
    moved, of_row = itemsize * MOVED[launch.kernel], bytes_of_a_row(launch)
    work = Work(
        programs * warps, logits, executed, special, waits, turns * tiles * near_waits, moved, of_row / case.classes
    )
    in_flight = programs * threads * held * itemsize // max(1, *path.waits)
    return found | {
        "accesses": held * itemsize // 16,
        "loop_per_logit": round(path.turn / held, 2),
        "loop_special_per_logit": round(path.turn_special / held, 2),
        "a_row": path.around,
        "once": path.once,
        "executed_per_logit": round(executed / logits, 2),
        "target_per_logit": round(target_tile / held, 2) if long else None,
        "end_per_logit": round(end_tile / held, 2) if long else None,
        "off_path": len(program.instructions) - path.turn - (path.around or 0) - path.once,
        "bytes_in_flight": in_flight,
        "waits": sum(path.waits),
        "waits_beside": path.waits_around + path.waits_once,
        "work": work,
        "predicted": tuple(predict(gpu, work) for gpu in GPUS if gpu.target == target),
    }


def promises_wide_access(case: Case, launch: Launch) -> bool:
    given = launch.arguments
    return launch.kernel in STREAMING and (
        given["ALIGN"] > 1 or given.get("HEADS", False) or case.layout == "class-major"
    )


_seen: set[Identity] = set()
_known: set[Identity] = set()


def _knows(identities: set[Identity]) -> None:
    _known.update(identities)


def report_on(case: Case) -> list[tuple[str, Report | None]]:
    """Of the kernels that no case of as many classes launched before, of those that came to this process: the hash, and
    the report where it is not known."""
    found = []
    known = {hash for target, classes, hash in _known if (target, classes) == (case.target, case.classes)}
    for launch in launches(case, known):
        identity = (case.target, case.classes, launch.hash)
        if identity not in _seen:
            _seen.add(identity)
            found.append((launch.hash, read(case, launch) if launch.compiled is not None else None))
    return found


def read(case: Case, launch: Launch) -> Report:
    compiled = launch.compiled
    identity = (case, launch.kernel, launch.hash)
    promised = promises_wide_access(case, launch)
    narrow_offsets = len(re.findall(r"arith\.muli %num_rows[^:]*: i32", compiled.asm["ttir"]))
    if case.target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        registers, stack = (
            int(re.findall(rf"\.{key}:\s*(\d+)", assembly)[0]) for key in ("vgpr_count", "private_segment_fixed_size")
        )
        spills = sum(int(count) for count in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", assembly))
        loads, stores = (_gcn_accesses(assembly, kind) for kind in ("load", "store"))
        work = work_of(case, launch, parse_gcn(assembly), registers)
        return Report(*identity, promised, registers, stack, spills, loads, stores, None, narrow_offsets, **work)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [_sass_tool("cuobjdump"), "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run(
            [_sass_tool("nvdisasm"), "-c", "-ndf", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    local = sum(_accesses(sass, "LDL").values()) + sum(_accesses(sass, "STL").values())
    return Report(
        *identity,
        promised,
        resources["REG"],
        resources["STACK"],
        resources["LOCAL"] + 4 * local,
        _accesses(sass, "LDG"),
        _accesses(sass, "STG"),
        _gap_operations(compiled.asm["ptx"]),
        narrow_offsets,
        **work_of(case, launch, parse_sass(sass), resources["REG"]),
    )


def readers() -> str:
    """A digest of the code that says what is launched and what is read."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in _READERS)).hexdigest()


def known_from(file: Path | None) -> dict[Identity, dict[str, Any]]:
    """The rows of a report, where they were read by the code that there is now."""
    report = reports.read(file) if file else {}
    if report.get("readers") != readers():
        return {}
    return {(row["case"]["target"], row["case"]["classes"], row["hash"]): row for row in report["reports"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this target (may be repeated)")
    parser.add_argument("--output", type=output_file, help="file to write; standard output if not given")
    parser.add_argument("--known", type=Path, help="a report of before: what is still so is taken from it")
    parser.add_argument("--every", type=at_least_one, default=1, help="of the cases one in so many, for a sample")
    arguments = parser.parse_args()
    needs_the_compiler(parser)
    try:
        known = known_from(arguments.known)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except (LookupError, TypeError, AttributeError) as error:
        parser.error(f"{arguments.known} is no report of this program: {type(error).__name__}: {error}")
    wanted = [case for target in arguments.target or TARGETS for case in cases(target)][:: arguments.every]
    found: dict[Identity, dict[str, Any]] = {}
    with ProcessPoolExecutor(2, None, _knows, (set(known),)) as pool, progress(len(wanted)) as advance:
        for case, made in zip(wanted, pool.map(report_on, wanted, chunksize=4), strict=True):
            advance(case.target)
            for hash, report in made:  # the other process may have seen it too
                identity = (case.target, case.classes, hash)
                found.setdefault(identity, asdict(report) if report else known[identity])
    head = {"environment": environment(1), "readers": readers()}
    if arguments.output:
        reports.write(arguments.output, head, found.values(), key="reports")
    else:
        sys.stdout.write(reports.text_of(head, found.values(), key="reports"))


if __name__ == "__main__":
    main()
