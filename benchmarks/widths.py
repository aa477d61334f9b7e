"""The share of a copy's bandwidth that both passes are predicted to reach, against the number of classes; no GPU.

``python -m benchmarks.widths --output FILE --figure FILE`` compiles the kernels for 2^28 logits in bfloat16, in rows of
8 to 262,144 classes that begin on 16-byte boundaries or, of an odd number, anywhere, counts in their machine code what
a logit takes, and predicts from that: see :mod:`.bounds`. It must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from benchmarks import reports
from benchmarks.arguments import needs_the_compiler, output_file
from benchmarks.bounds import GPUS, both_passes
from benchmarks.compile_report import read
from benchmarks.environment import environment
from benchmarks.launches import DTYPES, Case, Layout, launches
from benchmarks.progress import progress
from cot_kernels.backends.triton import launch

# Powers of two; just above them, where a tile is emptiest; and steps to the next.
POWERS = tuple(1 << exponent for exponent in range(3, 18))
ALIGNED = tuple(
    sorted(
        {power + more for power in POWERS for more in (0, 8, power // 4, power // 2, 3 * power // 4) if more % 8 == 0}
    )
)
ODD = tuple(power + more for power in POWERS for more in (1, power // 2 + 1))


def case_of(classes: int, target: str, dtype: str = "bf16") -> Case:
    """Rows of so many classes, dense."""
    itemsize = DTYPES[dtype].itemsize
    odd = classes * itemsize % 16 > 0
    short = classes * itemsize + (16 - itemsize) * odd <= launch.longest_whole(itemsize, 32)
    layouts: dict[tuple[bool, bool], Layout] = {
        (True, False): "short",
        (True, True): "short, odd",
        (False, False): "long",
        (False, True): "long, odd",
    }
    return Case("mean", layouts[short, odd], classes, dtype, target, "complement_entropy")


def predict(case: Case) -> list[dict[str, Any]]:
    """A row for each GPU of the case's target."""
    shares: dict[str, dict[str, float]] = {gpu.name: {} for gpu in GPUS if gpu.target == case.target}
    for each in launches(case):
        for prediction in read(case, each).predicted:
            shares[prediction.gpu][each.kernel] = round(prediction.share, 4)
    about = {"classes": case.classes, "odd": case.classes % 2 == 1}
    return [
        {"gpu": gpu, **about, **share, "both": round(both_passes(share["statistics"], share["gradient"]), 4)}
        for gpu, share in shares.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    parser.add_argument("--figure", type=output_file, help="PNG file to write")
    options = parser.parse_args(arguments)
    needs_the_compiler(parser)
    cases = [
        case_of(classes, target)
        for target in dict.fromkeys(gpu.target for gpu in GPUS)
        for classes in sorted(ALIGNED + ODD)
    ]
    results: list[dict[str, Any]] = []
    with ProcessPoolExecutor(2) as pool, progress(len(cases)) as advance:
        for case, found in zip(cases, pool.map(predict, cases, chunksize=4), strict=True):
            advance(f"{case.target}, {case.classes} classes")
            results.extend(found)
    if options.output:
        reports.write(options.output, {"environment": environment(1)}, results)
    if options.figure:
        from benchmarks.plots import widths, write  # Matplotlib: only where a figure is wanted

        write(widths(results), options.figure)


if __name__ == "__main__":
    main()
