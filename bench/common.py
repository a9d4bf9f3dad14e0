"""What the scripts in this folder share: the command line, a run's files, and its model."""
import argparse
import csv
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import rlcm
from rewards import BadInput


class Parser(argparse.ArgumentParser):
    """Shows a script's docstring as its help, and says what is wrong in one line."""

    def __init__(self, name, doc):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(f"bench/{name}.py", description=doc, formatter_class=raw, allow_abbrev=False)

    def error(self, message):
        raise BadInput(f"{message} (--help lists the flags)")

    def run(self, work, argv=None, more=False):
        """Call work(args). Returns the exit status: its own or 0, 2 for bad input, 130 after Ctrl-C.

        With `more`, args.flags holds the flags that are not the script's own; otherwise they are refused.
        """
        try:
            args, args.flags = self.parse_known_args(argv)
            if args.flags and not more:
                self.error(f"unknown argument {args.flags[0]}")
            rlcm.quiet()
            return work(args) or 0
        except (BadInput, OSError, torch.OutOfMemoryError) as e:
            status = 2
            message = e
        except KeyboardInterrupt:
            status = 130
            message = "stopped"
        print(f"{self.prog}: {message}", file=sys.stderr)
        return status


def open_run(run, **changes):
    """A run's settings, with some changed, and its model with fresh weights. Raises BadInput."""
    cfg = replace(rlcm.read_config(run), gradient_checkpointing=False, **changes)
    rlcm.check(cfg)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return cfg, rlcm.load_model(cfg, device)


def number(text):
    try:
        return float(text)
    except ValueError:
        return text


def read_rows(path):
    """Rows of a csv file as dicts, numbers as floats. Raises BadInput if there are none."""
    with rlcm.explained(f"{path} cannot be read, train the run first"):
        with open(path, newline="") as file:
            rows = [{name: number(text) for name, text in row.items()} for row in csv.DictReader(file)]
        rlcm.require(rows, f"{path} is empty: train the run first")
    return rows
