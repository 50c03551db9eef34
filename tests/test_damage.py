"""Damaged artifacts, and what is no artifact in the place of one."""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from semformer.errors import StoreError
from semformer.store import DamagedArtifact, Store, open_store
from tests.artifacts import build, caae, damage, flip_a_bit, make_weights, why


def change_a_metric(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    assert "0.25" in text
    (folder / "manifest.json").write_text(text.replace("0.25", "0.26"))


def list_a_file_outside(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../x"] = manifest["files"]["weights.bin"]
    del manifest["sha256"]
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGES = {
    "bit flipped": (flip_a_bit, "sha256"),
    "truncated": (lambda folder: os.truncate(folder / "weights.bin", 10), "10 bytes instead of 7000"),
    "file missing": (lambda folder: (folder / "maps" / "0.bin").unlink(), "maps/0.bin is missing"),
    "manifest missing": (lambda folder: (folder / "manifest.json").unlink(), "half-written"),
    "manifest truncated": (lambda folder: os.truncate(folder / "manifest.json", 50), "unreadable"),
    "manifest emptied": (lambda folder: (folder / "manifest.json").write_text("[]"), "unreadable"),
    "metric changed": (change_a_metric, "altered"),
    "path outside": (list_a_file_outside, "outside the artifact"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_artifact_is_reported_kept_aside_and_rebuilt(either, tmp_path, caplog, name):
    change, reason = DAMAGES[name]
    key = caae()
    good = build(either, key, make_weights)
    damage(good, change, tmp_path / "scratch")

    assert either.find(key) is None
    if name == "manifest missing" and either.location.startswith("s3:"):
        return  # there, this is how an artifact looks before it is published
    assert f"artifact {key} is damaged" in caplog.text
    assert reason in caplog.text
    (aside,) = {name.split("/")[1] for name in either.storage.entries("damaged/")}
    assert aside.startswith(f"caae-{key.short}-")
    assert why(either, key) == f"the published artifact was damaged (moved to {either.location}/damaged/{aside})"

    rebuilt = build(either, key, make_weights)
    assert rebuilt.files == good.files
    assert either.find(key) == rebuilt
    assert why(either, key) == "already published"


def test_a_slow_reader_of_damage_leaves_the_rebuilt_artifact_alone(either, tmp_path, monkeypatch):
    key, other, module = caae(), open_store(either.location), sys.modules[Store.__module__]
    real = module.check_size
    damage(build(either, key, make_weights), flip_a_bit, tmp_path / "scratch")

    def rebuilt_by_another_meanwhile(name, size, told):
        monkeypatch.setattr(module, "check_size", real)
        build(other, key, lambda *made: {**make_weights(*made), "seconds": 2.0})
        raise DamagedArtifact("as it was before")

    monkeypatch.setattr(module, "check_size", rebuilt_by_another_meanwhile)
    assert either.find(key) is None
    assert either.find(key) is not None
    assert len({name.split("/")[1] for name in either.storage.entries("damaged/")}) == 1


def test_all_readers_of_damage_are_told_that_it_must_be_built(either, tmp_path, monkeypatch):
    """One moves the artifact away while another still reads its files."""
    key, other = caae(), open_store(either.location)
    damage(build(either, key, make_weights), flip_a_bit, tmp_path / "scratch")
    real = either.storage.have

    def moved_away_meanwhile(artifact, name, *, verify=False):
        monkeypatch.setattr(either.storage, "have", real)
        assert other.find(key) is None
        real(artifact, name, verify=verify)

    monkeypatch.setattr(either.storage, "have", moved_away_meanwhile)
    assert either.find(key) is None
    assert len({name.split("/")[1] for name in either.storage.entries("damaged/")}) == 1


@pytest.mark.parametrize("name", ["a file", "a link to nowhere", "a folder as the manifest", "an empty folder"])
def test_what_is_no_artifact_makes_way_for_one(store, name):
    """Also where the folder for damaged artifacts has been removed."""
    place = store.root / "caae" / caae().digest
    place.parent.mkdir()
    {
        "a file": lambda: place.write_text("mine"),
        "a link to nowhere": lambda: place.symlink_to("/nowhere/x"),
        "a folder as the manifest": lambda: (place / "manifest.json").mkdir(parents=True),
        "an empty folder": place.mkdir,
    }[name]()
    shutil.rmtree(store.root / "damaged")
    assert list(store.artifacts()) == []
    assert build(store, caae(), make_weights)
    assert len(list((store.root / "damaged").iterdir())) == 1


def test_what_cannot_make_way_is_named(store, monkeypatch):
    monkeypatch.setattr(store.storage, "publish", lambda *_: False)
    with pytest.raises(StoreError, match=rf"caae .* cannot be published: remove what is in its place, {store.root}/"):
        build(store, caae(), make_weights)
