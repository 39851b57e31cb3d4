"""The commands and their common behaviour."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torch_gradflow.command_line import compare, flow, info, polish
from torch_gradflow.command_line.errors import UsageError

COMMANDS = {"compare": compare, "flow": flow, "polish": polish, "info": info}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The command and its arguments; None takes those of the process.

    Returns:
        The exit code: 0; 1 where a flow or a polish ended before its end (what it reached is saved all the same); 130 after
        Ctrl-C.

    Raises:
        SystemExit: With code 2, after a message that names argument, value and remedy.
    """
    parser = argparse.ArgumentParser(
        prog="python -m torch_gradflow",
        description="Train small perceptrons on a table of numbers, follow their gradient flow, certify the critical point at "
        "its end. '%(prog)s COMMAND --help' explains a command.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        summary = (command.__doc__ or "").strip()
        subparser = commands.add_parser(name, help=summary, description=summary, usage=f"%(prog)s {command.USAGE}".rstrip())
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run, parser=subparser)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except (UsageError, ImportError, FloatingPointError) as error:
        return int(args.parser.error(str(error)))
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
