"""``python -m benchmarks.readme`` writes the tables of README and docs, between markers, from committed results."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import tables_compiled, tables_cpu, tables_gpu, tables_numerics
from benchmarks.environment import ROOT
from benchmarks.pages import fill
from benchmarks.reports import read
from examples.demo_report import markdown_table

DEMO_RESULTS = ROOT / "docs" / "demo" / "results.json"


def demo_table() -> str:
    note = (
        "BBC News (2,060 distinct stories of the 2,225 articles, cut to 40 tokens), 16 articles a topic, mean ± "
        "standard deviation over 3 seeds; `docs/demo/results.json`. The complement weighs half a nat, in one step and "
        "in two; two-step CE is the control: cross-entropy with as many optimizer steps as COT takes. A demonstration, "
        "not a benchmark."
    )
    table = markdown_table(read(DEMO_RESULTS))
    return f"{table}\n\n{note}\n\n![Learning curves and the wrong classes' probabilities](docs/demo/demo.png)"


PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"cpu": tables_cpu.cpu_table, "demo": demo_table},
    ROOT / "docs" / "pytorch.md": {"dispatch": tables_cpu.dispatch_table},
    ROOT / "docs" / "kernels.md": {
        "kernels": tables_compiled.kernel_table,
        "predictions": tables_compiled.prediction_table,
        "layouts": tables_compiled.layout_table,
    },
    ROOT / "docs" / "performance.md": {
        "goals": tables_cpu.goals_table,
        "aten": tables_cpu.aten_table,
        "gpu": tables_gpu.gpu_table,
        "gpu-goals": tables_gpu.gpu_goals_table,
        "gpu-kernels": tables_gpu.gpu_kernels_table,
        "gpu-model": tables_gpu.gpu_model_table,
        "gpu-variants": tables_gpu.gpu_variants_table,
        "gpu-host": tables_gpu.gpu_host_table,
        "both": tables_compiled.both_table,
        "startup": tables_cpu.startup_table,
    },
    ROOT / "docs" / "linear.md": {"linear": tables_cpu.linear_table},
    ROOT / "docs" / "training.md": {"training": tables_cpu.training_table},
    ROOT / "docs" / "numerics.md": {
        "float32": tables_numerics.float32_table,
        "half": tables_numerics.half_table,
        "eps": tables_numerics.eps_table,
    },
}


def filled(page: Path) -> str:
    """The text of a page with the tables that the results call for."""
    text = page.read_text()
    for name, table in PAGES[page].items():
        try:
            content = table()
        except (LookupError, TypeError, StopIteration) as error:  # a results file without what the table says
            said = f"{type(error).__name__}: {error}"
            raise ValueError(f"results lack what the table {name!r} of {page.name} says: {said}") from error
        text = fill(text, name, content)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    try:
        texts = {page: filled(page) for page in PAGES}  # all of them before one is written
    except (OSError, ValueError) as error:
        parser.error(f"nothing was written: {error}")
    for page, text in texts.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
