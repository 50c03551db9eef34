"""`python -m sweeps.cluster FILE`: is this a cluster file for `ray up`, with every placeholder filled in?"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from semformer.errors import UserError
from sweeps.cluster.file import check_cluster_file


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sweeps.cluster", description=__doc__, allow_abbrev=False)
    parser.add_argument("file", type=Path, help="a cluster file for `ray up`")
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        check_cluster_file(parser.parse_args(arguments).file)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
