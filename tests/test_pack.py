"""Packs: what they hold, who may read it, and batches from them."""

import os
import threading

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from semformer import machine, pipeline
from semformer.cli import main
from semformer.config import load_config
from semformer.data import pack as pack_file
from semformer.data.augment import caae_crops
from semformer.data.loading import Loader
from semformer.data.pack import LUMA, MOST_DECODED, Packed, Table
from semformer.data.voc import open_devkit
from semformer.stages.pack import find_or_pack, pack_key, packed
from semformer.store import Store
from semformer.store import folder as folder_file

CPU = torch.device("cpu")


@pytest.fixture
def split(shapes):
    return open_devkit(shapes).split("train")


@pytest.fixture(params=[MOST_DECODED, 0], ids=["decoded", "files"])
def encoding(request, monkeypatch):
    """Packs of pixels, and of the images' files as for sets that are too large."""
    monkeypatch.setattr(pack_file, "MOST_DECODED", request.param)


@pytest.mark.usefixtures("encoding")
def test_a_pack_has_the_pixels_the_sizes_and_the_masks(split, store):
    data = packed(split, ["images", "masks"], store)
    assert data.ids == split.ids
    assert np.array_equal(data.sizes, [[48, 48]] * 16)
    for i in range(16):
        assert np.array_equal(data.pixels(i), split.pixels(i))
        assert np.array_equal(data.mask(i), split.mask(i))
        assert data.luma[i] == pytest.approx((split.pixels(i) @ np.array(LUMA)).mean() / 255, abs=1e-5)
        assert np.array_equal(data.objects(i), split.objects(i))


def test_images_of_several_sizes_and_record_batches(tmp_path, store, monkeypatch):
    monkeypatch.setattr(pack_file, "ROWS", 3)
    folder = tmp_path / "VOC2012"
    for part in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    rng, ids = np.random.default_rng(0), [f"i{n}" for n in range(8)]
    for n, name in enumerate(ids):
        Image.fromarray(rng.integers(0, 256, (10 + n, 30 - 2 * n, 3), dtype=np.uint8)).save(
            folder / f"JPEGImages/{name}.jpg"
        )
        (folder / f"Annotations/{name}.xml").write_text("<annotation><object><name>cat</name></object></annotation>")
    (folder / "ImageSets/Segmentation/train.txt").write_text("\n".join(ids))
    split = open_devkit(tmp_path).split("train")
    data = packed(split, ["images"], store)
    assert [tuple(size) for size in data.sizes] == [(10 + n, 30 - 2 * n) for n in range(8)]
    assert all(np.array_equal(data.pixels(i), split.pixels(i)) for i in range(8))


@pytest.mark.parametrize(("spare", "decoded"), [(0, True), (-1, False)])
def test_pixels_are_kept_decoded_where_there_is_room_for_all_of_them(split, store, monkeypatch, spare, decoded):
    monkeypatch.setattr(pack_file, "MOST_DECODED", 16 * 48 * 48 * 3 + spare)
    assert packed(split, ["images"], store).decoded is decoded


def test_a_pack_is_an_arrow_file_that_others_can_read(split, store):
    artifact, found = find_or_pack(split, "images", store)
    assert not found
    table = pa.ipc.open_file(pa.memory_map(str(artifact.file("images.arrow")))).read_all()
    assert table["id"].to_pylist() == list(split.ids)
    assert table["data"][3].as_py() == split.pixels(3).tobytes()
    assert find_or_pack(split, "images", store)[1]


def test_a_pack_larger_than_the_memory_can_be_opened(tmp_path):
    """A writable map would count as memory in use, even if it is private and nobody writes."""
    with open(tmp_path / "images.arrow", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(pa.ArrowInvalid, match="Not an Arrow file"):
        Table(tmp_path / "images.arrow")


def test_a_pack_is_checked_once_on_a_machine_and_again_when_it_has_changed(split, store, tmp_path, monkeypatch):
    monkeypatch.setenv("SEMFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "STILL", 0.0)
    path = find_or_pack(split, "images", store)[0].file("images.arrow")
    checked, check = [], folder_file.check_contents
    monkeypatch.setattr(folder_file, "check_contents", lambda *arguments: checked.append(1) or check(*arguments))
    counts = []
    for _ in range(3):
        assert find_or_pack(split, "images", store)[1]
        counts.append(len(checked))
    assert counts == [1, 1, 1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    artifact, found = find_or_pack(split, "images", store)
    assert not found, "the damaged one was set aside, and made again"
    assert np.array_equal(Table(artifact.file("images.arrow")).data(7), split.pixels(7).ravel())


def test_opening_a_pack_reads_none_of_its_pixels(split, store):
    table = Table(find_or_pack(split, "images", store)[0].file("images.arrow"))
    assert np.shares_memory(table.data(0), table.data(0))
    assert table.data(0).base is not None
    assert table.data(5).nbytes == 48 * 48 * 3


def test_training_cannot_read_masks(split, store):
    data = packed(split, ["images"], store)
    with pytest.raises(RuntimeError, match="declares none"):
        data.mask(0)


def test_no_stage_sees_masks_but_those_that_say_so(shapes, store, monkeypatch):
    opened, stages = [], []
    real = pipeline.pack.packed
    monkeypatch.setattr(
        pipeline.pack,
        "packed",
        lambda split, kinds, *a, **k: opened.append((split.name, tuple(kinds))) or real(split, kinds, *a, **k),
    )
    config = load_config("micro")
    for run in pipeline.run(config, pipeline.open_data(config, shapes), store, device=CPU, progress=lambda told: None):
        stages.append((run.stage, *opened))
        opened.clear()
    assert stages == [
        ("caae", ("train", ("images",))),
        ("segmentor", ("train", ("images",))),
        ("cams", ("val", ("images",))),
        ("evaluate", ("val", ("masks",))),
    ]


def test_masks_and_images_are_packed_under_keys_of_their_own_contents(split, shapes):
    keys = {kind: pack_key(split, kind).digest for kind in ("images", "masks")}
    assert len(set(keys.values())) == 2
    config = load_config("micro")
    spec = pipeline.stage_keys(config, pipeline.open_data(config, shapes))["caae"].spec
    assert "inputs" in spec
    assert not spec["inputs"], "how images are kept is no part of what comes of them"


def test_data_pack_makes_beforehand_what_a_run_would(shapes, tmp_path, capsys):
    arguments = ["data", "pack", str(shapes), "--preset", "micro", "--store", str(tmp_path / "store")]
    assert main(arguments) == 0
    told = capsys.readouterr().err
    assert "train: 16 images packed" in told
    assert "val: 6 images packed" in told
    assert "val: 6 masks packed" in told
    store = Store(tmp_path / "store")
    made = {artifact.key.digest for artifact in store.artifacts()}
    config = load_config("micro")
    list(pipeline.run(config, pipeline.open_data(config, shapes), store, device=CPU, progress=lambda told: None))
    assert {a.key.digest for a in store.artifacts() if a.key.stage == "pack"} == made
    assert main(arguments) == 0
    assert "were there" in capsys.readouterr().err


def caae_loader(data: Packed, *, batch_size: int, seed: int = 0) -> Loader:
    options = load_config("micro", {"caae.batch_size": batch_size}).caae
    return Loader(data, caae_crops, options, seed=seed, device=CPU)


@pytest.mark.usefixtures("encoding")
def test_batches_cover_an_epoch_and_are_the_same_again(split, store):
    loader = caae_loader(packed(split, ["images"], store), batch_size=5, seed=3)
    assert len(loader) == 3
    first, again, other = (list(loader.epoch(epoch)) for epoch in (0, 0, 1))
    assert [len(batch) for batch in first] == [5, 5, 5]
    assert all(torch.equal(a.images, b.images) and torch.equal(a.Y, b.Y) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].images, other[0].images)
    seen = torch.cat([batch.Y for batch in first])
    assert seen.shape == (15, 9)
    rows = {tuple(row) for row in seen.tolist()}
    assert rows <= {tuple(row) for row in split.labels.tolist()}


def test_a_split_smaller_than_a_batch_is_one_batch(split, store):
    (batch,) = caae_loader(packed(split, ["images"], store), batch_size=64).epoch(0)
    assert len(batch) == 16


def test_an_order_takes_every_image_once(split, store):
    data = packed(split, ["images"], store)
    data.labels[:, 1] = np.arange(16)  # so that an image can be told by its labels

    def order(seed: int, epoch: int) -> tuple[int, ...]:
        batches = caae_loader(data, batch_size=4, seed=seed).epoch(epoch)
        return tuple(int(n) for batch in batches for n in batch.Y[:, 1])

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert len(set(orders)) == 3


def test_reading_stops_with_who_asked_for_it(split, store):
    loader = caae_loader(packed(split, ["images"], store), batch_size=2)
    before = threading.active_count()
    batches = loader.epoch(0)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_files_that_change_while_they_are_packed_are_refused(split, store, monkeypatch):
    split.digest  # noqa: B018 (of the files as they are now)
    path = split.image_path(2)
    intact = path.read_bytes()
    try:
        path.write_bytes(intact + b"\0")
        with pytest.raises(pipeline.UserError, match="have changed"):
            find_or_pack(split, "images", store)
        assert not os.listdir(store.root / "tmp")
    finally:
        path.write_bytes(intact)
