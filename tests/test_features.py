"""Backbones as AffinityNet and DeepLab take them: strides, weights from files, what stays frozen, what is refused."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from semformer import pipeline
from semformer.config import AffinityConfig, DeeplabConfig, load_config
from semformer.errors import UserError
from semformer.models.features import build_features, check_features
from semformer.models.resnet38 import ResNet38
from semformer.random_walk import edge_affinities
from semformer.stages import affinity, deeplab, training
from semformer.weights import load_published


def build(name: str, output_stride: int = 8, **options):
    defaults = {"pretrained": False, "weights": "", "image_size": 64, "field": "deeplab"}
    return build_features(name, output_stride=output_stride, **{**defaults, **options})


@pytest.mark.parametrize(
    ("name", "output_stride", "multiple"),
    [
        ("test_resnet", 8, 1),
        ("resnet18", 16, 1),
        ("convnext_atto", 8, 1),
        ("resnet38", 8, 1),
        ("vit_shapes_patch8_64", 8, 8),
    ],
)
def test_features_have_the_channels_and_strides_that_are_told(name, output_stride, multiple):
    features = build(name, output_stride).eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.inference_mode():
        maps = features(images)
    assert [tuple(one.shape) for one in maps] == [
        (2, C, 64 // stride, 96 // stride) for C, stride in zip(features.channels, features.strides, strict=True)
    ]
    assert features.strides[-1] == output_stride
    assert features.multiple == multiple


def test_resnet38_takes_images_of_any_size():
    with torch.inference_mode():
        assert build("resnet38").eval()(torch.rand(1, 3, 41, 35))[-1].shape == (1, 4096, 6, 5)


def test_a_gradient_reaches_every_parameter_of_resnet38():
    features = build("resnet38")
    features(torch.rand(1, 3, 16, 16))[-1].sum().backward()
    assert all(p.grad is not None for p in features.parameters())


def test_convolutions_are_dilated_unless_they_are_not_wanted_so():
    def dilations(model):
        return {module.dilation for module in model.modules() if isinstance(module, torch.nn.Conv2d)}

    assert dilations(build("resnet18", 16)) == {(1, 1), (2, 2)}
    plain = build("resnet18", 16, dilated=False)
    assert dilations(plain) == {(1, 1)}
    with torch.inference_mode():
        assert plain.eval()(torch.rand(1, 3, 64, 64))[-1].shape[2:] == (4, 4)


@pytest.mark.parametrize("name", ["resnet18", "resnet38"])
def test_a_classifiers_weights_are_taken_without_its_head(tmp_path, name):
    """As files have them: with a head, and after a conversion without the counters of BatchNorm."""
    model = ResNet38() if name == "resnet38" else timm.create_model(name)
    state = {key: value + 0 for key, value in model.state_dict().items() if "num_batches_tracked" not in key}
    if name == "resnet38":
        state["fc8.weight"] = torch.zeros(1000, 4096, 1, 1)
    torch.save(state, tmp_path / "weights.pth")
    features = build(name, weights=str(tmp_path / "weights.pth"), pretrained=True)
    own = features.backbone.state_dict()
    kept = [key for key in state if not key.startswith("fc")]
    assert len(kept) == len([key for key in own if "num_batches_tracked" not in key])
    assert all(torch.equal(own[key], state[key]) for key in kept)


def test_weights_of_another_backbone_are_refused(tmp_path):
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"weights\.safetensors, read as test_resnet, is of another architecture"):
        build("test_resnet", weights=str(tmp_path / "weights.safetensors"))


def test_what_is_frozen_does_not_change_in_training():
    features = build("test_resnet")
    norms = [module for module in features.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for what, learning, statistics in (("nothing", True, True), ("statistics", True, False), ("all", False, False)):
        features.requires_grad_(True).freeze(what).train()
        assert {module.training for module in norms} == {statistics}
        assert any(p.requires_grad for p in features.parameters()) is learning
        assert any(p.requires_grad for norm in norms for p in norm.parameters()) is statistics


@pytest.mark.parametrize(
    ("name", "output_stride", "told"),
    [
        ("resnet51", 8, r"timm .* has no model 'resnet51'; similar names: resnet"),
        (
            "mobilenetv3_small_050",
            8,
            r"mobilenetv3_small_050 is no CNN of timm .* output stride of 8",
        ),
        ("vit_tiny_patch16_224", 8, r"deeplab\.backbone vit_tiny_patch16_224 has features of stride 16, not 8"),
        ("resnet38", 16, r"deeplab\.backbone resnet38 has features of stride 8, not 16"),
    ],
)
def test_backbones_that_do_not_fit_are_refused(name, output_stride, told):
    with pytest.raises(UserError, match=told):
        check_features(name, output_stride, pretrained=False, weights="", field="deeplab")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"backbone": "convnext_atto"},
            r"has features of the strides 4, 8, 16, 16; variant edge needs 2, 4, 8",
        ),
        ({"variant": "feature", "backbone": "vit_shapes_patch8_64"}, r"the strides 8; variant feature needs 8, 8, 8"),
        ({"image_size": 500}, r"affinity\.image_size = 500 is no multiple of 16"),
        ({"image_size": 64, "radius": 9}, r"affinity\.radius = 9: .* in a map of 16x16 .*: 8 is the most"),
    ],
)
def test_networks_that_cannot_be_are_refused_before_anything_is_trained(changes, told):
    with pytest.raises(UserError, match=told):
        affinity.check(AffinityConfig(pretrained=False, **{"backbone": "resnet18", **changes}))


def test_preset_paper_says_at_once_that_resnet38_needs_a_file(devkit):
    config = load_config("paper")
    with pytest.raises(UserError, match=r"deeplab: timm has no weights of resnet38\. Give a file .* deeplab\.weights"):
        pipeline.stage_keys(config, pipeline.open_data(config, devkit), pipeline.ends(config, "deeplab"))
    with pytest.raises(UserError, match=r"deeplab\.image_size = 60 is no multiple of the patch size 8"):
        deeplab.check(DeeplabConfig(backbone="vit_shapes_patch8_64", image_size=60))


def test_masks_are_measured_on_images_that_have_some(shapes):
    config = load_config("micro", {"data.mask_split": "val"})
    with pytest.raises(UserError, match=r"data\.mask_split = val has images that have no pseudo masks, such as val_0"):
        pipeline.stage_keys(config, pipeline.open_data(config, shapes), pipeline.ends(config, "pseudo_masks"))


@pytest.mark.parametrize(("radius", "image_size"), [(8, 64), (9, 80), (2, 16)])
def test_the_largest_radius_leaves_pairs(radius, image_size):
    options = AffinityConfig(pretrained=False, backbone="resnet18", radius=radius, image_size=image_size)
    affinity.check(options)
    side = image_size // 4
    assert edge_affinities(torch.zeros(1, side, side), radius).numel()


@pytest.mark.parametrize(
    ("stage", "changes", "pieces"),
    [
        ("affinity", {"frozen": True}, 8),
        ("affinity", {"frozen": False}, 1),
        ("deeplab", {"backbone": "resnet18"}, 8),
        ("deeplab", {"backbone": "resnet18", "frozen_statistics": False}, 1),
    ],
)
def test_batches_of_a_network_whose_batchnorms_learn_are_not_divided(stage, changes, pieces):
    """Divided, they would be normalised by the statistics of their pieces."""
    module = {"affinity": affinity, "deeplab": deeplab}[stage]
    options = getattr(load_config("micro"), stage).model_copy(update={"pretrained": False, **changes})
    model = module.build(options) if stage == "affinity" else module.build(options, n_classes=3)
    assert training.most_pieces(model, 8) == pieces


def test_a_network_without_batchnorms_is_divided():
    options = load_config("micro").deeplab
    assert training.most_pieces(deeplab.build(options, n_classes=3), 8) == 8


def test_the_head_has_the_width_and_the_dilation_of_the_options():
    options = load_config("micro", {"deeplab.head_width": 5, "deeplab.head_dilation": 3}).deeplab
    model = deeplab.build(options, n_classes=4)
    for layer, channels in ((model.fc8_seg_conv1, 5), (model.fc8_seg_conv2, 4)):
        assert (layer.out_channels, layer.dilation, layer.padding) == (channels, (3, 3), (3, 3))


@pytest.mark.parametrize(
    ("stage", "rates", "decays"),
    [
        ("affinity", {"weight": 0.1, "bias": 0.1, "features.weight": 0.1, "features.bias": 0.1}, (1e-4, 1e-4)),
        ("deeplab", {"weight": 7e-3, "bias": 7e-3, "features.weight": 7e-4, "features.bias": 7e-4}, (1e-5, 0)),
    ],
)
def test_rates_and_decays_of_preset_paper(stage, rates, decays):
    """Of AffinityNet's parameters all are alike; DeepLab's new layers learn ten times as fast."""
    options = getattr(load_config("paper"), stage).model_copy(update={"pretrained": False, "backbone": "test_resnet"})
    options = options.model_copy(update={"frozen" if stage == "affinity" else "frozen_statistics": False})
    model = affinity.build(options) if stage == "affinity" else deeplab.build(options, n_classes=21)
    optimizer = training.build_optimizer(model, options.optimizer, model.features)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        kind = "weight" if name.endswith("weight") else "bias"
        rate = rates["features." * name.startswith("features.") + kind]
        group = groups[id(parameter)]
        assert (group["lr"], group["weight_decay"]) == pytest.approx((rate, decays[kind == "bias"])), name


def test_the_variant_decides_what_the_network_s_output_is():
    """And not its class, which torch.compile hides."""
    options = load_config("micro").affinity
    model, images = affinity.build(options).eval(), torch.rand(2, 3, 48, 48)
    with torch.inference_mode():
        plain, hidden = (affinity.affinities(net, images, options) for net in (model, nn.Sequential(model)))
    assert torch.equal(plain, hidden)


def test_a_published_network_needs_no_counters_of_batchnorm(tmp_path):
    net = nn.Module()
    net.features = nn.Module()
    net.features.backbone = nn.Module()
    net.features.backbone.bn7 = nn.BatchNorm2d(3)
    state = {f"bn7.{name}": torch.rand(3) for name in ("weight", "bias", "running_mean", "running_var")}
    torch.save(state, tmp_path / "net.pth")
    load_published(net, "deeplab", tmp_path / "net.pth")
    assert torch.equal(net.features.backbone.bn7.running_var, state["bn7.running_var"])
    torch.save({**state, "bn7.num_batches_tracked": torch.tensor(7)}, tmp_path / "net.pth")
    load_published(net, "deeplab", tmp_path / "net.pth")
    assert net.features.backbone.bn7.num_batches_tracked == 7
