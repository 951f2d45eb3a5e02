"""Fails unless the last value of a metric in a metrics.jsonl is below a bound."""

import argparse
import json
import sys
from pathlib import Path


def last_value(path, key):
    """Returns the value of `key` in the last line that has it, or None."""
    lines = (json.loads(line) for line in path.read_text().splitlines() if line.strip())
    values = [line[key] for line in lines if key in line]
    return values[-1] if values else None


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("metrics", type=Path, help="a run's metrics.jsonl")
parser.add_argument("key", help="such as test/top1_error")
parser.add_argument("bound", type=float)
args = parser.parse_args()

if not args.metrics.exists():
    sys.exit(f"{args.metrics} is missing: the run wrote no metrics.")
value = last_value(args.metrics, args.key)
if value is None:
    sys.exit(f"{args.metrics} has no {args.key}: the run did not reach its end.")
if not value < args.bound:  # so that NaN fails
    sys.exit(f"{args.key} is {value:.4f}; it must be below {args.bound}.")
print(f"{args.key} is {value:.4f}, below {args.bound}.")
