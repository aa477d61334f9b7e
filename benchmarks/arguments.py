"""Types of command-line arguments, which refuse what could not be measured or written before anything is."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import torch


def device_argument(name: str) -> torch.device:
    """A device that can be measured here. A GPU becomes the current one, where kernels are launched."""
    kind, _, index = name.partition(":")
    number = int(index) if index.isdecimal() else 0
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise argparse.ArgumentTypeError(f"{name!r}: expected cpu, cuda, or cuda:0 and so on")
    if kind == "cpu":
        return torch.device("cpu")
    if number >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{name!r}: PyTorch sees {torch.cuda.device_count()} GPUs here")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def at_least_one(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


THREADS = 2  # of PyTorch on the CPU, where none are asked for
MOST_THREADS = 4096  # more is a slip of the keyboard, and beyond 2^31 no number of threads


def thread_count(text: str) -> int:
    """A whole number of threads."""
    if at_least_one(text) > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected at most {MOST_THREADS} threads")
    return int(text)


def duration(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return value


def output_file(text: str) -> Path:
    """A file that can be written; its folder is made."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder: expected a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: its folder cannot be made: {error.strerror}") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path


def output_folder(text: str) -> Path:
    """A folder that files can be written to; it is made."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is a file: expected a folder") from error
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path


def needs_the_compiler(parser: argparse.ArgumentParser) -> None:
    """Ends the program where Triton's interpreter was chosen: what it decorates cannot be compiled."""
    from triton import knobs  # what is measured without Triton takes its arguments from here too

    if knobs.runtime.interpret:
        parser.error("compiles kernels, and TRITON_INTERPRET puts an interpreter in place of the compiler: unset it")
