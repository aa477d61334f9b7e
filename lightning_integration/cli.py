"""LightningCLI for any module and data, with complement objective training as one of its callbacks."""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from jsonargparse import DefaultHelpFormatter

from .callback import ComplementObjectiveTraining
from .lightning_package import pl

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
else:
    cli = import_module(f"{pl.__name__}.cli")
    LightningArgumentParser, LightningCLI = cli.LightningArgumentParser, cli.LightningCLI

__all__ = ["ComplementCLI", "main"]

PROGRAM = "python -m lightning_integration"
CALLBACK = f"{ComplementObjectiveTraining.__module__.partition('.')[0]}.{ComplementObjectiveTraining.__name__}"

DESCRIPTION = f"""\
Trains and evaluates any LightningModule on any LightningDataModule from a YAML file.

Complement objective training (COT) is a callback: this line under trainer.callbacks adds it.

    - class_path: {CALLBACK}

Its options go below, as init_args. To list them:

    {PROGRAM} fit --trainer.callbacks.help {CALLBACK}

For example, seconds on a CPU:

    {PROGRAM} fit --config examples/digits.yaml
    {PROGRAM} fit --config examples/digits.yaml --trainer.max_epochs 2 --model.channels 8
"""

PURPOSES = {
    "fit": "Trains the model; validates it as it goes.",
    "validate": "Measures the model of a checkpoint on the validation data.",
    "test": "Measures the model of a checkpoint on the test data.",
    "predict": "Runs the model of a checkpoint on the data to predict.",
}

TITLES = {
    "trainer": "Trainer: how long, on which devices, with which callbacks and loggers",
    "model": "Model: the LightningModule",
    "data": "Data: the LightningDataModule",
    "optimizer": "Optimizer, in place of the module's own configure_optimizers",
    "lr_scheduler": "Learning rate schedule, with --optimizer",
    **dict.fromkeys(PURPOSES, "Checkpoint and the like"),
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Types and defaults, under a description left as it is written."""


class Parser(LightningArgumentParser):
    """Says what groups of options and subcommands are for; Lightning quotes the first lines of docstrings."""

    def add_argument_group(self, *args: Any, name: str | None = None, **kwargs: Any) -> Any:
        if name in TITLES:
            args = (TITLES[name], *args[1:])
        return super().add_argument_group(*args, name=name, **kwargs)

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        subcommands = super().add_subcommands(*args, **kwargs)
        add_subcommand = subcommands.add_subcommand

        def add(name: str, parser: Any, **kwargs: Any) -> Any:
            return add_subcommand(name, parser, **{**kwargs, "help": PURPOSES[name]})

        vars(subcommands)["add_subcommand"] = add
        return subcommands


class ComplementCLI(LightningCLI):
    """LightningCLI with a help and errors to read, and a Rich progress bar where no other is asked for.

    Args:
        args: command line, without the program's name; None: that of the process.
    """

    def __init__(self, args: Sequence[str] | None = None) -> None:
        parsers = {
            name: {
                "usage": f"{PROGRAM} {name} [--config FILE] [options]",
                "description": f"{purpose}\n\nOptions after --config override the file's.",
                "formatter_class": HelpFormatter,
            }
            for name, purpose in PURPOSES.items()
        }
        main_parser = {"prog": PROGRAM, "description": DESCRIPTION, "formatter_class": HelpFormatter}
        super().__init__(args=None if args is None else list(args), parser_kwargs={**main_parser, **parsers})

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        # Not by the option parser_class, which came after Lightning 2.4.
        parser = super().init_parser(**kwargs)
        parser.__class__ = Parser  # adds no state of its own
        return parser

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse tries a value against several types and reports on all of them. Its first cause is what the
            # class itself raised.
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            *_, (frame, _) = traceback.walk_tb(cause.__traceback__)
            if frame.f_globals["__name__"].startswith(f"{__package__}."):  # says what was wrong with an argument
                self.parser.error(str(cause), error)
            raise cause from None

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        options = self.config_init[self.subcommand].trainer
        callbacks = options.callbacks or []
        callbacks = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
        wanted = options.enable_progress_bar is not False and not options.barebones
        if wanted and not any(isinstance(each, pl.callbacks.ProgressBar) for each in callbacks):
            # Ten frames a second: at Lightning's hundred, drawing takes a good part of a small network's time.
            callbacks.append(pl.callbacks.RichProgressBar(refresh_rate=10))
        return super().instantiate_trainer(**{"callbacks": callbacks, **kwargs})


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    ComplementCLI(args)
