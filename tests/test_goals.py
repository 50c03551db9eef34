"""How far trials go: sweeps and searches for pseudo masks and segmentations, and what is told of them."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from analysis.cli import main as tables
from semformer import pipeline
from semformer.config import field_names, flatten, load_config
from semformer.data.voc import open_devkit
from semformer.errors import UserError
from semformer.store import Store
from sweeps.plan import protocol, scores
from sweeps.plan.table import load_table
from sweeps.plan.trials import make_plan
from sweeps.search.space import read_objectives
from tests.records import record
from tests.searches import open_search
from tests.test_stage_keys import FIELDS
from tests.workplace import Workplace

STAGES = [stage.name for stage in pipeline.STAGES]
UNTIL_MAPS, UNTIL_MASKS = STAGES[:4], STAGES[: STAGES.index("evaluate_masks") + 1]
CHAIN = """\
name: chain
title: From maps to a segmentation
metrics:
  - {name: miou, header: maps}
  - {name: train_cam/miou, header: maps of train}
  - {name: walk/miou, header: walk}
  - {name: pseudo/miou, header: masks}
  - {name: seg/miou_crf, header: segmentation}
layout: {marks: [{name: beta, header: beta, field: walk.beta}]}
rows:
  - {id: own, label: own, marks: {beta: 10}}
  - {id: near, label: near, marks: {beta: 4}, set: {walk.beta: 4.0}}
"""
OF_MAPS = ["eval_split", "scales", "flip", "erosion", "rule"]
OF_WALK = ["radius of the walk", "beta", "log2 of the steps"]
OF_MASKS = ["threshold of the masks", "CRF iterations of the masks"]
OF_SEGMENTATION = [f"{name} of the segmentation" for name in ("scales", "flip", "CRF iterations")]
BEFORE_DEEPLAB = {*OF_MAPS, *OF_WALK, *OF_MASKS, "mask_split", "images of mask_split"}
"""Names of the protocol's settings."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("goals"))


@pytest.fixture(scope="module")
def table(place) -> Path:
    path = place.folder / "chain.yaml"
    path.write_text(CHAIN)
    return path


@pytest.fixture(scope="module")
def swept(place, table) -> dict[str, dict[str, float]]:
    """The metrics of each row's run, after a sweep of the table."""
    status, out = place.sweep(table)
    assert status == 0, out
    return {run.data.tags["semformer.rows"]: run.data.metrics for run in place.runs("chain micro", "trial")}


def plan(place, *names, until="cams", **overrides):
    return make_plan([load_table(name) for name in names], "micro", overrides, (0,), None, place.store, until=until)


# Sweeps


def test_rows_that_differ_in_the_walk_share_all_that_comes_before(place, swept):
    made = Counter(artifact.key.stage for artifact in place.artifacts())
    shared = STAGES[: STAGES.index("walk")]
    assert made == {name: 1 if name in shared else 2 for name in STAGES}


def test_a_run_has_the_scores_of_every_link(place, table, swept):
    for trial in plan(place, table).trials:
        measured = [place.store.find(trial.keys[name]) for name in ("evaluate", "evaluate_masks", "evaluate_seg")]
        assert [artifact.key for artifact in measured] == [*trial.ends]
        for artifact in measured:
            for name, value in artifact.info["metrics"].items():
                assert swept[trial.rows[0]][name] == value
    assert swept["chain/own"]["walk/train/miou"] != swept["chain/near"]["walk/train/miou"]


def test_a_run_shows_the_classes_and_pictures_of_every_link(place, swept):
    (run,) = (run for run in place.runs("chain micro", "trial") if run.data.tags["semformer.rows"] == "chain/own")
    files = {path.relative_to(place.folder).as_posix() for path in place.folder.rglob("*.json")}
    shown = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    names = ["class_iou.json", "evaluate_masks/class_iou.json", "evaluate_seg/class_iou.json"]
    assert [item["path"] for item in shown] == names
    for name in names:
        assert any(file.endswith(f"{run.info.run_id}/artifacts/{name}") for file in files)
    uses = {(item.tags[0].value, item.dataset.name.rpartition(" ")[2]) for item in run.inputs.dataset_inputs}
    assert uses == {("training", "train"), ("evaluation", "val")}
    assert run.data.params["walk.beta"] == "16.0"
    assert json.loads(run.data.tags["semformer.masks_read_by"]) == ["evaluate", "evaluate_masks", "evaluate_seg"]


def test_a_table_has_a_column_for_every_link_and_tells_how_each_was_made(place, table, swept, capsys, tmp_path):
    out = str(tmp_path)
    assert tables([str(table), "--preset", "micro", "--tracking-uri", place.uri, "--out", out]) == 0
    told = capsys.readouterr().out
    cells = pd.read_parquet(tmp_path / "chain.parquet")
    recorded = {"miou": "cam/val/miou", "train_cam/miou": "cam/train/miou", "walk/miou": "walk/train/miou"}
    recorded |= {"pseudo/miou": "pseudo/train/miou", "seg/miou_crf": "seg/val/miou_crf"}
    assert set(cells["metric"]) == set(recorded)
    for cell in cells.itertuples():
        measured = swept[f"chain/{cell.row}"]
        assert cell.value == measured[recorded[cell.metric]]
        threshold = recorded[cell.metric].replace("miou", "threshold").removesuffix("_crf")
        assert cell.threshold == measured[threshold] if threshold in measured else pd.isna(cell.threshold)
    assert "maps on split val, pseudo masks on split train, the segmentation on split val" in told
    assert "radius of the walk 4; log2 of the steps 4" in told
    assert "CRF iterations of the masks 5" in told
    assert "beta 16" not in told  # the rows are about it
    assert "read by stages evaluate, evaluate_masks and evaluate_seg alone" in told


def test_a_sweep_that_was_run_to_its_end_is_not_run_again(place, table, swept):
    status, out = place.sweep(table)
    assert status == 0
    assert "nothing to do" in out


def test_a_table_of_maps_goes_on_where_asked_and_finds_its_maps(place, swept):
    """Rows of the first sweep and of this one share all stages: none is made."""
    near = plan(place, "table04", until="deeplab")
    shared = {trial.rows[0]: trial for trial in near.trials}["table04/with"]
    assert all(key.digest in near.cached for key in shared.keys.values())
    assert [*plan(place, "table04", until="pseudo_masks").trials[0].keys] == UNTIL_MASKS
    assert [*plan(place, "table04").trials[0].keys] == UNTIL_MAPS


def test_a_run_that_went_further_shows_the_same_maps(place, swept, capsys):
    """Of two runs of a row, one of which goes on, by a setting of later stages: they are of one result."""
    mine = place.table("mine", maps="")
    record(place, mine)
    record(place, mine, until="pseudo_masks", **{"walk.beta": 4.0})
    assert len(place.runs("mine micro", "trial")) == 2
    assert tables([str(mine), "--preset", "micro", "--tracking-uri", place.uri]) == 0
    told = capsys.readouterr().out
    for other in ("left out", "evaluate_masks", "walk.beta", "†"):
        assert other not in told


def test_what_ends_a_trial_is_its_identity(place, table):
    maps, masks, seg = (plan(place, "table04", until=goal).trials[0] for goal in scores.GOALS)
    assert maps.key == maps.keys["evaluate"].digest
    assert len({maps.key, masks.key, seg.key}) == 3
    (other,) = plan(place, "table04", until="pseudo_masks", **{"data.eval_split": "train"}).trials[:1]
    assert other.keys["evaluate_masks"] == masks.keys["evaluate_masks"]
    assert other.key != masks.key
    assert plan(place, table).trials[0].key != plan(place, table, **{"data.eval_split": "train"}).trials[0].key


def test_masks_of_another_method_are_scored_without_maps(place, tmp_path):
    mine = tmp_path / "masks.yaml"
    mine.write_text(CHAIN.replace("walk.beta: 4.0", f"pseudo_masks.folder: {tmp_path}"))
    data = pipeline.open_data(load_config("micro"), None)
    split = data["train"]
    for i, image_id in enumerate(split.ids):
        (tmp_path / f"{image_id}.png").write_bytes(split.mask_path(i).read_bytes())
    theirs = plan(place, mine).trials[1]
    assert [*theirs.keys] == ["pseudo_masks", "evaluate_masks", "deeplab", "segmentation", "evaluate_seg"]
    assert theirs.masks_read_by == ("evaluate_masks", "evaluate_seg")


def compiled(place, table, capsys, *options: str) -> str:
    assert tables([str(table), "--preset", "micro", "--tracking-uri", place.uri, *options]) == 0
    return capsys.readouterr().out


def test_rows_without_some_stages_are_compared_by_what_they_have(place, swept, tmp_path, capsys):
    """Another method's masks, and an upper bound, beside ours: the segmentation of all is scored alike."""
    data = pipeline.open_data(load_config("micro"), None)
    split = data["train"]
    for i, image_id in enumerate(split.ids):
        (tmp_path / f"{image_id}.png").write_bytes(split.mask_path(i).read_bytes())
    mine = place.folder / "mixed.yaml"
    rows = CHAIN[: CHAIN.index("rows:")].replace("name: chain", "name: mixed") + "rows:\n  - {id: own, label: own}\n"
    rows += f"  - {{id: theirs, label: theirs, set: {{pseudo_masks.folder: {tmp_path}}}}}\n"
    mine.write_text(rows + "  - {id: bound, label: bound, set: {deeplab.supervised: true}}\n")
    record(place, mine)
    told = compiled(place, mine, capsys)
    theirs = next(line for line in told.splitlines() if line.startswith("| theirs"))
    assert "†" not in theirs
    assert "not comparable: pixel masks read by = deeplab, evaluate, evaluate_masks, evaluate_seg (otherwise" in told
    assert "otherwise not recorded" not in told
    assert "of what comes from files, it is not known what it has seen" in told
    protocol_of = {
        run.data.tags["semformer.rows"]: json.loads(run.data.tags["semformer.protocol"])
        for run in place.runs("mixed micro", "trial")
    }
    assert "beta" in protocol_of["mixed/own"]
    assert not {"beta", "scales", "threshold of the masks"} & protocol_of["mixed/theirs"].keys()
    assert not {"beta", "scales", "mask_split", "erosion"} & protocol_of["mixed/bound"].keys()


def test_a_run_that_has_all_scores_is_shown_before_others_that_have_not(place, swept, tmp_path, capsys):
    """Three rows were run to their maps; then masks were asked for, and one row was run."""
    text = CHAIN[: CHAIN.index("metrics:")].replace("name: chain", "name: grow")
    text += "metrics: [{name: miou, header: mIoU}]\nrows:\n"
    mine = place.folder / "grow.yaml"
    rows = [f"  - {{id: {row}, label: {row}, set: {{cams.final_map: {row}}}}}\n" for row in ("both", "activation")]
    mine.write_text(text + "".join(rows))
    record(place, mine)
    further = text.replace("mIoU}]", "mIoU}, {name: pseudo/miou, header: masks}]")
    mine.write_text(further + rows[0])
    record(place, mine)
    mine.write_text(further + "".join(rows))
    assert tables([str(mine), "--preset", "micro", "--tracking-uri", place.uri, "--out", str(tmp_path)]) == 0
    cells = pd.read_parquet(tmp_path / "grow.parquet").set_index(["row", "metric"])["value"]
    assert cells["both", "pseudo/miou"] == swept["chain/own"]["pseudo/train/miou"]
    assert pd.isna(cells["activation", "pseudo/miou"])
    assert cells["activation", "miou"] > 0


def test_scores_on_other_images_are_told(place, swept, shapes, tmp_path, capsys):
    """A list of test images that has changed between two runs, while the images of the maps have not."""
    kit = Path(shutil.copytree(shapes, tmp_path / "kit"))
    lists = open_devkit(kit).folder / "ImageSets" / "Segmentation"
    val = (lists / "val.txt").read_text().split()
    mine = place.folder / "images.yaml"
    text = "name: images\ntitle: t\nmetrics: [{name: seg/miou, header: seg}]\nrows:\n"
    rows = ["  - {id: a, label: a}\n", "  - {id: b, label: b, set: {segmentation.flip: true}}\n"]
    for row, images in zip(rows, (val, val[:3]), strict=True):
        (lists / "some.txt").write_text("\n".join(images))
        mine.write_text(text + row)
        record(place, mine, kit, **{"data.test_split": "some"})
    mine.write_text(text + "".join(rows))
    told = compiled(place, mine, capsys, "--set", "data.test_split=some")
    assert re.search(r"images of test_split = \w{8} \(otherwise \w{8}\)", told)
    assert "images, " not in told.partition("**Ours:**")[2].partition("seed")[0]


# Names


def test_a_table_goes_as_far_as_its_scores():
    assert scores.goal_of(["miou", "fp"]) == "cams"
    assert scores.goal_of(["miou", "walk/miou"]) == "pseudo_masks"
    assert scores.goal_of(["seg/miou", "miou"]) == "deeplab"


def test_errors_are_good_when_they_are_low():
    assert [name for name in scores.NAMES if scores.is_low(name)] == [
        *("fp", "fn", "train_cam/fp", "train_cam/fn", "walk/fp", "walk/fn"),
    ]


def test_scores_are_recorded_by_their_split():
    config = load_config("micro", {"data.mask_split": "val", "data.test_split": "train"})
    names = ("miou", "train_cam/fp", "walk/miou", "pseudo/recall", "seg/miou_single_crf")
    assert [scores.recorded(name, config) for name in names] == [
        "cam/val/miou",
        "cam/val/fp",
        "walk/val/miou",
        "pseudo/val/recall",
        "seg/train/miou_single_crf",
    ]


def test_every_score_that_can_be_asked_for_is_measured(place, swept):
    config = load_config("micro")
    assert {scores.recorded(name, config) for name in scores.NAMES} <= swept["chain/own"].keys()


def test_protocols_are_of_fields_and_of_what_a_score_comes_from():
    """What changes the key of the stage that makes what is scored matters to the score."""
    fields = {setting.field for setting in protocol.PROTOCOL.values() if not setting.images_of}
    assert fields <= set(field_names())
    changed = {field: stages for field, _, stages in FIELDS}
    for field in fields:
        if field.startswith(("data.", "evaluate.")):
            continue
        (setting,) = (one for one in protocol.PROTOCOL.values() if one.field == field)
        assert set(setting.of) == {word for word, link in scores.LINKS.items() if link.made_by in changed[field]}, field
    assert [*protocol.of_scores(["miou"])] == OF_MAPS
    for word in ("train_cam", "walk"):
        of_word = protocol.of_scores([f"{word}/miou"]).keys()
        assert {"erosion", "rule", "mask_split", "images of mask_split"} <= of_word
    for word in ("pseudo", "seg"):
        assert not {"erosion", "rule"} & protocol.of_scores([f"{word}/miou"]).keys()


@pytest.mark.parametrize(
    ("setting", "idle", "others"),
    [
        (
            "CRF iterations of the segmentation",
            ["seg/miou", "seg/recall_single"],
            ["seg/miou_crf", "seg/miou_single_crf"],
        ),
        ("CRF iterations of the masks", ["pseudo/miou_before_crf"], ["pseudo/miou", "seg/miou"]),
        ("rule", ["miou_oracle", "walk/miou_fixed", "miou_heldout"], ["miou", "train_cam/threshold", "fp"]),
    ],
)
def test_what_changes_nothing_of_a_score_is_not_of_its_protocol(setting, idle, others):
    for name in idle:
        assert setting not in protocol.of_scores([name])
        assert setting in protocol.of_scores([name, others[0]])
    for name in others:
        assert setting in protocol.of_scores([name])


@pytest.mark.parametrize(
    ("changes", "goal", "without"),
    [
        ({}, "deeplab", set()),
        ({}, "pseudo_masks", {"test_split", "images of test_split", "supervised", *OF_SEGMENTATION}),
        ({"pseudo_masks.folder": True}, "deeplab", {*OF_MAPS, *OF_WALK, *OF_MASKS}),
        ({"cams.folder": True}, "deeplab", {"scales", "flip"}),
        ({"deeplab.supervised": True}, "deeplab", BEFORE_DEEPLAB),
        ({"deeplab.checkpoint": True}, "deeplab", {*BEFORE_DEEPLAB, "supervised"}),
    ],
)
def test_a_trial_records_the_settings_of_the_stages_that_it_has(shapes, tmp_path, changes, goal, without):
    (tmp_path / "a").touch()
    paths = {"pseudo_masks.folder": tmp_path, "cams.folder": tmp_path, "deeplab.checkpoint": tmp_path / "a"}
    fields = {name: str(paths.get(name, value)) for name, value in changes.items()}
    config = load_config("micro", {"data.mask_split": "train", "data.test_split": "val", **fields})
    keys = pipeline.stage_keys(config, pipeline.open_data(config, shapes), pipeline.ends(config, goal))
    told, values = protocol.of_trial(config, keys), flatten(config)
    assert told.keys() == protocol.PROTOCOL.keys() - without
    for name, value in told.items():
        setting = protocol.PROTOCOL[name]
        if setting.field:
            assert value == values[setting.field]
        else:
            stage = {"images of mask_split": "evaluate_masks", "images of test_split": "evaluate_seg"}[name]
            assert value == keys[stage].spec["data"]["images"][:8]


def test_a_field_matters_from_the_first_goal_that_has_a_stage_of_it():
    config = load_config("micro")
    stages = {g: {s.name for s in pipeline.needed_stages(config, pipeline.ends(config, g))} for g in scores.GOALS}
    for field, _, changed in FIELDS:
        first = next(goal for goal in scores.GOALS if stages[goal] & set(changed))
        assert scores.goal_of_field(field) == first, field
    of_splits = {"train": "cams", "eval": "cams", "selection": "cams", "mask": "pseudo_masks", "test": "deeplab"}
    assert {name: scores.goal_of_field(f"data.{name}_split") for name in of_splits} == of_splits


def test_an_unknown_score_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(CHAIN.replace("walk/miou", "walk/recall"))
    with pytest.raises(UserError, match=r"mine\.yaml:6: metrics: 'walk/recall' is none of miou, .*pseudo/miou"):
        load_table(path)


# Searches


def test_a_search_goes_as_far_as_its_objectives(tmp_path, shapes):
    store = Store(tmp_path / "store")
    near = open_search(shapes, store, tmp_path / "a.db", "beta", name="a", objectives=["pseudo/train/miou"])
    assert [*near.ask().keys] == UNTIL_MASKS
    further = ["seg/val/miou_crf"]
    far = open_search(shapes, store, tmp_path / "b.db", "seg_lr", "steps", name="b", objectives=further)
    assert [*far.ask().keys] == STAGES
    asked = open_search(shapes, store, tmp_path / "c.db", "sigma", name="c", until="deeplab")
    assert [*asked.ask().keys] == STAGES


def test_what_is_there_of_a_suggestion_is_told_without_a_run(tmp_path, shapes):
    store, told = Store(tmp_path / "store"), []
    search = open_search(
        shapes,
        store,
        tmp_path / "study.db",
        "mask_crf=0|1",
        trials=4,
        objectives=["pseudo/train/miou"],
        overrides={"pseudo_masks.crf.iterations": 0},
        sampler_seed=1,
        found=lambda trial, report: told.append(trial.key),
    )
    ran = []
    while trial := search.ask():
        ran.append(trial.config.pseudo_masks.crf.iterations)
        miou = 50.0 + trial.config.pseudo_masks.crf.iterations
        for key in trial.keys.values():
            if store.find(key) is None:
                metrics = {"metrics": {"pseudo/train/miou": miou}} if key.stage == "evaluate_masks" else {}
                store.publish(key, store.workspace(key), {"seconds": 1.0, **metrics})
        search.tell(trial, {"pseudo/train/miou": miou})
    assert sorted(ran) == [0, 1]
    assert len(told) == 2
    assert search.study.best_value == 51.0


def test_a_trial_without_the_score_that_is_searched_for_fails(tmp_path, shapes):
    """Without a CRF: told after its run, and from the store."""
    store, without = Store(tmp_path / "store"), {"segmentation.crf.iterations": 0}
    for name in "ab":
        search = open_search(
            shapes,
            store,
            tmp_path / f"{name}.db",
            "seg_crf=0|5",
            objectives=["seg/val/miou_crf"],
            overrides=without,
            trials=1,
        )
        if trial := search.ask():
            for key in trial.keys.values():
                store.publish(key, store.workspace(key), {"seconds": 1.0})
            search.tell(trial, {"seg/val/miou": 50.0})
        assert (search.untold, search.ask()) == (0, None)
        (told,) = search.study.trials
        assert told.state.name == "FAIL"
        assert told.user_attrs["reason"] == "with these settings there is no seg/val/miou_crf"


def test_an_axis_that_changes_nothing_is_refused(tmp_path, shapes):
    with pytest.raises(UserError, match=r"beta \(walk\.beta\) changes nothing of cam/val/miou.*pseudo/train/miou"):
        open_search(shapes, Store(tmp_path / "store"), tmp_path / "study.db", "sigma", "beta")
    with pytest.raises(UserError, match=r"seg_crf .* changes nothing of pseudo/train/miou"):
        open_search(
            shapes, Store(tmp_path / "store"), tmp_path / "study.db", "seg_crf", objectives=["pseudo/train/miou"]
        )


@pytest.mark.parametrize(
    ("axis", "objective"),
    [
        ("erosion", "pseudo/train/miou"),
        ("thresholds", "seg/val/miou"),
        ("mask_crf", "walk/train/miou"),
        ("beta", "cam/train/miou"),
        ("seg_crf", "seg/val/miou"),
        ("mask_crf", "pseudo/train/miou_before_crf"),
        ("thresholds", "cam/val/miou_oracle"),
    ],
)
def test_an_axis_of_what_comes_after_or_beside_a_score_is_refused(tmp_path, shapes, axis, objective):
    with pytest.raises(UserError, match=rf"--axes: {axis} .* changes nothing of {objective}"):
        open_search(shapes, Store(tmp_path / "store"), tmp_path / "study.db", axis, objectives=[objective])
    both = [objective, "gpu_hours"]
    open_search(shapes, Store(tmp_path / "other"), tmp_path / "b.db", axis, objectives=both, until="deeplab").close()


def test_an_axis_of_what_a_folder_takes_the_place_of_is_refused(tmp_path, shapes):
    (tmp_path / "a.npy").write_bytes(b"maps")
    with pytest.raises(UserError, match=r"sigma .* changes nothing"):
        open_search(
            shapes,
            Store(tmp_path / "store"),
            tmp_path / "study.db",
            "sigma",
            overrides={"cams.folder": str(tmp_path)},
        )


def test_no_scheduler_stops_trials_by_a_score_that_comes_at_their_end(tmp_path, shapes):
    from sweeps.search.algorithms import Named, Pruning

    with pytest.raises(UserError, match="seg/val/miou is not known before a trial has ended"):
        open_search(
            shapes,
            Store(tmp_path / "store"),
            tmp_path / "study.db",
            "sigma",
            objectives=["seg/val/miou"],
            pruning=Pruning(Named.read("--scheduler", "asha")),
        )


def test_objectives_have_a_direction():
    own = load_config("micro")
    names = ["seg/val/miou", "walk/train/fp", "gpu_hours", "pseudo/train/recall"]
    assert [*read_objectives(names, own).values()] == ["maximize", "minimize", "minimize", "maximize"]
