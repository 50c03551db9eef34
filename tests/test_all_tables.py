"""All tables of the paper in one sweep, on toy networks."""

import re
from collections import Counter

import pytest

from analysis.cli import main as semformer_tables
from semformer.store import Store
from tests.workplace import Workplace


def made(store: Store) -> Counter[str]:
    return Counter(artifact.key.stage for artifact in store.artifacts())


def times_begun(store: Store) -> dict[str, int]:
    """How often somebody began to make each stage, by its digest: leases are numbered, and no number is given twice."""
    stages = [artifact.key for artifact in store.artifacts() if artifact.key.stage != "pack"]
    return {key.digest: store.leases.newest(key).number for key in stages}


@pytest.mark.timeout(1200)
def test_all_tables_are_filled_and_every_stage_is_made_once(tmp_path, capsys):
    place, store = Workplace(tmp_path), Store(tmp_path / "store")
    status, out = place.sweep("--all")
    assert status == 0, out
    assert "51 of 51 cells filled" in out
    assert made(store) == {"pack": 3, "caae": 15, "segmentor": 26, "cams": 34, "evaluate": 34}
    assert set(times_begun(store).values()) == {1}
    written = list((tmp_path / "sweeps").glob("*/tables/*.md"))
    assert len(written) == 14
    for path in written:
        assert not re.search(r"failed|queued|running|not run", path.read_text().partition("**Ours:**")[0]), path

    before = times_begun(store)
    status, out = place.sweep("--all")
    assert status == 0
    assert "nothing to do: all 34 trials are finished and recorded" in out

    # Later sweeps of some tables, there and elsewhere, take nothing from it
    for arguments in (["table04", "table12"], ["table08", "--experiment", "another"]):
        status, out = place.sweep(*arguments)
        assert (status, "made: nothing" in out) == (0, True), out
    assert times_begun(Store(tmp_path / "store")) == before
    capsys.readouterr()
    assert semformer_tables(["--all", "--preset", "micro", "--tracking-uri", place.uri]) == 0
    assert capsys.readouterr().out.endswith("51 of 53 cells filled; no trial of table01, table02\n")
