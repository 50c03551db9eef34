"""Networks from files under the published names, and the maps of one's own images."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from semformer import pipeline
from semformer.cli import main
from semformer.config import load_config
from semformer.draw import figure4
from semformer.errors import UserError
from semformer.inference import maps_of_every_kind
from semformer.predict import draw_maps, network_by_key
from semformer.stages import segmentor
from semformer.store import Store
from semformer.weights import load_state, read_weights
from tests.devkits import refused
from tests.pipelines import CPU, damage, run, weights


def to_published(kind: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our micro weights under the names of a published file, with some that the method does not use."""
    vit = {"caae": ("encoder.", "encoder.vit_backbone."), "segmentor": ("backbone.", "segmentor.backbone.")}[kind]
    heads = {
        "caae": {
            "primary.weight": "convert.0.weight",
            "semantics_weight": "crs.0.weight",
            "decoder.recover.": "re_convert.0.",
            "decoder.recover_norm.": "re_convert.1.",
            "decoder.embed.": "mlp.",
            "decoder.project.": "decoder.mlp.",
        },
        "segmentor": {
            "class_tokens": "segmentor.cls_token",
            "class_positions": "segmentor.cls_posembed",
            "class_head_": "segmentor.cls_head.",
            "patch_head.": "segmentor.seg_head.1.",
        },
    }[kind]
    published = {f"module.{vit[1]}model.cls_token": torch.zeros(1, 1, 24)}
    for name, value in state.items():
        if name.startswith(vit[0]):
            inner = name.removeprefix(vit[0]).replace("patch_embed.", "patch_embed.proj.")
            name = vit[1] + ("grid_posembed" if inner == "pos_embed" else f"model.{inner}")
        else:
            for ours, theirs in heads.items():
                name = name.replace(ours, theirs) if name.startswith(ours) else name
        published[f"module.{name}"] = value
    return published


@pytest.mark.parametrize("kind", ["caae", "segmentor"])
def test_import_checkpoint_gives_the_same_weights_and_they_are_used(finished, shapes, tmp_path, kind, capsys):
    _, trained = finished
    file = tmp_path / f"{kind}.pth"
    torch.save(to_published(kind, weights(trained[kind])), file)
    arguments = ["--preset", "micro", "--data", str(shapes), "--store", str(tmp_path / "store")]
    assert main(["import-checkpoint", str(file), "--kind", kind, *arguments]) == 0
    assert main(["run", *arguments, "--set", f"{kind}.checkpoint={file}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["metrics"] == trained["evaluate"].artifact.info["metrics"]
    found = {stage["stage"]: stage["found"] for stage in result["stages"]}
    assert found[kind] is True
    assert ("caae" in found) is (kind == "caae"), "an imported segmentation network needs no CAAE"


def test_checkpoint_of_another_architecture_names_what_does_not_fit(finished, shapes, tmp_path, capsys):
    _, trained = finished
    file = tmp_path / "caae.pth"
    torch.save(to_published("caae", weights(trained["caae"])), file)
    arguments = ["--preset", "micro", "--data", str(shapes), "--store", str(tmp_path / "store")]
    assert main(["import-checkpoint", str(file), "--kind", "caae", "--set", "caae.class_dim=4", *arguments]) == 2
    assert "another architecture" in capsys.readouterr().err
    assert main(["import-checkpoint", str(file), "--kind", "segmentor", *arguments]) == 2
    assert "is this file of another kind?" in " ".join(capsys.readouterr().err.split())


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_that_hold_no_weights_are_named_and_none_of_their_code_is_run(tmp_path):
    (file := tmp_path / "network.pth").write_bytes(b"no tensors")
    with pytest.raises(
        UserError, match=f"^cannot read weights from {re.escape(str(file))}: [^(]*$"
    ):  # no advice to run it
        read_weights(file)
    for what in ({}, [torch.zeros(1)], {"epoch": 3}):
        torch.save(what, file)
        refused(lambda: read_weights(file), f"{file} holds no dictionary of tensors by name")
    torch.save({"w": torch.zeros(1), "code": Touch(tmp_path / "run")}, file)
    refused(lambda: read_weights(file), f"cannot read weights from {file}")
    assert not (tmp_path / "run").exists()
    for name in ("none.pth", "none.safetensors"):
        refused(lambda name=name: read_weights(tmp_path / name), f"no weights file {tmp_path / name}")


@pytest.mark.parametrize("wrappers", [(), ("model",), ("state_dict",), ("state_dict", "model")])
def test_weights_are_found_where_trainings_put_them(tmp_path, wrappers):
    state = {"module.w": torch.arange(3.0)}
    for name in wrappers:
        state = {name: state, "epoch": 3}
    torch.save(state, file := tmp_path / "network.pth")
    torch.testing.assert_close(read_weights(file), {"w": torch.arange(3.0)})


def test_a_weight_that_the_network_has_no_place_for_is_named():
    state = torch.nn.Linear(2, 2).state_dict() | {"scale": torch.ones(1)}
    with pytest.raises(UserError, match=r"w\.pth is of another architecture: it has scale, which the config has no"):
        load_state(torch.nn.Linear(2, 2), state, "w.pth")


def test_a_trained_network_needs_no_more_the_files_that_it_started_from(shapes, tmp_path):
    files = {name: tmp_path / f"{name}.pth" for name in ("caae", "segmentor")}
    micro = load_config("micro")
    for name, file in files.items():
        torch.save(timm.create_model(getattr(micro, name).backbone).state_dict(), file)
    config = load_config("micro", {f"{name}.weights": str(file) for name, file in files.items()})
    store = Store(tmp_path / "store")
    key = run(config, shapes, store, until="segmentor")["segmentor"].key
    for file in files.values():
        file.unlink()
    image = str(shapes / "VOC2012" / "JPEGImages" / "val_000000.jpg")
    command = ["predict", image, "--network", key, "--store", str(store.root), "--out", str(tmp_path / "maps")]
    assert main([*command, "--preset", "micro"]) == 0


def test_predict_draws_the_contour_of_the_fixed_threshold(finished, shapes, tmp_path):
    (store, runs), path = finished, shapes / "VOC2012" / "JPEGImages" / "val_000000.jpg"
    network = network_by_key(runs["evaluate"].key, load_config("micro"), store)
    (drawn,) = draw_maps(network, [path], "star,disc", tmp_path, CPU)
    model = segmentor.load(network.config.segmentor, network.segmentor, device=CPU)
    image, classes = np.array(Image.open(path)), [network.classes.index(name) for name in ("disc", "star")]
    maps = maps_of_every_kind(model, image, classes, network.config.cams, precision="float32")
    maps = {kind: one.numpy() for kind, one in maps.items()}
    with Image.open(drawn.picture) as picture:
        assert np.array_equal(picture, figure4(image, maps, classes, network.classes, threshold=0.25))


def test_predict_draws_a_picture_per_image(finished, shapes, tmp_path):
    store, _ = finished
    image = shapes / "VOC2012" / "JPEGImages" / "val_000000.jpg"
    common = ["--preset", "micro", "--data", str(shapes), "--store", str(store.root), "--out", str(tmp_path)]
    assert main(["predict", str(image), "--classes", "star,disc", *common]) == 0
    assert (tmp_path / "val_000000.png").stat().st_size > 1000
    assert main(["predict", str(image), *common]) == 0
    for name in ("dragon", "background"):
        assert main(["predict", str(image), "--classes", name, *common]) == 2


def test_predict_touches_no_image_and_gives_each_its_own_picture(finished, tmp_path, capsys):
    store, runs = finished
    photo, other = tmp_path / "photo.png", tmp_path / "other" / "photo.jpg"
    other.parent.mkdir()
    for path in (photo, other):
        Image.new("RGB", (60, 40), "red").save(path)
    before = photo.read_bytes()
    network = ["--network", runs["segmentor"].key, "--store", str(store.root), "--classes", "disc"]
    for images, out in (([photo], tmp_path), ([photo, other], tmp_path / "out")):
        assert main(["predict", *map(str, images), "--out", str(out), *network]) == 2
        assert "where another is or will be. Choose another --out" in " ".join(capsys.readouterr().err.split())
    assert photo.read_bytes() == before
    assert not (tmp_path / "out").exists()
    (tmp_path / "out" / "photo.png").mkdir(parents=True)
    assert main(["predict", str(photo), "--out", str(tmp_path / "out"), *network]) == 2
    assert "photo.png cannot be written: Is a directory" in " ".join(capsys.readouterr().err.split())


def test_predict_takes_what_is_named_twice_once(finished, tmp_path, capsys):
    store, runs = finished
    Image.new("RGB", (60, 40), "red").save(photo := tmp_path / "photo.png")
    network = ["--network", runs["segmentor"].key, "--store", str(store.root), "--classes", "star,disc,star"]
    assert main(["predict", str(photo), str(photo), "--out", str(tmp_path / "out"), *network]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("photo.png: disc, star ->") == 1, told


@pytest.mark.parametrize(("size", "seen"), [((600, 150), "60x15"), ((60, 50), ""), ((1, 1), ""), ((1, 60), "")])
def test_predict_shrinks_what_is_larger_than_anything_trained_on_and_says_so(finished, tmp_path, capsys, size, seen):
    store, runs = finished
    photo = tmp_path / "photo.jpg"
    Image.new("RGB", size, "red").save(photo)
    network = ["--network", runs["segmentor"].key, "--store", str(store.root), "--classes", "disc"]
    assert main(["predict", str(photo), "--out", str(tmp_path / "out"), *network]) == 0
    told = " ".join("".join(capsys.readouterr()).split())
    wanted = f"{size[0]}x{size[1]} pixels, shrunk to {seen}: the network was trained on at most 60"
    assert (wanted in told) == bool(seen)


def test_predict_takes_a_network_by_its_key_without_the_data(finished, tmp_path, capsys):
    """As whoever has a trial's key from MLflow, or from a registered version, and the store."""
    store, runs = finished
    image = tmp_path / "photo.png"
    Image.new("RGB", (70, 50), "red").save(image)
    arguments = ["predict", str(image), "--store", str(store.root), "--network"]
    for stage in ("segmentor", "evaluate"):
        assert main([*arguments, runs[stage].key[:16], "--out", str(tmp_path / stage)]) == 0
        assert (tmp_path / stage / "photo.png").stat().st_size > 1000
    assert main([*arguments, "0123"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "--network 0123: in " in told
    assert "no segmentation network, maps or scores have a key that begins so" in told


def test_a_network_by_a_trial_s_key_has_the_options_of_the_trial_and_by_its_own_those_that_are_given(finished):
    store, runs = finished
    made, given = load_config("micro"), load_config("paper")
    by_trial, by_network = (network_by_key(runs[stage].key, given, store) for stage in ("evaluate", "segmentor"))
    for network in (by_trial, by_network):
        assert (network.config.segmentor, network.config.precision) == (made.segmentor, made.precision)
    assert (by_trial.config.cams, by_trial.config.evaluate) == (made.cams, made.evaluate)
    assert (by_network.config.cams, by_network.config.evaluate) == (given.cams, given.evaluate)
    with pytest.raises(UserError, match="several stages have a key that begins so"):
        network_by_key("", given, store)


def test_predict_by_a_key_that_leads_nowhere_says_where_it_ends(finished, tmp_path, capsys):
    store = Store(shutil.copytree(finished[0].root, tmp_path / "store"))
    runs = finished[1]

    def told(stage, *options) -> str:
        key = runs[stage].key[:20].upper()
        image = tmp_path / "photo.png"
        Image.new("RGB", (70, 50)).save(image)
        assert main(["predict", str(image), "--network", key, "--store", str(store.root), *options]) == 2
        return " ".join(capsys.readouterr().err.split())

    (tmp_path / "file").touch()
    assert "cannot be a folder" in told("segmentor", "--out", str(tmp_path / "file"))
    shutil.rmtree(store.root / "caae")
    assert "name the --classes in the images" in told("segmentor", "--out", str(tmp_path / "out"))
    shutil.rmtree(store.root / "cams")
    assert "its cams has gone from" in told("evaluate")
    damage(store, runs["segmentor"], "segmentor.safetensors")
    assert "its segmentor has gone from" in told("segmentor")


def test_predict_with_an_imported_network_needs_no_images(finished, shapes, tmp_path, capsys, monkeypatch):
    file = tmp_path / "segmentor.pth"
    torch.save(to_published("segmentor", weights(finished[1]["segmentor"])), file)
    store = ["--preset", "micro", "--store", str(tmp_path / "store")]
    assert main(["import-checkpoint", str(file), "--kind", "segmentor", "--data", str(shapes), *store]) == 0
    monkeypatch.setattr(pipeline, "open_data", lambda *_: pytest.fail("images were looked for"))
    arguments = ["predict", str(shapes / "VOC2012/JPEGImages/val_000000.jpg"), *store, "--out", str(tmp_path / "maps")]
    arguments += ["--set", f"segmentor.checkpoint={file}"]
    assert main([*arguments, "--classes", "disc"]) == 0
    assert main(arguments) == 2
    assert "name the --classes in the images" in " ".join(capsys.readouterr().err.split())


def test_an_import_needs_no_images(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "open_data", lambda *_: pytest.fail("images were looked for"))
    file = tmp_path / "caae.pth"
    torch.save(to_published("caae", weights(finished[1]["caae"])), file)
    fields = ("backbone", "image_size", "class_dim", "decoder_depth", "decoder_width")
    micro = load_config("micro").caae
    same = [f"--set=caae.{name}={getattr(micro, name)}" for name in fields]
    command = ["import-checkpoint", str(file), "--kind", "caae", "--store", str(tmp_path / "store")]
    assert main([*command, "--preset", "paper", *same]) == 2
    assert "another architecture" in capsys.readouterr().err, "VOC has 21 classes"
    assert main([*command, "--preset", "micro"]) == 0


def test_predict_without_a_trained_network_says_how_to_get_one(shapes, tmp_path, capsys):
    arguments = ["--preset", "micro", "--data", str(shapes), "--store", str(tmp_path / "empty")]
    assert main(["predict", "photo.jpg", *arguments]) == 2
    assert "semformer run" in capsys.readouterr().err
