"""The tables that sweeps were about, read back from where they were recorded."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from analysis.artifacts import fetch
from semformer.errors import UserError
from sweeps.plan.scores import GOALS
from sweeps.plan.table import Table, load_all_tables, load_table


def swept_tables(tracking_uri: str, parents: Mapping[str, str]) -> tuple[dict[str, Table], list[str]]:
    """Tables by name, of each the run id of a sweep that was about it: those of the paper as they are here, others as
    they are kept with the sweep. Also sentences on those that are not kept, or cannot be read.

    Raises UserError if MLflow cannot be read.
    """
    built_in = {table.name: table for table in load_all_tables(GOALS[-1])}
    tables = {name: built_in[name] for name in parents if name in built_in}
    told = []
    with TemporaryDirectory() as folder:
        wanted = {name: (run_id, f"{name}.yaml") for name, run_id in parents.items() if name not in built_in}
        found = fetch(tracking_uri, [one for one in wanted.values() if all(one)], Path(folder))
        for name, place in wanted.items():
            try:
                if place not in found:
                    raise UserError("its file is not among those kept with its sweep")
                tables[name] = load_table(found[place])
            except UserError as error:
                told.append(f"table {name} is left out: {error}")
    return tables, told
