"""`semformer-tables why`."""

import itertools
import json
import shlex

import pytest

from analysis.cli import main
from semformer import cli, pipeline
from semformer.data.shapes import make_shapes
from sweeps import cli as sweep_cli
from tests.records import record
from tests.workplace import Workplace

TABLE = """\
name: mine
title: Two rows
baseline: {cams.flip: false, walk.beta: 5}
metrics: [{name: miou, header: mIoU}]
rows:
  - {id: a, label: a, set: {caae.reconstruction: false}, paper: {miou: 50}}
  - {id: b, label: b, set: {caae.reconstruction: false, cams.scales: [1.0, 0.5]}, paper: {miou: 60}}
  - {id: a-as-well, label: a, set: {caae.reconstruction: false, caae.decoder_depth: 7}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Rows on a data set whose folder has a space in its name, `b` made after `a`; what another sets has no use."""
    place = Workplace(tmp_path_factory.mktemp("why"))
    (place.folder / "mine.yaml").write_text(TABLE)
    data = make_shapes(place.folder / "my data", train=8, val=4, size=32)
    overrides = {"segmentor.losses": "CF,CB", "segmentor.epochs": 3, "data.train_split": "train"}
    record(place, place.folder / "mine.yaml", data, **overrides)
    return place


def why(place, row, capsys, table="mine.yaml"):
    options = ["--preset", "micro", "--tracking-uri", place.uri, "--json"]
    assert main(["why", str(place.folder / table), row, *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_a_run_was_made_of(place, capsys):
    told = why(place, "b", capsys)
    (run,) = told["runs"]
    (recorded,) = [one for one in place.runs("mine micro", "trial") if one.info.run_id == run["run_id"]]
    tags = recorded.data.tags
    assert run["parent_run_id"] == tags["mlflow.parentRunId"]
    assert run["commit"] == tags["semformer.commit"]
    assert run["host"] == "node-1"
    assert run["versions"]["torch"] == tags["semformer.version.torch"]
    assert {one["stage"]: one["key"] for one in run["stages"]} == json.loads(tags["semformer.stage_keys"])
    assert [one["found"] for one in run["stages"]] == [True, True, False, False]
    assert [one["seconds"] for one in run["stages"]] == [
        recorded.data.metrics[f"{name}/seconds"] for name in ("caae", "segmentor", "cams", "evaluate")
    ]
    rows = {"caae.reconstruction": False, "cams.scales": [1.0, 0.5]}
    swept = {"segmentor.losses": ["CF", "CB"], "segmentor.epochs": 3}
    assert run["differs_from"]["baseline"] == rows | swept
    assert run["differs_from"]["preset"] == rows | swept | {"cams.flip": False}
    (cell,) = told["cells"]
    assert cell["mean"] == run["values"]["miou"] == recorded.data.metrics["cam/val/miou"]


@pytest.mark.parametrize("row", ["a", "b", "a-as-well"])
def test_both_command_lines_make_the_very_run_again(place, row, capsys):
    told = why(place, row, capsys)
    (run,), (sweep, single) = told["runs"], told["commands"]
    keys = {one["stage"]: one["key"] for one in run["stages"]}
    options = cli._parser().parse_args(shlex.split(single["command"])[1:])
    config = cli.read_config(options)
    data = pipeline.open_data(config, options.data)
    made = pipeline.stage_keys(config, data, pipeline.ends(config, options.until))
    assert {name: key.digest for name, key in made.items()} == keys
    _, command, *arguments = shlex.split(sweep["command"])
    assert command == "run"
    assert sweep_cli.main(["plan", *arguments, "--store", str(place.store.root), "--json"]) == 0
    trials = json.loads(capsys.readouterr().out)["trial_list"]
    cells = {cell["row"]: trial["key"] for trial in trials for cell in trial["cells"]}
    assert cells[row] == run["trial_key"]


def test_a_row_that_has_changed_in_its_file_is_not_swept_again(place, capsys):
    (place.folder / "later.yaml").write_text(TABLE.replace("[1.0, 0.5]", "[1.0, 2.0]"))
    sweep, single = why(place, "b", capsys, "later.yaml")["commands"]
    assert "row 'b'" in sweep["impossible"]
    assert "other values now of cams.scales" in sweep["impossible"]
    assert "--set cams.scales=1.0,0.5" in single["command"]


def test_fields_of_another_version_are_named(sweep, capsys):
    run = sweep.trial("CF", 40.0)
    sweep.client.log_param(run, "segmentor.gone", "1")
    assert main(["why", "table03", "CF", "--tracking-uri", sweep.uri]) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"cannot be: run {run} was of another version, with segmentor.gone") == 2


def test_weights_are_given_to_a_sweep_by_their_backbone(sweep, tmp_path, capsys):
    """Not as a field of all rows; the file need not be there any more."""
    gone = str(tmp_path / "of mine.safetensors")
    stages = ("caae", "segmentor", "cams", "evaluate")
    both = {"segmentor.weights": gone, "caae.weights": gone}
    sweep.trial("CF", 40.0, seed=3, overrides=both, stages=stages)
    one, two = {"segmentor.weights": gone}, both | {"caae.weights": f"{gone}.2"}
    sweep.trial("CF-CB", 40.0, overrides=one, stages=stages)
    sweep.trial("CF-AS", 40.0, overrides=two, stages=stages)
    sweep.trial("CF-AC", 40.0, overrides=one | {"caae.pretrained": False}, stages=stages)
    told = {}
    for row in ("CF", "CF-CB", "CF-AS", "CF-AC"):
        assert main(["why", "table03", row, "--tracking-uri", sweep.uri, "--json"]) == 0
        whole, alone = (shlex.split(one["command"]) for one in json.loads(capsys.readouterr().out)["commands"])
        told[row] = {value for option, value in itertools.pairwise(whole) if option in ("--weights", "--set")}
        assert f"segmentor.weights={gone}" in alone
    of_backbone = f"vit_shapes_patch8_64={gone}"
    assert told["CF"] == {of_backbone}
    assert told["CF-CB"] == {f"segmentor.weights={gone}"}, "a file of the backbone would be the CAAE's as well"
    assert told["CF-AS"] == {f"segmentor.weights={gone}", f"caae.weights={gone}.2"}
    assert told["CF-AC"] == {of_backbone, "caae.pretrained=false"}


def test_a_run_that_went_further_goes_as_far_again(sweep, capsys):
    masks = ("train_cams", "affinity_labels", "affinity", "walk", "pseudo_masks", "evaluate_masks")
    sweep.trial("CF", 40.0, stages=("caae", "segmentor", "cams", "evaluate", *masks))
    assert main(["why", "table03", "CF", "--tracking-uri", sweep.uri, "--json"]) == 0
    for one in json.loads(capsys.readouterr().out)["commands"]:
        assert one["command"].endswith(" --until pseudo_masks")


def test_seeds_are_told_one_by_one_and_swept_together(sweep, capsys):
    for seed, miou in ((0, 40.0), (7, 44.0)):
        sweep.trial("CF", miou, seed=seed)
    assert main(["why", "table03", "CF", "--tracking-uri", sweep.uri]) == 0
    printed = capsys.readouterr().out
    assert "mIoU (%): 42.00 ± 2.83, of 2 seeds (paper 35.6)" in printed
    assert "Seed 7: mIoU (%) 44.00, threshold of cam 0.31" in printed
    assert "semformer-sweep run table03 --preset tiny --seeds 0,7\n" in printed
    assert (
        "semformer run --preset tiny --set seed=7 --set segmentor.losses=CF,SS --set cams.final_map=activation\n"
        in printed
    )
    assert "semformer run --preset tiny --set segmentor.losses=CF,SS --set cams.final_map=activation\n" in printed


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("CF-CB", "mIoU (%): failed: disk full (paper 43.5)"),
        ("CF-AS", "mIoU (%): still queued when the table was made (paper 40.1)"),
        ("CF-AC", "mIoU (%): not run (paper 42.0)"),
    ],
)
def test_why_a_row_has_no_value(sweep, capsys, row, says):
    sweep.trial("CF", 40.0)
    sweep.trial("CF-CB", tags={"status": "failed", "reason": "disk full"})
    sweep.trial("CF-AS", tags={"status": "queued"}, begun=False)
    assert main(["why", "table03", row, "--tracking-uri", sweep.uri]) == 0
    assert says in capsys.readouterr().out


def test_what_is_left_out_and_what_deviates_is_told(sweep, capsys):
    for row in ("CF", "CF-AS", "CF-AC"):
        sweep.trial(row, 40.0)
    sweep.trial("CF", 41.0, overrides={"segmentor.epochs": 9})
    sweep.trial("CF-CB", 42.0, protocol={"erosion": 7})
    assert main(["why", "table03", "CF", "--tracking-uri", sweep.uri]) == 0
    printed = capsys.readouterr().out
    assert "segmentor.epochs = 9, mIoU (%) 41.0 (--set segmentor.epochs=9 shows it)" in printed
    assert "dagger:" not in printed
    assert main(["why", "table03", "CF-CB", "--tracking-uri", sweep.uri]) == 0
    assert "  dagger: erosion = 7 (otherwise 0)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["table03", "CF-CD"], "has no row 'CF-CD': did you mean CF-CB"),
        (["table03", "nonsense"], "has no row 'nonsense': there are CF, CF-CB"),
        (["table03", "TS-CAM"], "values of the paper alone"),
        (["tabel03", "CF"], "did you mean table03"),
        (["table08", "D-32"], "MLflow has no trial of table08 with preset tiny: there are trials of table03 tiny"),
        (["table03", "CF", "--preset", "micro"], "no trial of table03 with preset micro"),
        (["table03", "CF", "--seed", "5"], "no trial of these tables has seed 5: there are 0"),
    ],
)
def test_bad_input_is_told_in_words(sweep, capsys, arguments, says):
    sweep.trial("CF", 40.0)
    assert main(["why", *arguments, "--tracking-uri", sweep.uri]) == 2
    assert says in capsys.readouterr().err
