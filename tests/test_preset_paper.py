"""Preset paper: every default beside where the number comes from, and the real networks on real photographs."""

from pathlib import Path

import pytest
import torch

from semformer import pipeline
from semformer.config import flatten, load_config
from semformer.store import Store
from tests.devkits import few_photographs

SAMPLE = Path(__file__).parents[2] / "shared" / "coco_sample" / "VOCdevkit" / "VOC2012"

DEFAULTS = [
    # field, value, where it stands: the paper's sections and tables, or the published code
    ("seed", 0, "ours"),
    ("precision", "bfloat16", "ours; published: float32"),
    ("data.train_split", "trainaug", "4.1"),
    ("data.eval_split", "train", "4.1: maps are measured on train"),
    ("data.selection_split", "train", "published code: the 1,464 images of train"),
    ("data.shapes", None, "VOC has to be given"),
    ("caae.backbone", "deit_base_distilled_patch16_224", "4.1, Table 6"),
    ("caae.pretrained", True, "4.1"),
    ("caae.weights", "", "a download"),
    ("caae.checkpoint", "", "it is trained"),
    ("caae.image_size", 224, "4.1"),
    ("caae.epochs", 200, "4.1"),
    ("caae.batch_size", 64, "4.1"),
    ("caae.class_dim", 256, "Table 8"),
    ("caae.merge", "sum", "Table 5"),
    ("caae.decoder_depth", 8, "Table 7"),
    ("caae.decoder_width", 768, "Table 10"),
    ("caae.reconstruction", True, "Eq. 4, Tables 11, 14"),
    ("caae.compile", False, "ours"),
    ("caae.color_jitter", [0.3, 0.3, 0.3, 0.1], "published code"),
    ("caae.enlarge", [1.0, 3.0], "published code"),
    ("caae.crop_area", [0.08, 1.0], "published code"),
    ("caae.selection", "best_ap", "published code"),
    ("segmentor.backbone", "deit_small_patch16_224", "4.1"),
    ("segmentor.pretrained", True, "4.1"),
    ("segmentor.weights", "", "a download"),
    ("segmentor.checkpoint", "", "it is trained"),
    ("segmentor.image_size", 448, "4.1"),
    ("segmentor.epochs", 20, "4.1"),
    ("segmentor.batch_size", 8, "4.1"),
    ("segmentor.compile", False, "ours"),
    ("segmentor.color_jitter", [0.3, 0.3, 0.3, 0.1], "published code"),
    ("segmentor.losses", ["CF", "CB", "AS", "AC", "SS"], "Eq. 13"),
    ("segmentor.sigma", 0.075, "Table 17"),
    ("segmentor.pair_reduction", "batch", "published code"),
    ("segmentor.suppress", "objects", "published code"),
    ("segmentor.complement", "present", "published code"),
    ("segmentor.token_dropout", 0.5, "published code"),
    ("segmentor.long_side", [224, 896], "published code"),
    ("segmentor.selection", "last", "ours, without pixel masks; published: best_miou"),
    ("cams.scales", [0.5, 1.0, 1.5, 2.0], "4.1, published code"),
    ("cams.flip", True, "published code"),
    ("cams.final_map", "both", "Table 16"),
    ("cams.last_blocks", 4, "Table 13"),
    ("evaluate.thresholds", [0.1, 0.4, 0.01], "published code"),
    ("evaluate.rule", "oracle", "published code"),
    ("evaluate.fixed_threshold", 0.25, "published code: of the pseudo masks"),
    ("evaluate.erosion", 7, "published code"),
    ("evaluate.pictures", 4, "ours"),
    ("data.mask_split", "train", "4.2: pseudo masks are measured on train"),
    ("data.test_split", "val", "4.2"),
    ("cams.folder", "", "they are made"),
    ("affinity_labels.foreground_threshold", 0.11, "published code"),
    ("affinity_labels.background_threshold", 0.15, "published code"),
    ("affinity.variant", "edge", "published code"),
    ("affinity.backbone", "resnet50", "published code"),
    ("affinity.pretrained", True, "published code"),
    ("affinity.weights", "", "a download"),
    ("affinity.frozen", True, "published code"),
    ("affinity.image_size", 512, "published code"),
    ("affinity.epochs", 3, "published code"),
    ("affinity.batch_size", 32, "published code"),
    ("affinity.compile", False, "ours"),
    ("affinity.color_jitter", [0.3, 0.3, 0.3, 0.1], "published code"),
    ("affinity.long_side", [320, 640], "published code"),
    ("affinity.radius", 10, "published code"),
    ("affinity.optimizer.lr", 0.1, "published code"),
    ("affinity.optimizer.momentum", 1e-4, "published code: the same slip"),
    ("affinity.optimizer.weight_decay", 1e-4, "published code"),
    ("affinity.optimizer.new_multiplier", 1.0, "published code"),
    ("affinity.optimizer.bias_multiplier", 1.0, "published code"),
    ("walk.radius", 5, "published code"),
    ("walk.beta", 10.0, "published code"),
    ("walk.log2_steps", 8, "published code"),
    ("pseudo_masks.folder", "", "they are made"),
    ("pseudo_masks.threshold", 0.25, "published code"),
    ("pseudo_masks.skip_failing", False, "ours"),
    ("deeplab.backbone", "resnet38", "4.1"),
    ("deeplab.pretrained", True, "the usual recipe"),
    ("deeplab.weights", "", "has to be given"),
    ("deeplab.checkpoint", "", "it is trained"),
    ("deeplab.image_size", 321, "the usual recipe"),
    ("deeplab.epochs", 30, "the usual recipe"),
    ("deeplab.batch_size", 4, "the usual recipe"),
    ("deeplab.compile", False, "ours"),
    ("deeplab.color_jitter", [0.3, 0.3, 0.3, 0.1], "ours, as in the other networks"),
    ("deeplab.long_side", [250, 750], "ours: half of VOC's 500 pixels to one and a half"),
    ("deeplab.head_width", 512, "the usual recipe"),
    ("deeplab.head_dilation", 12, "the usual recipe"),
    ("deeplab.frozen_statistics", True, "the usual recipe"),
    ("deeplab.supervised", False, "pseudo masks alone"),
    ("deeplab.optimizer.lr", 7e-4, "the usual recipe"),
    ("deeplab.optimizer.momentum", 0.9, "ours: the usual one"),
    ("deeplab.optimizer.weight_decay", 1e-5, "the usual recipe"),
    ("deeplab.optimizer.new_multiplier", 10.0, "the usual recipe"),
    ("deeplab.optimizer.bias_multiplier", 1.0, "the usual recipe names none"),
    ("segmentation.scales", [0.5, 0.75, 1.0, 1.25, 1.5], "the usual recipe"),
    ("segmentation.flip", False, "the usual recipe names none"),
]
for _stage, _iterations, _sxy, _srgb in (
    ("affinity_labels", 10, 50.0, 5.0),
    ("pseudo_masks", 1, 50.0, 5.0),
    ("segmentation", 10, 80.0, 13.0),
):
    DEFAULTS += [
        (f"{_stage}.crf.iterations", _iterations, "published code"),
        (f"{_stage}.crf.gt_prob", 0.7, "published code"),
        (f"{_stage}.crf.gaussian_sxy", 3.0, "published code"),
        (f"{_stage}.crf.gaussian_compat", 3.0, "published code"),
        (f"{_stage}.crf.bilateral_sxy", _sxy, "published code"),
        (f"{_stage}.crf.bilateral_srgb", _srgb, "published code"),
        (f"{_stage}.crf.bilateral_compat", 10.0, "published code"),
    ]
for _stage in ("affinity", "deeplab"):
    DEFAULTS += [
        (f"{_stage}.optimizer.name", "sgd", "published code"),
        (f"{_stage}.optimizer.power", 0.9, "published code"),
        (f"{_stage}.optimizer.warmup_steps", 0, "there is none"),
    ]
for _stage, _lr in (("caae", 0.025), ("segmentor", 0.005)):
    DEFAULTS += [
        (f"{_stage}.optimizer.name", "sgd", "4.1"),
        (f"{_stage}.optimizer.lr", _lr, "4.1"),
        (f"{_stage}.optimizer.momentum", 5e-4, "published code: a slip, in effect none"),
        (f"{_stage}.optimizer.weight_decay", 5e-4, "published code"),
        (f"{_stage}.optimizer.power", 0.9, "published code"),
        (f"{_stage}.optimizer.warmup_steps", 0, "there is none"),
        (f"{_stage}.optimizer.new_multiplier", 10.0, "published code"),
        (f"{_stage}.optimizer.bias_multiplier", 2.0, "published code"),
    ]


def test_every_default_is_the_paper_s_or_the_published_code_s():
    told = {field: value for field, value, _ in DEFAULTS}
    assert flatten(load_config("paper")) == told


def test_every_loss_has_thirty_one_thresholds():
    values = load_config("paper").evaluate.threshold_values()
    assert values == tuple(round(0.1 + 0.01 * i, 2) for i in range(31))


@pytest.fixture
def photographs(tmp_path) -> Path:
    """Four photographs to learn from and one to measure on, as VOC would give them."""
    if not SAMPLE.is_dir():
        pytest.skip("the sample of photographs is not here")
    return few_photographs(SAMPLE, tmp_path / "data", train=4, val=1)


@pytest.mark.timeout(1200)
def test_all_stages_run_at_their_real_sizes_on_real_photographs(photographs, store: Store):
    """The paper's networks with random weights, one epoch of two steps each, and one image's maps at all scales."""
    changes = {f"{stage}.{name}": value for stage in ("caae", "segmentor") for name, value in QUICK.items()}
    config = load_config("paper", changes)
    data, reports = pipeline.open_data(config, photographs), []
    runs = pipeline.run(config, data, store, device=torch.device("cpu"), progress=reports.append)
    made = {run.stage: run.artifact for run in runs}
    assert list(made) == ["caae", "segmentor", "cams", "evaluate"]
    for stage, terms in (("caae", {"SS", "recon"}), ("segmentor", {"CF", "CB", "AS", "AC", "SS"})):
        history = made[stage].info["history"]
        assert terms < set(history)
        assert all(torch.tensor(history[name]).isfinite().all() for name in terms)
    metrics = made["evaluate"].info["metrics"]
    assert 0 <= metrics["cam/train/miou"] <= 100
    assert len(made["evaluate"].files) == 4 + 1
    assert {report.stage for report in reports} == {"pack", *made}


QUICK = {"pretrained": False, "epochs": 1, "batch_size": 2}
