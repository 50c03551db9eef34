"""All tables of the paper in one sweep, on toy networks."""

import contextlib
import io
import re
from collections import Counter

import pytest

from semformer.store import Store
from sweeps import cli


def sweep(folder, *arguments: str) -> tuple[int, str]:
    """Exit status and output."""
    out = io.StringIO()
    places = [f"--store={folder / 'store'}", f"--tracking-uri=sqlite:///{folder / 'mlflow.db'}"]
    with contextlib.redirect_stdout(out):
        status = cli.main(["run", "--all", "--preset", "micro", *places, f"--sweeps={folder / 'sweeps'}", *arguments])
    return status, out.getvalue()


def made(store: Store) -> Counter[str]:
    return Counter(artifact.key.stage for artifact in store.artifacts())


def times_begun(store: Store) -> dict[str, int]:
    """How often somebody began to make each stage, by its digest: leases are numbered, and no number is given twice."""
    return {artifact.key.digest: store.leases.newest(artifact.key).number for artifact in store.artifacts()}


@pytest.mark.timeout(1200)
def test_all_tables_are_filled_and_every_stage_is_made_once(tmp_path):
    status, out = sweep(tmp_path)
    assert status == 0, out
    assert "51 of 51 cells filled" in out
    store = Store(tmp_path / "store")
    assert made(store) == {"caae": 15, "segmentor": 26, "cams": 34, "evaluate": 34}
    assert set(times_begun(store).values()) == {1}
    written = list((tmp_path / "sweeps").glob("*/tables/*.md"))
    assert len(written) == 14
    for path in written:
        assert not re.search(r"failed|queued|running|not run", path.read_text().partition("**Ours:**")[0]), path

    before = times_begun(store)
    status, out = sweep(tmp_path)
    assert status == 0
    assert "nothing to do: all 34 trials are finished and recorded" in out
    assert times_begun(Store(tmp_path / "store")) == before
