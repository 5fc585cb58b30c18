"""``moelora run``: another program, with moelora imported before it."""

import argparse
import sys
import traceback
from typing import Any

from moelora.errors import MoELoraError
from moelora.launch import LaunchError, run_module

INTERRUPTED = 130
DESCRIPTION = """\
Import moelora and run a program, so that it loads a mixture as it loads any PEFT adapter.

MODULE is what `python -m` takes (lm_eval), a console script (transformers) or a .py file. All that
follows it belongs to the program, --help included, and its exit code is this command's.

  moelora run lm_eval --model hf --model_args pretrained=BASE,peft=MIXTURE --tasks hellaswag
  moelora run transformers serve FOLDER
  torchrun --nproc-per-node 2 -m moelora run train.py"""


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Tell argparse the arguments of ``moelora run``.

    Args:
        subparsers: of the program.
    """
    parser = subparsers.add_parser(
        "run",
        help="run another program (lm_eval, transformers serve ...) with moelora imported",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s MODULE [ARGUMENT ...]",
    )
    # one argument for all of it: of two, the first would swallow a `--` that follows it
    parser.add_argument(
        "program", nargs=argparse.REMAINDER, metavar="MODULE ...", help="what to run, and its own"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the program and return its exit code; 2 if there is none of that name.

    Args:
        arguments: what argparse read.

    Raises:
        LaunchError: if no program is named or none has that name.
    """
    # a `--` before the program ends the options of this command
    program = arguments.program[1:] if arguments.program[:1] == ["--"] else arguments.program
    if not program:
        raise LaunchError("Name the module to run: moelora run MODULE [ARGUMENT ...].")
    try:
        return run_module(program[0], program[1:])
    except LaunchError:
        raise
    except MoELoraError:
        # the program's own, not a fault of this command line: it ends as it would without it
        traceback.print_exc()
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return INTERRUPTED
