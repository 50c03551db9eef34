"""What a store no longer needs is found and removed; what any root reaches never is."""

import json
import os
import time

import pytest

from semformer.errors import UserError
from semformer.keys import StageKey
from semformer.store import Store, open_store
from semformer.store.collection import collect
from semformer.store.leases import Lease
from semformer.store.storage import Entry
from tests.artifacts import build, caae, damage, eventually, flip_a_bit, make_weights, segmentor, visible

KEPT, DROPPED = caae(), caae(decoder_depth=4)


@pytest.fixture
def store(either):
    """Two networks, each with the encoder it was made from; a root reaches the first network."""
    for source in (KEPT, DROPPED):
        build(either, source, make_weights)
        build(either, segmentor(source), make_weights)
    either.roots.keep("table 3/tiny", [segmentor(KEPT).digest], {"preset": "tiny"})
    return either


def told(collected) -> set[tuple[str, str, str]]:
    return {(item.stage, item.digest, item.why) for item in collected if item.stage}


UNREACHED = {(key.stage, key.digest, "no root reaches it") for key in (DROPPED, segmentor(DROPPED))}


def test_what_no_root_reaches_goes_and_the_inputs_of_the_rest_stay(store):
    assert told(collect(store, grace=0)) == UNREACHED
    assert len(visible(store)) == 4, "that was a dry run"
    collected = collect(store, apply=True, grace=0)
    assert told(collected) == UNREACHED
    assert all(item.bytes > 17_000 for item in collected if item.stage)
    assert visible(store) == [str(KEPT), str(segmentor(KEPT))]
    assert collect(store, grace=0) == []
    fresh = open_store(store.location)
    assert fresh.find(KEPT)
    assert fresh.find(segmentor(KEPT))
    assert fresh.find(DROPPED) is None
    assert build(fresh, DROPPED, make_weights)


def test_packs_stay_while_something_that_stays_was_made_from_their_images(store):
    used, unused = (StageKey("pack", {"stage": "pack", "data": {"images": digest}}) for digest in ("d0", "d1"))
    for key in (used, unused):
        build(store, key, make_weights)
    assert told(collect(store, apply=True, grace=0)) == UNREACHED | {("pack", unused.digest, "no root reaches it")}
    assert str(used) in visible(store)
    store.roots.keep("table 3/tiny", [])
    assert ("pack", used.digest, "no root reaches it") in told(collect(store, apply=True, grace=0))


def test_what_is_young_stays(store):
    assert collect(store, apply=True) == []
    assert len(visible(store)) == 4


def test_an_artifact_of_which_a_file_is_young_stays(tmp_path):
    store = open_store(tmp_path / "store")
    artifact = build(store, DROPPED, make_weights)
    store.roots.keep("mine", [KEPT.digest])
    old = time.time() - 3600
    for path in artifact.path.rglob("*"):
        os.utime(path, (old, old))
    assert told(collect(store, grace=1800)) == {("caae", DROPPED.digest, "no root reaches it")}
    os.utime(artifact.file("weights.bin"))
    assert told(collect(store, grace=1800)) == set()


def test_what_is_being_built_stays_with_its_inputs(store):
    wanted = segmentor(DROPPED, sigma=0.2)
    with store.lease(wanted):
        (store.checkpoints(wanted) / "epoch").write_text("1")
        store.save_checkpoints(wanted)
        collected = collect(store, apply=True, grace=0)
        assert told(collected) == {("segmentor", segmentor(DROPPED).digest, "no root reaches it")}
        assert store.holder(wanted)
    assert (store.checkpoints(wanted) / "epoch").read_text() == "1"
    assert told(collect(store, grace=0)) == {
        ("segmentor", wanted.digest, "no root reaches it"),
        ("caae", DROPPED.digest, "no root reaches it"),
    }


def test_unfinished_stages_keep_their_checkpoints_while_a_root_reaches_them(store):
    wanted = caae(decoder_depth=2)
    (store.checkpoints(wanted) / "epoch").write_text("1")
    store.save_checkpoints(wanted)
    store.roots.keep("search", [wanted.digest])
    collect(store, apply=True, grace=0)
    assert (store.checkpoints(wanted) / "epoch").read_text() == "1"
    store.roots.drop("search")
    assert told(collect(store, apply=True, grace=0)) == {("caae", wanted.digest, "no root reaches it")}
    assert store.storage.entries("checkpoints/") == {}


def test_damaged_artifacts_and_what_dead_processes_left_are_removed(store, start, tmp_path):
    damage(store.find(KEPT), flip_a_bit, tmp_path / "scratch")
    assert store.find(KEPT) is None
    build(store, KEPT, lambda *made: {**make_weights(*made), "seconds": 2.0})
    code = f"""
store = open_store({store.location!r})
workspace = store.workspace(key)
info = make_weights(workspace, None, None)
store.storage.create = lambda *of_the_manifest: os.kill(os.getpid(), 9)
os.rename = lambda *of_the_folder: os.kill(os.getpid(), 9)
store.publish(caae(decoder_depth=8.0), workspace, info)
"""
    assert start(tmp_path, code).wait(30) == -9
    reasons = {item.why for item in collect(store, apply=True, grace=0)}
    assert {"was damaged", "no root reaches it"} <= reasons
    assert store.find(KEPT)
    assert store.find(segmentor(KEPT))
    assert collect(store, grace=0) == []
    left = {name.split("/")[0] for name in store.storage.entries("")}
    assert left <= {"caae", "segmentor", "manifests", "roots", "leases", "clock"}
    assert len({name.split("/")[1] for name in store.storage.entries("caae/")}) == 1


def test_who_was_away_for_long_learns_that_another_came_after_it(tmp_path):
    """Its lease expires, another makes the stage, all is collected, and a third begins anew."""
    store = Store(tmp_path / "store", heartbeat=0.05, expiry=0.1)
    away = store.leases.take(KEPT)
    away._stop.set()  # as if its process were stopped
    away._thread.join()
    store.roots.keep("search", [])
    time.sleep(0.2)
    store.lease(KEPT).release()
    collect(store, apply=True, grace=0)
    with store.lease(KEPT) as third:
        assert third.file.number == 3
        back = Lease(store.leases, KEPT, away.file)
        eventually(lambda: back.lost)
        assert not third.lost


def test_a_half_written_artifact_goes_though_a_root_reaches_it(tmp_path):
    store = Store(tmp_path / "store")
    place = store.root / "caae" / KEPT.digest
    place.mkdir(parents=True)
    (place / "weights.bin").write_bytes(b"half")
    store.roots.keep("search", [KEPT.digest])
    assert told(collect(store, grace=0)) == {("caae", KEPT.digest, "left by a publisher that did not finish")}


def test_files_that_are_not_the_stores_stay(store):
    foreign = ["notes.txt", "results/run1/table.csv", "tmp/mine/notes.txt", "caae/notes.txt", "leases/README"]
    for name in foreign:
        if store.location.startswith("/"):
            (store.root / name).parent.mkdir(parents=True, exist_ok=True)
        store.storage.write(name, b"mine")
    collect(store, apply=True, grace=0)
    assert set(foreign) <= set(store.storage.entries(""))


def test_a_store_without_roots_is_not_collected(either):
    build(either, KEPT, make_weights)
    with pytest.raises(UserError, match=f"{either.location} has no roots, so nothing says what is needed"):
        collect(either, apply=True, grace=0)
    assert visible(either) == [str(KEPT)]


def test_roots_are_kept_under_any_name_and_dropped(store):
    store.roots.keep("search", {KEPT.digest: 1}, {"trials": 3})
    roots = open_store(store.location).roots.all()
    assert list(roots) == ["search", "table 3/tiny"]
    assert roots["search"].digests == {KEPT.digest}
    assert roots["search"].about == {"trials": 3}
    store.roots.keep("search", [DROPPED.digest])
    assert store.roots.kept("search").digests == {DROPPED.digest}
    store.roots.drop("search")
    assert store.roots.kept("search") is None
    with pytest.raises(UserError, match="keeps nothing for 'search', only for table 3/tiny"):
        store.roots.drop("search")
    with pytest.raises(ValueError, match="'caae' is no digest"):
        store.roots.keep("search", ["caae"])


def test_the_roots_of_all_drivers_of_a_sweep_are_dropped_together(store):
    """But not those of sweeps whose names only begin alike."""
    for name in ("search.0a1b", "search.2c3d", "search-2", "search-2.0a1b", "search.old.0a1b"):
        store.roots.keep(name, [segmentor(DROPPED).digest])
    others = {"search-2", "search-2.0a1b", "search.old.0a1b", "table 3/tiny"}
    assert set(store.roots.all(without=["search"])) == others
    assert told(collect(store, grace=0)) == set()
    assert told(collect(store, grace=0, without=["search", "search-2", "search.old"])) == UNREACHED
    store.roots.drop("search")
    assert set(store.roots.all()) == others
    for nobody in ("search", "sear", ""):
        with pytest.raises(UserError, match=f"keeps nothing for '{nobody}', only for search-2"):
            store.roots.drop(nobody)


@pytest.mark.parametrize("content", ["{", "[]", '{"kept": 1}', json.dumps({"digests": None, "kept": "", "about": {}})])
def test_an_unreadable_root_stops_the_collection_and_nothing_else(store, caplog, content):
    store.storage.write("roots/search.json", content.encode())
    with pytest.raises(UserError, match=r"roots/search\.json in the store .* cannot be read .* or remove it"):
        collect(store, apply=True, grace=0)
    assert len(visible(store)) == 4
    store.roots.keep("other", [KEPT.digest])
    assert store.roots.kept("other").digests == {KEPT.digest}
    assert store.roots.kept("search") is None
    assert f"roots/search.json in the store {store.location} cannot be read (" in caplog.text
    assert "Error(" in caplog.text
    assert told(collect(store, grace=0, without=["search"])) == UNREACHED
    store.roots.keep("search", [KEPT.digest])
    assert told(collect(store, grace=0)) == UNREACHED


def test_a_root_that_is_written_while_a_collection_looks_around_counts(store, monkeypatch):
    real = store.roots.all

    def a_sweep_begins_right_after(**arguments):
        known = real(**arguments)
        store.roots.keep("late", [segmentor(DROPPED).digest])
        return known

    monkeypatch.setattr(store.roots, "all", a_sweep_begins_right_after)
    assert told(collect(store, apply=True, grace=0)) == set()
    assert len(visible(store)) == 4


def test_workspaces_of_other_hosts_are_removed_when_old(tmp_path):
    store = open_store(tmp_path)
    build(store, KEPT, make_weights)
    store.roots.keep("sweep", [KEPT.digest])
    mine = store.workspace(caae(decoder_depth=2))
    theirs = store.root / "tmp" / "caae-0123456789ab.elsewhere.1.cafe"
    theirs.mkdir()
    for folder in (mine, theirs):
        (folder / "weights.bin").write_bytes(b"half")
        then = time.time() - 2 * 24 * 3600
        os.utime(folder / "weights.bin", (then, then))
    (collected,) = collect(store, apply=True)
    assert collected.why == "left by a process that has ended"
    assert (mine.exists(), theirs.exists()) == (True, False)


def test_an_artifact_of_which_the_manifest_alone_is_young_stays(bucket, monkeypatch):
    store = open_store(bucket)
    build(store, caae(), make_weights)
    store.roots.keep("mine", [])
    entries, ages = store.storage.entries, {"manifests": 0.0}

    def aged(prefix: str) -> dict[str, Entry]:
        return {name: Entry(one.size, ages.get(name.split("/")[0], 7200.0)) for name, one in entries(prefix).items()}

    monkeypatch.setattr(store.storage, "entries", aged)
    assert not [item for item in collect(store, grace=1800) if item.stage]
    ages.clear()
    assert [item.digest for item in collect(store, grace=1800) if item.stage] == [caae().digest]
