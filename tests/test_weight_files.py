"""Files of weights that a network starts from: which part they are of, and what happens when they change."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from semformer.config import load_config
from semformer.errors import UserError
from semformer.models.vit import build_vit
from semformer.store import Store
from semformer.weights import read_weights
from tests.pipelines import run, weights


def test_nothing_is_kept_of_weights_that_changed_meanwhile(finished, shapes, tmp_path):
    store, file = Store(tmp_path / "store"), tmp_path / "weights.safetensors"
    vit = build_vit("vit_wiring_patch8_48", pretrained=False, weights="", num_classes=0)
    save_file(vit.state_dict(), file)
    config = load_config("micro", {"segmentor.weights": str(file)})

    def replace(report):
        if report.stage == "caae":
            save_file({name: value + 1 for name, value in vit.state_dict().items()}, file)

    with pytest.raises(UserError, match=r"weights.safetensors has changed since this run began: start it again"):
        run(config, shapes, store, replace)
    assert not (store.root / "segmentor").exists()
    assert not list((store.root / "checkpoints").glob("segmentor/*/*")), "which a later run would go on from"
    assert run(config, shapes, store)["segmentor"].artifact.info["history"]


def test_a_file_that_changes_once_it_has_been_read_costs_no_training(shapes, tmp_path):
    store, file = Store(tmp_path / "store"), tmp_path / "weights.safetensors"
    vit = build_vit("vit_wiring_patch8_48", pretrained=False, weights="", num_classes=0)
    save_file(vit.state_dict(), file)
    trained = run(
        load_config("micro", {"segmentor.weights": str(file)}),
        shapes,
        store,
        lambda report: report.stage == "segmentor" and file.write_bytes(b"others'"),
    )
    assert not trained["segmentor"].found


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("source", ["weights", "checkpoint"])
@pytest.mark.parametrize("stage", ["caae", "segmentor"])
def test_a_file_that_changes_while_it_is_read_is_not_trained_from(shapes, tmp_path, monkeypatch, stage, source, gone):
    file, trained, read = tmp_path / "w.safetensors", [], read_weights
    backbone = getattr(load_config("micro"), stage).backbone
    save_file(build_vit(backbone, pretrained=False, weights="", num_classes=0).state_dict(), file)

    def reading(path):
        state = read(path)
        path.unlink()  # the tensors are still those of the file that was there
        if not gone:
            path.write_bytes(b"others'")
        return state

    monkeypatch.setattr("semformer.models.vit.read_weights", reading)
    monkeypatch.setattr(f"semformer.stages.{stage}.load_published", lambda model, kind, path: reading(Path(path)))
    store = Store(tmp_path / "store")
    with pytest.raises(UserError, match=r"w\.safetensors has changed since this run began: start it again"):
        run(load_config("micro", {f"{stage}.{source}": str(file)}), shapes, store, trained.append, until=stage)
    assert stage not in {report.stage for report in trained}
    assert not (store.root / stage).exists()


@pytest.mark.parametrize(
    ("stage", "pretrained", "new"),
    [
        ("caae", "encoder.blocks.0.attn.qkv.weight", "primary.weight"),
        ("segmentor", "backbone.blocks.0.attn.qkv.weight", "patch_head.weight"),
    ],
)
def test_the_backbone_of_each_network_is_what_counts_as_pretrained(shapes, tmp_path, stage, pretrained, new):
    options = load_config("micro")
    backbone = getattr(options, stage).backbone
    save_file(build_vit(backbone, pretrained=False, weights="", num_classes=0).state_dict(), file := tmp_path / "w")
    file = file.rename(tmp_path / "w.safetensors")
    ended = []
    for lr in (1e-3, 3e-3):
        rates = {"name": "sgd", "lr": lr, "momentum": 0, "weight_decay": 0, "new_multiplier": 1e-12}
        changes = {f"{stage}.weights": str(file), f"{stage}.optimizer": rates, f"{stage}.epochs": 1}
        ended.append(weights(run(load_config("micro", changes), shapes, Store(tmp_path / "store"), until=stage)[stage]))
    assert torch.equal(ended[0][new], ended[1][new])
    assert not torch.equal(ended[0][pretrained], ended[1][pretrained])
