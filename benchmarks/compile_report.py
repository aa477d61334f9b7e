"""What the compiler makes of every kernel variant, with no GPU: registers, stack, spills, access widths, instructions.

``python -m benchmarks.compile_report`` compiles the variants that the launch table chooses, for
sm_80, sm_90, sm_100 and gfx942, reads the cubins with the disassembler that the triton wheel carries and AMD's
assembly as it is, and writes one JSON object a variant. It must run without TRITON_INTERPRET, which replaces the
compiler.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.arguments import output_file
from benchmarks.bounds import GPUS, Prediction, predict, programs_at_once, warps_at_most
from benchmarks.machine_code import Program, parse_gcn, parse_sass
from cot_kernels.backends.triton import gradient, launch, objectives, statistics, value_and_gradient

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
TWINS = {
    "complement_entropy": objectives.complement_entropy,
    "guided_complement_entropy": objectives.guided_complement_entropy,
    "cross_entropy": objectives.cross_entropy,
    "statistics": None,
}


@dataclass(frozen=True)
class Layout:
    """A way the logits may lie in memory; one launch configuration a dtype."""

    name: str
    num_classes: int
    class_stride: int = 1
    aligned: bool = True


LAYOUTS = (
    Layout("short", 1000),
    Layout("few", 10),
    Layout("short, odd", 1001),
    Layout("short, unequal heads", 1001, aligned=False),
    Layout("medium", 4096),
    Layout("long", 128256),
    Layout("long, odd", 50257),
    Layout("long, unequal heads", 50257, aligned=False),
    Layout("class-major", 21, class_stride=1 << 18),
    Layout("class-major, odd", 21, class_stride=(1 << 18) + 1, aligned=False),
)


# The kernels whose work grows with the classes, and how often they move a logit from or to device memory: reading it,
# reading it and writing its gradient. The second read of value_and_gradient is from the L2 cache.
MOVED = {"statistics": 1, "gradient": 2, "value_and_gradient": 2}
STREAMING = tuple(MOVED)

# How the logits of a chunk lie, which the package has laid out itself: every row begins on a boundary.
PRIVATE = ("few", "short", "short, odd", "medium", "long")


@dataclass(frozen=True)
class Variant:
    """A kernel with everything that is fixed when it is compiled."""

    kernel: str
    layout: str
    dtype: str
    target: str
    objective: str
    reduces: bool
    split: bool


@dataclass(frozen=True)
class Report:
    """What was read from a compiled variant; None where it is not counted."""

    variant: Variant
    wide_access_promised: bool
    registers: int
    stack_bytes: int
    spill_bytes: int
    global_loads: dict[str, int]
    global_stores: dict[str, int]
    gap_operations: list[str] | None  # floating-point operations of the lines that subtract one shift from another
    narrow_offsets: int  # products of the number of rows in 32 bits
    executed_per_logit: float | None = None  # instructions on the usual way, see :mod:`.machine_code`
    special_per_logit: float | None = None  # of them by the special function unit
    in_loop: bool | None = None  # counted over a turn of the main loop, or from entry to exit
    off_path: int | None = None  # instructions of the kernel beside it: the target's tile, the ends of a row, the rest
    shared_bytes: int = 0
    occupancy: float = 0.0  # share of the warps that a multiprocessor can hold
    bytes_in_flight: int | None = None  # of one multiprocessor: what its threads load in one turn
    bytes_per_logit: float | None = None  # of device memory
    predicted: tuple[Prediction, ...] = ()  # see :mod:`.bounds`


def variants() -> Iterator[Variant]:
    """Each layout and dtype with one objective, and each objective, reduction and split on two layouts.

    What follows a row's statistics depends on the logits only through the precision it is computed in, so bf16 and
    fp64 stand for all dtypes there; fp64, which is for checking gradients, is compiled for one target.
    """
    found: dict[Variant, None] = {}
    for target in TARGETS:
        for dtype in DTYPES if target == "sm_90" else [dtype for dtype in DTYPES if dtype != "fp64"]:
            for layout in LAYOUTS:
                for kernel in STREAMING:
                    if kernel == "value_and_gradient" and layout.name in PRIVATE:
                        found[Variant(kernel, layout.name, dtype, target, "cross_entropy", False, False)] = None
                    elif kernel != "value_and_gradient":
                        found[Variant(kernel, layout.name, dtype, target, "complement_entropy", True, False)] = None
            if dtype not in ("bf16", "fp64"):
                continue
            for objective in TWINS:
                for kernel, name, split in (
                    ("statistics", "long", False),
                    ("statistics", "long", True),
                    ("merge", "long", True),
                    ("statistics", "short", False),
                ):
                    for reduces in (False,) if objective == "statistics" else (True, False):
                        found[Variant(kernel, name, dtype, target, objective, reduces, split)] = None
            for mean in (True, False):
                found[Variant("reduce", "", dtype, target, "", mean, False)] = None
            found[Variant("gradient", "long", dtype, target, "", False, False)] = None
    yield from found


def tile_of(variant: Variant) -> tuple[Layout, launch.Tile]:
    layout = next(each for each in LAYOUTS if each.name == variant.layout)
    itemsize = DTYPES[variant.dtype]
    rows_aligned = layout.aligned and (layout.num_classes * itemsize) % 16 == 0
    tile = launch.choose_tile(
        layout.num_classes,
        itemsize,
        classes_adjoin=layout.class_stride == 1,
        rows_aligned=rows_aligned,
        head_aligned=layout.aligned,
        rows_adjoin=layout.class_stride > 1 and layout.aligned,
    )
    return layout, tile


def source_of(variant: Variant) -> tuple[ASTSource, dict[str, int]]:
    """The kernel with the types and specialisations that a launch would give it, and its compile options."""
    accumulated = "*fp64" if variant.dtype == "fp64" else "*fp32"
    constants: dict[str, Any]
    if variant.kernel == "reduce":
        kernel, warps = statistics.reduce_kernel, 4
        constants = {"MEAN": variant.reduces, "BLOCK": 1024}
        layout = None
    else:
        layout, tile = tile_of(variant)
        warps = tile.warps
        twin = TWINS.get(variant.objective)
        if variant.kernel == "statistics":
            kernel = statistics.statistics_kernel
            constants = {
                "OBJECTIVE": twin, "REDUCES": variant.reduces, "SPLIT": variant.split, "ROWS": tile.rows,
                "LANES": tile.lanes, "VEC": tile.vec, "ALIGN": tile.align, "HEADS": tile.heads,
            }  # fmt: skip
        elif variant.kernel == "merge":
            kernel, warps = statistics.merge_kernel, 4
            constants = {"OBJECTIVE": twin, "REDUCES": variant.reduces, "ROWS": 16, "SPLITS": 16}
        elif variant.kernel == "value_and_gradient":
            kernel = value_and_gradient.value_and_gradient_kernel
            constants = {
                "OBJECTIVE": twin, "HAS_UPSTREAM": False, "GRADIENT": True, "ROWS": tile.rows,
                "LANES": tile.lanes, "VEC": tile.vec, "ALIGN": tile.align, "HEADS": tile.heads,
            }  # fmt: skip
        else:
            kernel = gradient.gradient_kernel
            constants = {
                "HAS_FACTOR": variant.reduces, "ROWS": tile.rows, "BLOCK": tile.block, "VEC": tile.vec,
                "ALIGN": tile.align, "HEADS": tile.heads,
            }  # fmt: skip
    # What Triton finds to be 1 at a launch becomes a constant: the stride of neighbours in memory.
    rowwise = layout is not None and layout.class_stride == 1
    ones = ("inner", "stride_k", "grad_stride_k") if rowwise else ("stride_d", "grad_stride_d")
    types, divisible = {}, []
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in ("logits_pointer", "grad_pointer"):
            types[name] = f"*{variant.dtype}"
            divisible.append(name)
        elif name == "target_pointer":
            types[name] = "*i64"
            divisible.append(name)
        elif name.endswith("_pointer"):
            types[name] = accumulated
            divisible.append(name)
        elif name in ("scale", "parameter", "exponent"):
            types[name] = "fp64"
        elif name in ones:
            types[name], constants[name] = "constexpr", 1
        elif name in ("stride_n", "stride_d", "grad_stride_n", "grad_stride_d"):
            types[name] = "i64"
        else:
            types[name] = "i32"
    if rowwise:  # (N, K): the strides of the absent dimension are 0
        divisible += [name for name in ("stride_d", "grad_stride_d") if name in types]
    if layout is not None and layout.class_stride > 1 and layout.aligned:  # every size and stride but those of classes
        sizes = ("num_rows", "inner", "stride_n", "stride_k", "grad_stride_n", "grad_stride_k")
        divisible += [name for name in sizes if types.get(name, "").startswith("i")]
    if layout is not None and layout.num_classes % 16 == 0:
        divisible += [
            name for name in ("num_classes", "stride_n", "grad_stride_n") if types.get(name, "").startswith("i")
        ]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": warps}
    if variant.kernel == "gradient" and tile_of(variant)[1].rows == 1 and not variant.target.startswith("gfx"):
        options["maxnreg"] = launch.GRADIENT_REGISTERS
    return ASTSource(kernel, types, constexprs, attributes), options


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
    lines = Path(statistics.__file__).read_text().splitlines()
    gaps = {number for number, line in enumerate(lines, 1) if line.strip().startswith("gap = ")}
    files = set(re.findall(r'\.file\s+(\d+)\s+"[^"]*statistics\.py"', ptx))
    found, at = set(), 0
    for line in ptx.splitlines():
        if location := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            at = int(location[2]) if location[1] in files else 0
        elif at in gaps and (operation := re.match(r"\s*(fma|add|sub|mul|neg)\.\S*f(?:32|64)(?:x2)?\b", line)):
            found.add(operation[1])
    return sorted(found)


def work_of(variant: Variant, program: Program, registers: int, warps: int, shared: int) -> dict[str, Any]:
    """What the instructions and resources of a variant come to, a logit and a multiprocessor."""
    programs = programs_at_once(variant.target, registers, warps, shared)
    found: dict[str, Any] = {
        "shared_bytes": shared, "occupancy": programs * warps / warps_at_most(variant.target)
    }  # fmt: skip
    if variant.kernel not in STREAMING or variant.dtype == "fp64":  # exp2 of a float64 is a subroutine
        return found
    tile = tile_of(variant)[1]
    threads = TARGETS[variant.target].warp_size * warps
    logits = tile.rows * tile.block // threads
    path = program.usual_path(logits, loops=2 if variant.kernel == "value_and_gradient" else 1)
    instructions, special = round(path.instructions / logits, 2), round(path.special / logits, 2)
    moved = DTYPES[variant.dtype] * MOVED[variant.kernel]
    return found | {
        "executed_per_logit": instructions,
        "special_per_logit": special,
        "in_loop": path.in_loop,
        "off_path": len(program.instructions) - path.instructions,
        "bytes_in_flight": programs * threads * logits * DTYPES[variant.dtype],
        "bytes_per_logit": moved,
        "predicted": tuple(predict(gpu, moved, instructions, special) for gpu in GPUS if gpu.target == variant.target),
    }


def promises_wide_access(layout: Layout, tile: launch.Tile) -> bool:
    return tile.align > 1 or tile.heads or (layout.class_stride > 1 and layout.aligned)


def report_on(variant: Variant) -> Report:
    source, options = source_of(variant)
    promised = variant.kernel in STREAMING and promises_wide_access(*tile_of(variant))
    compiled = triton.compile(source, target=TARGETS[variant.target], options=options)
    narrow_offsets = len(re.findall(r"arith\.muli %num_rows[^:]*: i32", compiled.asm["ttir"]))
    warps, shared = options["num_warps"], compiled.metadata.shared
    if variant.target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        registers, stack = (
            int(re.findall(rf"\.{key}:\s*(\d+)", assembly)[0]) for key in ("vgpr_count", "private_segment_fixed_size")
        )
        spills = sum(int(count) for count in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", assembly))
        loads, stores = (_gcn_accesses(assembly, kind) for kind in ("load", "store"))
        work = work_of(variant, parse_gcn(assembly), registers, warps, shared)
        return Report(variant, promised, registers, stack, spills, loads, stores, None, narrow_offsets, **work)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [_sass_tool("cuobjdump"), "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run(
            [_sass_tool("nvdisasm"), "-c", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    local = sum(_accesses(sass, "LDL").values()) + sum(_accesses(sass, "STL").values())
    return Report(
        variant,
        promised,
        resources["REG"],
        resources["STACK"],
        resources["LOCAL"] + 4 * local,
        _accesses(sass, "LDG"),
        _accesses(sass, "STG"),
        _gap_operations(compiled.asm["ptx"]),
        narrow_offsets,
        **work_of(variant, parse_sass(sass), resources["REG"], warps, shared),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this target (may be repeated)")
    parser.add_argument("--output", type=output_file, help="file to write; standard output if not given")
    arguments = parser.parse_args()
    wanted = [each for each in variants() if not arguments.target or each.target in arguments.target]
    with ProcessPoolExecutor(2) as pool:
        reports = [asdict(report) for report in pool.map(report_on, wanted, chunksize=4)]
    text = "[\n" + ",\n".join(json.dumps(report) for report in reports) + "\n]\n"  # a variant a line
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
