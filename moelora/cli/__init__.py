"""The command line ``moelora``: one module for each subcommand.

A subcommand's module has ``add_parser(subparsers)``, which tells argparse its arguments, and
``run(arguments) -> int``. Heavy imports happen inside ``run``, so that ``--help`` is quick.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from moelora.cli import compose, convert, demo, export, inspect, merge, report, run, validate
from moelora.errors import MoELoraError

COMMANDS = (demo, compose, export, inspect, merge, convert, report, validate, run)
BAD_INPUT = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = _Parser(prog="moelora", description="Mixture-of-experts routing for PEFT LoRA.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code.

    0 means success; 1 that the job ran and found a fault; 2 bad arguments or unreadable input,
    told in one line on standard error; 130 an interruption.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Raises:
        OSError: of another program that ``moelora run`` started.
    """
    arguments = build_parser().parse_args(argv)
    prefix = f"moelora {arguments.command}"
    try:
        code: int = arguments.run(arguments)
    except MoELoraError as error:
        print(f"{prefix}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        # of a file or folder that the arguments name; another program's own end as they would
        if arguments.command == "run":
            raise
        told = error.strerror or str(error) or type(error).__name__
        name = "" if error.filename is None else f": {error.filename!s:.200}"
        print(f"{prefix}: error: {' '.join(f'{told}{name}'.split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"{prefix}: interrupted, nothing was written.", file=sys.stderr)
        return INTERRUPTED
    return code
