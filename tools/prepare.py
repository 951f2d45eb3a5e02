"""Prepares a data set once: `python -m tools.prepare --dataset=NAME_OR_FOLDER --data_dir=data`.

main.py does the same on first use. This command prepares ahead, perhaps on another machine.
"""

import sys

import numpy as np
from absl import flags

from common import cli
from datasets import prepared, preparing

DATASET = flags.DEFINE_string("dataset", None, "A folder with SPLIT/CLASS/*.jpg, a TFDS name, or 'shapes'.")
DATA_DIR = flags.DEFINE_string("data_dir", "data", "Where TFDS keeps its sets, and where prepared/ goes.")
MANUAL_DIR = flags.DEFINE_string("manual_dir", "", "Where archives lie that TFDS cannot download (imagenet2012).")
TRAIN_SPLIT = flags.DEFINE_string("train_split", "train", "The split over which mean and components are taken.")
SIZE = flags.DEFINE_integer("size", 256, "Side of the records in pixels.", *prepared.SIZES)
ALLOW = flags.DEFINE_integer("allow_unreadable", 0, "How many unreadable files may be left out.", lower_bound=0)
MAX_PIXELS = flags.DEFINE_integer("max_pixels", 100_000_000, "Larger images are refused undecoded.", lower_bound=1)
AGAIN = flags.DEFINE_bool("again", False, "Prepare anew, and replace the old set when the new one is complete.")
flags.mark_flag_as_required("dataset")


def main(_) -> None:
    """Prepares the set unless that is done already, and prints what it holds."""
    directory = preparing.prepare(
        DATASET.value,
        data_dir=DATA_DIR.value,
        manual_dir=MANUAL_DIR.value,
        size=SIZE.value,
        train_split=TRAIN_SPLIT.value,
        allow_unreadable=ALLOW.value,
        max_pixels=MAX_PIXELS.value,
        again=AGAIN.value,
    )
    summary, records = prepared.summary(directory), prepared.Records.open(directory)
    print(f"records      {directory}")
    print(f"from         {summary.origin}")
    for split in records.splits:
        print(f"{split:<12} {records.num_examples(split):,} images")
    print(f"classes      {records.num_classes}")
    print(f"mean RGB     {np.round(records.mean_image.mean((0, 1)), 2)}")
    print(f"principal σ  {np.round(records.principal_std, 2)}")
    for line in summary.unreadable:
        print(f"left out     {line}")
    for sentence in (*summary.overlaps.values(), *summary.lacking.values()):
        print(sentence, file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
