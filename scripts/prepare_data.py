"""Prepare a data set once, ahead of time.

  python -m scripts.prepare_data NAME [--data_dir=FOLDER] [--manual_dir=FOLDER]
  python -m scripts.prepare_data --list

NAME is one of the names that --list prints. --data_dir is where the prepared copy goes (else $BSJAX_DATA_DIR, else ~/.cache/bsjax/data);
--manual_dir is a folder with the raw files, which are then never downloaded. Raw files are checked by their digests before anything
else. What was stopped half-way is not taken for whole: the same command starts it again. Needs no accelerator.
"""

import sys
import time
from collections.abc import Sequence

from absl import flags

from bsjax.data import DATASETS, DataError, describe_data, describe_needs, is_prepared, prepare_data, split_size

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130  # those of bsjax.study.command, whose import would take seconds
HEADER = ("name", "train", "validation", "test", "prepared", "needs")


def table(data_dir: str | None) -> str:
  """Returns all data sets as text, one a line: sizes in examples, or in tokens for a text."""
  lines = [HEADER]
  for name, dataset in DATASETS.items():
    unit = " tokens" if dataset.is_text else ""
    sizes = [split_size(dataset, split) for split in ("train", "validation", "test")]
    counts = ["not known" if size is None else f"{size:,}{unit}" for size in sizes]
    prepared = "yes" if is_prepared(name, data_dir=data_dir) else "no"
    lines.append((name, *counts, prepared, describe_needs(dataset)))
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def prepare(name: str, data_dir: str | None, manual_dir: str | None) -> str:
  """Prepares one data set and returns a line that says so.

  Raises:
    DataError: it cannot be prepared.
  """
  print(describe_data(name, data_dir=data_dir, manual_dir=manual_dir), flush=True)
  start = time.monotonic()
  folder = prepare_data(name, data_dir=data_dir, manual_dir=manual_dir)
  return f"{name}: ready in {folder} after {time.monotonic() - start:.0f} s"


def main(arguments: Sequence[str]) -> int:
  """Does what the arguments say; returns the exit code."""
  if {"-h", "--help"} & set(arguments):
    print((__doc__ or "").strip())
    return 0
  options = flags.FlagValues()
  flags.DEFINE_string("data_dir", None, "where prepared copies are and go", flag_values=options)
  flags.DEFINE_string("manual_dir", None, "where raw files lie", flag_values=options)
  flags.DEFINE_bool("list", False, "print the table of data sets", flag_values=options)
  try:
    names = options(["prepare_data", *arguments])[1:]
    if len(names) != (0 if options.list else 1):
      raise DataError(f"{len(names)} names of data sets given, wanted one, or --list alone; --help tells more.")
    print(table(options.data_dir) if options.list else prepare(names[0], options.data_dir, options.manual_dir))
  except (flags.Error, DataError) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return EXIT_BAD_INPUT
  except KeyboardInterrupt:
    print("interrupted: what was prepared only in part is discarded, the same command starts it again", file=sys.stderr)
    return EXIT_INTERRUPTED
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
