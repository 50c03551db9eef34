"""A cluster file for `ray up`, checked before anything is launched."""

import re
from pathlib import Path

import yaml

from semformer.errors import UserError, first_line

PLACEHOLDER = re.compile(r"[\w:/-]*CHANGE_ME[\w/]*")


def check_cluster_file(path: Path) -> None:
    """Raises UserError if `ray up` would refuse the file, or for placeholders that are still in it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        text = path.read_text(encoding="utf-8")
        validate_config(prepare_config(yaml.safe_load(text)))
    except Exception as error:  # Ray's own checks raise whatever they meet
        raise UserError(f"{path} is no cluster file: {first_line(error)}") from error
    lines = enumerate((line.partition("#")[0] for line in text.splitlines()), start=1)
    if left := [f"{path}:{n}: {found[0]}" for n, line in lines if (found := PLACEHOLDER.search(line))]:
        raise UserError("fill in these placeholders; the comments beside them say with what:\n" + "\n".join(left))
