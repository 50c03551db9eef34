"""Maps of a table's rows side by side, drawn from the store."""

import numpy as np
import pytest
from PIL import Image

from semformer.config import load_config
from semformer.stages.cams import MapFiles
from semformer.store import Store
from sweeps import figure
from sweeps.cli import main
from tests.pipelines import run

TABLE = """\
name: maps
title: Maps
metrics: [{name: miou, header: mIoU}]
rows:
  - {id: activation, label: alone, set: {cams.final_map: activation}}
  - {id: both, label: with CRA}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, shapes):
    folder = tmp_path_factory.mktemp("figure")
    (folder / "maps.yaml").write_text(TABLE)
    store = Store(folder / "store")
    made = [run(load_config("micro", {"cams.final_map": kind}), shapes, store) for kind in ("activation", "both")]
    return folder, made


def draw(place, shapes, *options):
    folder, _ = place
    table = str(folder / "maps.yaml")
    return main(["draw", table, "--preset", "micro", "--data", str(shapes), "--store", str(folder / "store"), *options])


def test_each_column_has_the_final_map_of_its_row_and_its_score(place, shapes, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figure, "draw", lambda lines: drawn.extend(lines) or Image.new("RGB", (1, 1)))
    assert draw(place, shapes, "--images", "3", "--out", str(tmp_path / "out")) == 0
    assert (tmp_path / "out" / "maps-micro-seed0.png").is_file()
    for column, stages in enumerate(place[1]):
        metrics = stages["evaluate"].artifact.info["metrics"]
        files = MapFiles(stages["cams"].artifact)
        maps = [files[image_id] for image_id in list(files)[:3]]
        assert len(drawn) == sum(len(one.classes) for one in maps)
        for line, heat in zip(drawn, (heat for one in maps for heat in one.full), strict=True):
            heading, values, threshold = line.maps[column]
            assert heading == f"{('alone', 'with CRA')[column]}\nmIoU {metrics['cam/val/miou']:.1f} %"
            assert threshold == metrics["cam/val/threshold"]
            np.testing.assert_allclose(values, heat.numpy(), atol=2e-3)
    assert all(set(np.unique(line.labels[0].values)) - {0, 255} for line in drawn)


def test_the_picture_has_a_panel_for_each_image_map_and_truth(place, shapes, tmp_path):
    assert draw(place, shapes, "--images", "1", "--out", str(tmp_path)) == 0
    with Image.open(tmp_path / "maps-micro-seed0.png") as picture:
        assert picture.width == int(2.2 * 4 * 110)


def test_pictures_of_seeds_and_settings_are_kept_apart(place, shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(figure, "figure3", lambda table, trials, *_: Image.new("RGB", (trials[0].config.seed + 1, 1)))
    assert draw(place, shapes, "--seeds", "0,1", "--out", str(tmp_path)) == 0
    assert draw(place, shapes, "--set", "segmentor.sigma=0.5", "--out", str(tmp_path)) == 0
    assert draw(place, shapes, "--set", "segmentor.sigma=0.4", "--out", str(tmp_path)) == 0
    assert Image.open(tmp_path / "maps-micro-seed1.png").width == 2
    assert len(list(tmp_path.glob("maps-micro-seed0*.png"))) == 3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--seeds", "7"], "maps/activation, seed 7, has no maps of these settings in"),
        (["--images", "1000"], "maps to draw are kept of"),
    ],
)
def test_what_cannot_be_drawn_is_told(place, shapes, tmp_path, capsys, options, told):
    assert draw(place, shapes, "--out", str(tmp_path / "out"), *options) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_rows_of_different_images_are_not_put_side_by_side(place, shapes, tmp_path, capsys):
    folder, _ = place
    (folder / "other.yaml").write_text(TABLE.replace("with CRA", "with CRA, set: {data.eval_split: train}"))
    run(load_config("micro", {"data.eval_split": "train"}), shapes, Store(folder / "store"))
    command = ["draw", str(folder / "other.yaml"), "--preset", "micro", "--data", str(shapes)]
    assert main([*command, "--store", str(folder / "store"), "--out", str(tmp_path)]) == 2
    assert "measured on different images" in " ".join(capsys.readouterr().err.split())
