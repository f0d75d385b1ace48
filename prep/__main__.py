"""The command line of prep: `python -m prep ingest | inspect | verify | report | synthesize`.

In: arguments. Out: exit code 0 done, 1 some inputs failed (named), 2 usage or configuration.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from prep.disk import StoreError, in_words
from prep.plan import PrepError
from prep.settings import ConfigError

COMMANDS = {  # command: (module, what it does)
    "ingest": ("prep.ingest", "NWB files into a token store"),
    "inspect": ("prep.coverage", "what is in a file, and what would become of each object"),
    "verify": ("prep.verify", "check every byte of a token store"),
    "report": ("prep.report", "what a token store holds, repaired and left out, as one HTML file"),
    "synthesize": ("prep.synthetic", "write NWB files of a synthetic brain"),
}
FAILED, USAGE = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a person's mistake is one message on stderr, never a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m prep", description="NWB recordings in, a Zarr token store out.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name in arguments[:1]:  # only the command that runs is imported
            importlib.import_module(COMMANDS[name][0]).configure(command)
    args = parser.parse_args(arguments)
    try:
        return int(importlib.import_module(COMMANDS[args.command][0]).main(args))
    except (ConfigError, StoreError) as error:
        print(f"prep {args.command}: {error}", file=sys.stderr)
        return USAGE
    except OSError as error:
        print(f"prep {args.command}: {in_words(error) or error}", file=sys.stderr)
        return USAGE
    except PrepError as error:
        print(f"prep {args.command}: {error}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
