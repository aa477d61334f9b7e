"""``python -m benchmarks.readme`` writes the tables of README and docs, between markers, from committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path

from examples.demo import markdown_table

ROOT = Path(__file__).parents[1]
CPU_RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
TRAINING_RESULTS = ROOT / "benchmarks" / "results" / "training.json"
DEMO_RESULTS = ROOT / "docs" / "demo" / "results.json"


def cpu_table() -> str:
    report = json.loads(CPU_RESULTS.read_text())
    names = list(report["results"][0]["microseconds"])
    lines = [f"| rows x classes | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for result in report["results"]:
        times = result["microseconds"]
        ratios = (f"{times['published'] / times[name]:.2f}" for name in names)
        lines.append(f"| {result['rows']} x {result['classes']} | {' | '.join(ratios)} |")
    about = report["environment"]
    note = (
        f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}, float32; `benchmarks/results/cpu.json`."
    )
    return "\n".join([*lines, "", note])


def training_table() -> str:
    report = json.loads(TRAINING_RESULTS.read_text())
    methods = list(next(iter(report["milliseconds"].values())))
    lines = [f"| | {' | '.join(methods)} |", "|---|" + "---:|" * len(methods)]
    for network, times in report["milliseconds"].items():
        ratios = (f"{times[method] / times['cross-entropy']:.2f}" for method in methods)
        lines.append(f"| {network} | {' | '.join(ratios)} |")
    about = report["environment"]
    return "\n".join([*lines, "", f"{about['cpu']}, {about['threads']} threads; `benchmarks/results/training.json`."])


def demo_table() -> str:
    note = (
        "BBC News (2,060 distinct stories of the 2,225 articles, cut to 40 tokens), 16 articles a topic, mean ± "
        "standard deviation over 3 seeds; `docs/demo/results.json`. Two-step CE "
        "is the control: cross-entropy with as many optimizer steps as COT takes. A demonstration, not a benchmark."
    )
    table = markdown_table(json.loads(DEMO_RESULTS.read_text()))
    return f"{table}\n\n{note}\n\n![Learning curves and the wrong classes' probabilities](docs/demo/demo.png)"


def fill(text: str, name: str, content: str) -> str:
    """The text with what stands between the two markers of a name replaced."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    filled, count = re.subn(pattern, lambda match: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page must hold the markers of {name!r} once, found {count}")
    return filled


def main() -> None:
    readme = ROOT / "README.md"
    text = fill(readme.read_text(), "cpu", cpu_table())
    readme.write_text(fill(text, "demo", demo_table()))
    training = ROOT / "docs" / "training.md"
    training.write_text(fill(training.read_text(), "training", training_table()))


if __name__ == "__main__":
    main()
