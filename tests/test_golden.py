"""Our networks, losses, gradients, activation maps and scores against the golden numbers.

The numbers come from random small models: 4 heads, patch 8; all other sizes are read from the arrays. Weights arrive as
a user's file would: a .pth under the published names.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models import VisionTransformer

from semformer import losses, random_walk
from semformer.config import (
    AffinityConfig,
    CaaeConfig,
    CamsConfig,
    DeeplabConfig,
    PseudoMasksConfig,
    SegmentationConfig,
    SegmentorConfig,
)
from semformer.crf import DenseCrf
from semformer.data.augment import valid_mask
from semformer.data.loading import Batch
from semformer.inference import multi_scale_maps
from semformer.losses import Pairs, similarity
from semformer.metrics import ThresholdCurve
from semformer.models.caae import CAAE
from semformer.models.segmentor import Segmentor
from semformer.models.vit import Backbone
from semformer.stages import affinity as affinity_stage
from semformer.stages import caae as caae_stage
from semformer.stages import deeplab as deeplab_stage
from semformer.stages import segmentor as segmentor_stage
from semformer.stages.affinity import Kinds
from semformer.stages.training import build_optimizer, lr_factor, set_rates
from semformer.weights import load_published, published_to_ours

TOLERANCE = {"atol": 1e-4, "rtol": 0}


def close(ours, theirs) -> None:
    torch.testing.assert_close(torch.as_tensor(ours).detach(), torch.as_tensor(theirs), check_dtype=False, **TOLERANCE)


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in arrays.items()}


def state_file(numbers: dict[str, torch.Tensor], folder, name: str):
    path = folder / f"{name}.pth"
    torch.save({k.removeprefix("state."): v for k, v in numbers.items() if k.startswith("state.")}, path)
    return path


def backbone(numbers: dict[str, torch.Tensor], prefix: str) -> Backbone:
    patch = numbers[f"{prefix}.model.patch_embed.proj.weight"]
    grid = round(numbers[f"{prefix}.grid_posembed"].shape[1] ** 0.5)
    depth = 1 + max(int(k.split("blocks.")[1].split(".")[0]) for k in numbers if k.startswith(f"{prefix}.model.blocks"))
    P = patch.shape[-1]
    return Backbone(VisionTransformer(grid * P, P, embed_dim=patch.shape[0], depth=depth, num_heads=4, num_classes=0))


def build_caae(numbers: dict[str, torch.Tensor], folder, merge: str = "sum") -> CAAE:
    K, D = numbers["state.crs.0.weight"].shape
    blocks = [k for k in numbers if k.startswith("state.decoder.blocks") and k.endswith("norm1.weight")]
    model = CAAE(
        backbone(numbers, "state.encoder.vit_backbone"),
        n_classes=K,
        class_dim=D,
        merge=merge,
        decoder_depth=len(blocks),
        decoder_width=len(numbers["state.mlp.bias"]),
    )
    load_published(model, "caae", state_file(numbers, folder, "caae"))
    return model.eval()


def build_segmentor(numbers: dict[str, torch.Tensor], folder) -> Segmentor:
    K, _, D = numbers["state.segmentor.cls_head.weight"].shape
    model = Segmentor(backbone(numbers, "state.segmentor.backbone"), n_classes=K, class_dim=D, token_dropout=0.5)
    load_published(model, "segmentor", state_file(numbers, folder, "segmentor"))
    return model.eval()


@pytest.fixture
def caae_numbers(golden):
    return tensors(golden("caae"))


@pytest.fixture
def numbers(golden):
    return tensors(golden("segmentation"))


@pytest.fixture
def segmentor(numbers, tmp_path):
    return build_segmentor(numbers, tmp_path)


@pytest.fixture
def guide(caae_numbers, tmp_path):
    return build_caae(caae_numbers, tmp_path).requires_grad_(False)


@pytest.mark.parametrize("merge", ["sum", "mean", "max"])
def test_caae_forward_and_losses(caae_numbers, tmp_path, merge):
    model = build_caae(caae_numbers, tmp_path, merge)
    images, Y = caae_numbers["images"], caae_numbers["labels"]
    E, images_recon = model(images)
    terms = caae_stage.loss_terms(model, images, Y)
    close(E, caae_numbers[f"{merge}.class_embeddings"])
    close(similarity(E, model.semantics), caae_numbers[f"{merge}.similarity"])
    close(terms["SS"], caae_numbers[f"{merge}.loss_ss"])
    close(terms["recon"], caae_numbers[f"{merge}.loss_recon"])
    close(model.semantics, caae_numbers["class_semantics"])
    close(images_recon, caae_numbers["recon"])


def test_caae_gradients(caae_numbers, tmp_path):
    model = build_caae(caae_numbers, tmp_path)
    caae_stage.loss_terms(model, caae_numbers["images"], caae_numbers["labels"])["total"].backward()
    close(model.semantics_weight.grad, caae_numbers["grad.crs.0.weight"])
    close(model.primary.weight.grad, caae_numbers["grad.convert.0.weight"])


def test_valid_masks_follow_from_crop_regions(numbers):
    valid = numbers["valid_masks"]
    close(valid_mask(numbers["crop_regions"], numbers["images"].shape[-1], valid.shape[-1]), valid)


def test_activation_maps_and_pair_similarities(numbers, segmentor, guide):
    images, Y, valid = numbers["images"], numbers["labels"], numbers["valid_masks"]
    logits, E, _ = segmentor(images)
    M = segmentor_stage.activation_maps(logits, valid)
    close(M, numbers["activation_maps"])
    close(similarity(E, guide.semantics), numbers["similarity"])

    pairs = Pairs.of(Y)
    I = F.interpolate(images, size=valid.shape[-2:], mode="bilinear", align_corners=True)  # noqa: E741
    M_pairs = M[pairs.image, pairs.own, None]
    for name, weight in (("fg", M_pairs), ("bg", 1 - M_pairs)):
        sim = similarity(guide.embed(weight * I[pairs.image]), guide.semantics)
        close(sim.gather(1, pairs.own[:, None])[:, 0], numbers[f"sim_{name}_own"])
        close(sim[pairs.others], numbers[f"sim_{name}_other"])


def test_segmentation_losses_and_gradients(numbers, segmentor, guide):
    terms = segmentor_stage.loss_terms(
        segmentor,
        guide,
        SegmentorConfig(),
        Batch(numbers["images"], numbers["crop_regions"], numbers["labels"]),
        caae_size=numbers["valid_masks"].shape[-1],
    )
    sigma = SegmentorConfig().sigma
    for name in ("CF", "CB", "AC", "SS"):
        close(terms[name], numbers[f"loss_{name.lower()}"])
    close(terms["AS"] / sigma, numbers["loss_as"])
    close(terms["total"], numbers["loss_total"])

    terms["total"].backward()
    close(segmentor.patch_head.weight.grad, numbers["grad.segmentor.seg_head.1.weight"])
    close(segmentor.class_head_weight.grad, numbers["grad.segmentor.cls_head.weight"])
    close(segmentor.class_tokens.grad, numbers["grad.segmentor.cls_token"])
    qkv = "grad.segmentor.backbone.model.blocks.0.attn.qkv.weight"
    close(segmentor.backbone.blocks[0].attn.qkv.weight.grad, numbers[qkv])


@pytest.mark.parametrize("kind", ["caae", "segmentation"])
def test_optimizer_groups_and_schedule_of_five_steps(golden, tmp_path, kind):
    """At step t = 0..4 the gradient of a parameter's i-th element is 0.1 * cos(0.37 * i + t); ten steps are planned."""
    numbers, options = tensors(golden("optimizer")), {"caae": CaaeConfig(), "segmentation": SegmentorConfig()}[kind]
    build = {"caae": build_caae, "segmentation": build_segmentor}[kind]
    model = build(tensors(golden(kind)), tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = build_optimizer(model, options.optimizer, model.encoder if kind == "caae" else model.backbone)
    for t in range(5):
        set_rates(optimizer, lr_factor(t, 10, options.optimizer))
        for parameter in model.parameters():
            i = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.grad = (0.1 * torch.cos(0.37 * i + t)).float().view_as(parameter)
        optimizer.step()
    published = {k.removeprefix(f"{kind}."): v for k, v in numbers.items() if k.startswith(f"{kind}.")}
    theirs = published_to_ours("caae" if kind == "caae" else "segmentor", published)
    for name, value in model.state_dict().items():
        assert not torch.equal(value, before[name]), name
        if name in theirs:
            torch.testing.assert_close(value, theirs[name], atol=1e-6, rtol=0, msg=name)
    assert {name for name in before if "blocks." not in name or "blocks.0." in name} == theirs.keys()


def test_losses_one_by_one(numbers, segmentor, guide):
    """Each public function of losses.py, from golden inputs where there are some."""
    Y, M, valid = numbers["labels"], numbers["activation_maps"], numbers["valid_masks"]
    close(losses.activation_suppression(M, 1.0), numbers["loss_as"])
    close(losses.activation_complementation(M, Y, valid), numbers["loss_ac"])
    close(losses.semantic_similarity(numbers["similarity"], Y), numbers["loss_ss"])
    pairs = Pairs.of(Y)
    for name, loss in (("fg", losses.class_foreground), ("bg", losses.class_background)):
        sim = torch.zeros(len(pairs.own), Y.shape[1])
        sim[torch.arange(len(sim)), pairs.own] = numbers[f"sim_{name}_own"]
        sim[pairs.others] = numbers[f"sim_{name}_other"]
        close(loss(sim, pairs), numbers["loss_cf" if name == "fg" else "loss_cb"])


def test_logits_and_class_to_patch_attention_of_another_image_size(numbers, segmentor):
    depth = len(segmentor.backbone.blocks)
    logits, _, attention = segmentor(numbers["eval.images"], last_blocks=depth)
    close(logits, numbers["eval.logits"])
    for block in range(depth):
        close(attention[block], numbers[f"eval.class_to_patch_attention.{block}"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("U1", CamsConfig(last_blocks=1)),
        ("U4", CamsConfig(last_blocks=4)),
        ("no_cra", CamsConfig(final_map="activation")),
    ],
)
def test_multi_scale_maps(golden, segmentor, name, options):
    numbers = golden("cam_inference")
    (maps,) = multi_scale_maps(segmentor, [numbers["image"]], [numbers["object_classes"] + 1], options)
    close(maps.strided, numbers[f"{name}.strided_cam"])
    close(maps.full, numbers[f"{name}.cam"])


@pytest.mark.parametrize(("name", "erosion"), [("plain", 0), ("eroded", 7)])
def test_scores_at_all_thresholds(golden, name, erosion):
    numbers = golden("metrics")
    K = numbers[f"{name}.iou"].shape[1]
    curve = ThresholdCurve(K, numbers["thresholds"], erosion=erosion)
    for i in range(sum(key.startswith("gt.") for key in numbers)):
        curve.add(numbers[f"cam.{i}"], numbers[f"keys.{i}"][1:], numbers[f"gt.{i}"])
    scores = curve.scores()
    for part in ("miou", "fp", "fn", "iou"):
        close(getattr(scores, part), numbers[f"{name}.{part}"])


# AffinityNet, random walk, CRF, ResNet38


@pytest.mark.parametrize("radius", [4, 5])
def test_affinities_and_labels_of_pairs(golden, radius):
    """Theirs are listed by first pixel and by pair, ours lie on the grid of first pixels."""
    numbers = {
        name.removeprefix(f"r{radius}."): value
        for name, value in tensors(golden("affinity")).items()
        if name.startswith(f"r{radius}.")
    }
    H, W = numbers["label"].shape
    offsets = numbers["dst_index"][:, 0] - numbers["src_index"][0]
    ours = [dy * W + dx for dy, dx in random_walk.neighbours(radius)]
    assert sorted(ours) == sorted(offsets.tolist())
    order = [ours.index(offset) for offset in offsets.tolist()]

    index = torch.arange(H * W).view(H, W)
    assert torch.equal(random_walk.shifted(index, radius, 0, 0).flatten(), numbers["src_index"])
    assert torch.equal(random_walk.seconds(index, radius)[order].flatten(1), numbers["dst_index"])
    close(random_walk.edge_affinities(numbers["edge"][:, 0], radius)[:, order].flatten(2), numbers["affinity"])
    kinds = Kinds.of(numbers["label"][None], radius)
    for ours_of_kind, name in zip(kinds, ("bg_pos", "fg_pos", "neg"), strict=True):
        assert torch.equal(ours_of_kind[0, order].flatten(1), numbers[name])


@pytest.mark.parametrize(("beta", "exponent"), [(10, 8), (8, 6)])
def test_random_walk(golden, beta, exponent):
    """To 1e-4 of the largest value. The published float32 powers are themselves about as far from those in float64."""
    numbers = tensors(golden("affinity"))
    walked = random_walk.along_edges(
        numbers["walk.cam"][None], numbers["walk.edge"], radius=5, beta=beta, steps=2**exponent
    )
    theirs = numbers[f"walk.result_beta{beta}_exp{exponent}"][:, 0]
    torch.testing.assert_close(walked[0], theirs, atol=1e-4 * theirs.max().item(), rtol=0)


@pytest.mark.parametrize("iterations", [1, 10])
def test_crf_of_hard_labels(golden, iterations):
    numbers = tensors(golden("crf"))
    labels = numbers["label"].long()
    field = DenseCrf(
        numbers["image"].permute(2, 0, 1), PseudoMasksConfig().crf.model_copy(update={"iterations": iterations})
    )
    agreed = field.refine_labels(labels, int(labels.max()) + 1) == numbers[f"label_refined_t{iterations}"]
    assert agreed.float().mean() > 0.995


def test_crf_of_probabilities(golden):
    numbers = tensors(golden("crf"))
    field = DenseCrf(numbers["image"].permute(2, 0, 1), SegmentationConfig().crf)
    torch.testing.assert_close(field.refine(numbers["probs"]), numbers["probs_refined_t10"], atol=1e-3, rtol=0)


def test_resnet38_has_the_usual_names_and_shapes():
    told = json.loads((Path(__file__).parent / "golden" / "resnet38_state_shapes.json").read_text())
    model = deeplab_stage.build(DeeplabConfig(pretrained=False), n_classes=21)
    ours = {name: list(value.shape) for name, value in model.state_dict().items()}
    renamed = published_to_ours("deeplab", {name: name for name in told["deeplab_v1_resnet38"]})
    assert {name: told["deeplab_v1_resnet38"][theirs] for name, theirs in renamed.items()} == ours
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(
        told["notes"]["deeplab_parameters_millions"], abs=1e-3
    )
    affinity = affinity_stage.build(AffinityConfig(variant="feature", backbone="resnet38", pretrained=False))
    extra = {name: list(value.shape) for name, value in affinity.state_dict().items() if "features." not in name}
    shapes = sorted(extra.values())
    assert shapes == sorted(told["affinitynet_resnet38_extra"].values())
