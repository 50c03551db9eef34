"""Pretrained weights from files, one for each backbone: `semformer-sweep --weights`."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from analysis.tables import compile_from_mlflow
from semformer import pipeline
from semformer.config import load_config
from semformer.errors import UserError
from semformer.models import vit  # which registers the small backbones
from semformer.store import Store
from sweeps.plan.table import load_table
from sweeps.plan.trials import Plan, make_plan
from sweeps.plan.weights import Weights
from sweeps.search.search import Search
from tests.workplace import Workplace

assert vit
SMALL, MEDIUM, OWN = "vit_shapes_small_patch8_64", "vit_shapes_medium_patch8_64", "vit_wiring_patch8_32"
SEGMENTOR = "vit_wiring_patch8_48"
ENCODERS = {"caae.pretrained": True}
BOTH = ["--set", "caae.pretrained=true", "--set", "segmentor.pretrained=true"]


def write_weights(path: Path, backbone: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of a backbone, as timm would give them."""
    torch.manual_seed(seed)
    state = timm.create_model(backbone).state_dict()
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return state


@pytest.fixture
def folder(tmp_path) -> Path:
    """The files of the three encoders of Table 6 in preset micro, one of each kind."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for name, suffix in ((SMALL, ".safetensors"), (MEDIUM, ".pth"), (OWN, ".bin")):
        write_weights(folder / f"{name}{suffix}", name)
    return folder


def plan(store: Store, *given: str | Path, overrides=ENCODERS) -> Plan:
    weights = Weights(list(map(str, given)))
    return make_plan([load_table("table06")], "micro", overrides, (0,), None, store, weights=weights)


def digests(planned: Plan, stage: str) -> list[str]:
    return [trial.keys[stage].digest for trial in planned.trials]


def test_each_backbone_of_table_6_has_its_file(store, folder):
    planned = plan(store, folder)
    files = [Path(trial.config.caae.weights) for trial in planned.trials]
    assert files == [folder / f"{SMALL}.safetensors", folder / f"{MEDIUM}.pth", folder / f"{OWN}.bin"]
    assert {trial.config.segmentor.weights for trial in planned.trials} == {""}  # it starts from random weights
    by_name = plan(store, *(f"{file.stem}={file}" for file in files))
    assert digests(by_name, "evaluate") == digests(planned, "evaluate")


def test_files_count_by_content(store, folder, tmp_path):
    before = digests(plan(store, folder), "caae")
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    assert digests(plan(store, elsewhere), "caae") == before
    write_weights(elsewhere / f"{MEDIUM}.pth", MEDIUM, seed=1)
    after = digests(plan(store, elsewhere), "caae")
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    assert not set(before) & set(digests(plan(store), "caae"))


def test_the_keys_are_those_of_a_single_run_from_the_same_file(store, folder):
    trial = plan(store, folder).trials[2]
    file = str(folder / f"{OWN}.bin")
    config = load_config("micro", ENCODERS | {"caae.weights": file})
    assert pipeline.stage_keys(config, pipeline.open_data(config, None))["caae"] == trial.keys["caae"]


def test_a_file_that_a_row_names_itself_stays(store, folder, tmp_path):
    own = tmp_path / "own.pth"
    write_weights(own, SEGMENTOR)
    overrides = ENCODERS | {"segmentor.pretrained": True, "segmentor.weights": str(own)}
    assert {t.config.segmentor.weights for t in plan(store, folder, overrides=overrides).trials} == {str(own)}


def test_a_named_file_goes_before_that_of_a_folder(store, folder, tmp_path):
    own = tmp_path / "own.pth"
    write_weights(own, SMALL)
    assert plan(store, folder, f"{SMALL}={own}").trials[0].config.caae.weights == str(own)


def test_a_folder_that_lacks_a_backbone_is_told_with_the_row(store, folder):
    (folder / f"{MEDIUM}.pth").unlink()
    with pytest.raises(UserError) as caught:
        plan(store, folder)
    told = str(caught.value)
    assert "table06_backbone.yaml:24: row 'DeiT-B': --weights" in told
    assert f"it has no {MEDIUM}.safetensors or {MEDIUM}.pth or {MEDIUM}.bin, from which the caae is to start" in told
    assert told.endswith(f"there are {SMALL}.safetensors, {OWN}.bin")


def test_only_what_starts_from_pretrained_weights_needs_a_file(store, folder):
    own = folder / f"{OWN}.bin"
    for name in (SMALL, MEDIUM):
        next(folder.glob(f"{name}.*")).unlink()
    with pytest.raises(UserError, match=r"no network starts from pretrained weights: with --set caae\.pretrained=true"):
        plan(store, folder, overrides={})
    with pytest.raises(UserError, match=rf"--weights {OWN}=\S+: no network starts .* of {OWN}; there are {SEGMENTOR}$"):
        plan(store, f"{OWN}={own}", overrides={"segmentor.pretrained": True})
    write_weights(folder / f"{SEGMENTOR}.pth", SEGMENTOR)
    imported = ENCODERS | {"segmentor.pretrained": True, "caae.checkpoint": str(own)}
    assert {trial.config.caae.weights for trial in plan(store, folder, overrides=imported).trials} == {""}


def test_trials_start_from_their_files(tmp_path):
    """Networks that do not learn end as they began."""
    place = Workplace(tmp_path)
    (files := tmp_path / "weights").mkdir()
    expected = {name: write_weights(files / f"{name}.pth", name) for name in (OWN, SEGMENTOR)}
    still = [part for stage in ("caae", "segmentor") for part in ("--set", f"{stage}.optimizer.lr=1e-12")]
    answer = place.call("run", place.table("still", a=""), *BOTH, *still, "--weights", files, "--json")
    assert json.loads(answer.out)["sweep/finished"] == 1, answer
    artifacts = {artifact.key.stage: artifact for artifact in place.artifacts()}
    for stage, part, name in (("caae", "encoder", OWN), ("segmentor", "backbone", SEGMENTOR)):
        trained = load_file(artifacts[stage].file(f"{stage}.safetensors"))
        for parameter in ("blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight"):
            torch.testing.assert_close(trained[f"{part}.{parameter}"], expected[name][parameter], atol=1e-7, rtol=0)


def test_the_cells_of_table_6_can_be_compared_though_their_files_differ(tmp_path, folder):
    place = Workplace(tmp_path)
    place.sweep("table06", "--set", "caae.pretrained=true", "--weights", str(folder))
    (table,) = compile_from_mlflow([load_table("table06")], preset="micro", tracking_uri=place.uri, overrides=ENCODERS)
    cells = [cell for line in table.lines for cell in line.cells.values() if line.ours]
    assert [cell.n for cell in cells] == [1, 1, 1]
    assert not any(cell.deviations for cell in cells)


def test_sweeps_from_other_files_have_folders_of_their_own(tmp_path, folder):
    place = Workplace(tmp_path)
    nowhere = ["table06", "--set", "caae.pretrained=true", "--address", "nowhere"]  # which is refused
    for given in ([], ["--weights", folder], ["--weights", folder]):
        place.call("run", *nowhere, *given)
    assert len(list((tmp_path / "sweeps").iterdir())) == 2


# Searches


@pytest.fixture
def search(store, tmp_path):
    """search(WEIGHTS...) over two encoders."""
    opened = []
    overrides = {**ENCODERS, "caae.backbone": SMALL, "data.shapes": {"train": 2, "val": 2, "size": 48}}

    def search(*given: str | Path, axes=(f"caae.backbone={SMALL}|{MEDIUM}",)) -> Search:
        data = pipeline.open_data(load_config("micro", overrides), None)
        options = {"axes": axes, "objectives": (), "most": 8, "storage": f"sqlite:///{tmp_path / 'studies.db'}"}
        weights = Weights(list(map(str, given)))
        opened.append(Search("study", "micro", overrides, data, store, weights=weights, **options))
        return opened[-1]

    yield search
    for one in opened:
        one.close()


def test_every_suggestion_of_a_search_has_its_file(search, folder):
    one, files = search(folder), {}
    while (trial := one.ask()) is not None:
        files[trial.config.caae.backbone] = trial.config.caae.weights
    assert files == {SMALL: str(folder / f"{SMALL}.safetensors"), MEDIUM: str(folder / f"{MEDIUM}.pth")}
    assert {trial.config.caae.weights for trial in one.samples} == set(files.values())


def test_a_search_is_told_of_a_file_that_is_missing_or_of_no_use_before_it_starts(search, folder, tmp_path):
    with pytest.raises(
        UserError, match=rf"no network starts from pretrained weights of {OWN}; there are {MEDIUM}, {SMALL}"
    ):
        search(f"{OWN}={folder / OWN}.bin")
    (folder / f"{MEDIUM}.pth").unlink()
    with pytest.raises(UserError, match=rf"it has no {MEDIUM}\.safetensors"):
        search(folder)


def test_a_study_goes_on_with_the_same_content_alone(search, folder, tmp_path):
    search(folder).close()
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    search(elsewhere).close()
    write_weights(elsewhere / f"{MEDIUM}.pth", MEDIUM, seed=1)
    with pytest.raises(
        UserError, match=rf"--study study: it was begun with something else \(config.weights of {MEDIUM}"
    ):
        search(elsewhere)
