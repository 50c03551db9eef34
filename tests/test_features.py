"""Backbones as AffinityNet and DeepLab take them: strides, weights from files, what stays frozen, what is refused."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from semformer import pipeline
from semformer.config import AffinityConfig, DeeplabConfig, load_config
from semformer.errors import UserError
from semformer.models.affinity import EdgeNet, FeatureNet
from semformer.models.features import Features, build_features, check_features
from semformer.models.resnet38 import Block, ResNet38
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


def test_resnet38_is_dilated_where_it_no_longer_shrinks():
    at, model = {"b5": (1, 2), "b5_1": (2, 2), "b5_2": (2, 2), "b6": (1, 4, 1), "b7": (1, 4, 1)}, ResNet38()
    for name, block in model.named_children():
        if hasattr(block, "names"):
            convolutions = [block.get_submodule(f"conv_branch{part}") for part in block.names]
            dilations = at.get(name, (1,) * len(convolutions))
            for convolution, dilation in zip(convolutions, dilations, strict=True):
                assert convolution.dilation == (dilation, dilation), name
                assert convolution.padding == ((dilation, dilation) if convolution.kernel_size == (3, 3) else (0, 0))


@pytest.mark.parametrize(
    ("widths", "stride", "dilations"), [((6, 6), 1, (1, 1)), ((5, 8), 2, (1, 2)), ((4, 5, 8), 1, (1, 4, 1))]
)
def test_a_block_adds_its_branch_to_its_input(widths, stride, dilations):
    """To a 1x1 convolution of the normed input, where the shape changes."""
    block = Block(6, *widths, stride=stride, dilations=dilations).eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    x, own = torch.randn(2, 6, 9, 7), block.state_dict()
    branch, first, step = x, None, stride
    for part, dilation in zip(("2a", "2b1", "2b2"), dilations, strict=False):
        of_norm = (own[f"bn_branch{part}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        branch = F.batch_norm(branch, *of_norm).relu()
        first = branch if first is None else first
        kernel = own[f"conv_branch{part}.weight"]
        branch = F.conv2d(branch, kernel, stride=step, dilation=dilation, padding=dilation * (kernel.shape[2] == 3))
        step = 1
    same = stride == 1 and widths[-1] == 6
    beside = x if same else F.conv2d(first, own["conv_branch1.weight"], stride=stride)
    found = block(x)
    torch.testing.assert_close(found, (branch + beside, first))


def enlarged(x: np.ndarray, times: int) -> np.ndarray:
    """Maps (..., h, w), bilinear from corner to corner."""
    for axis in (-2, -1):
        n = x.shape[axis]
        at = np.linspace(0, n - 1, n * times)
        below = np.minimum(at.astype(int), max(n - 2, 0))
        above, part = np.minimum(below + 1, n - 1), at - below
        if axis == -2:
            part = part[:, None]
        x = x.take(below, axis) * (1 - part) + x.take(above, axis) * part
    return x


def of_channels(*maps: tuple[int, int, int]) -> tuple[Features, list[Tensor]]:
    """Features whose maps are random, of so many channels and such sizes."""
    made = [torch.randn(2, *shape) for shape in maps]
    read = [one.clone() for one in made]
    return Features(nn.Identity(), lambda *_: read, tuple(C for C, _, _ in maps), ()), made


def test_edges_are_read_from_five_maps():
    """Of an image of 40x54, whose maps at strides 8 and 16 are cut off after enlarging."""
    features, maps = of_channels((3, 20, 27), (4, 10, 14), (5, 5, 7), (6, 3, 4), (7, 3, 4))
    net = EdgeNet(features)
    for norm in (tap[1] for tap in net.taps):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    padded = F.pad(maps[0], (1, 1, 1, 1), value=-torch.inf)
    maps[0] = torch.stack([padded[..., y : y + 19 + 1 : 2, x : x + 26 + 1 : 2] for y in range(3) for x in range(3)])
    maps[0] = maps[0].amax(dim=0)
    read = []
    for (convolution, norm), one, times in zip(net.taps, maps, (1, 1, 2, 4, 4), strict=True):
        grouped = torch.einsum("kc,bchw->bkhw", convolution.weight[..., 0, 0], one).unflatten(1, (4, 8))
        variance, mean = torch.var_mean(grouped, dim=(2, 3, 4), keepdim=True, correction=0)
        normed = ((grouped - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
        normed = normed * norm.weight[:, None, None] + norm.bias[:, None, None]
        read.append(enlarged(normed.detach().numpy(), times)[..., :10, :14].clip(min=0))
    weight, bias = net.edge.weight.detach().numpy()[0, :, 0, 0], net.edge.bias.item()
    expected = np.einsum("c,bchw->bhw", weight, np.concatenate(read, axis=1)) + bias
    np.testing.assert_allclose(net(torch.zeros(2, 3, 40, 54)).detach(), expected, atol=1e-4)


def test_features_of_pixels_are_read_from_the_last_three_maps():
    features, maps = of_channels((2, 10, 14), (3, 5, 7), (4, 5, 7), (5, 5, 7))
    net = FeatureNet(features)

    def read(convolution: nn.Conv2d, x: Tensor) -> Tensor:
        found = torch.einsum("kc,bchw->bkhw", convolution.weight[..., 0, 0], x)
        return torch.where(found > 0, found, found.exp() - 1)

    joined = torch.cat([read(tap, one) for tap, one in zip(net.taps, maps[1:], strict=True)], dim=1)
    torch.testing.assert_close(net(torch.zeros(2, 3, 40, 56)), read(net.joined, joined), atol=1e-5, rtol=1e-4)
    assert net(torch.zeros(2, 3, 40, 56)).shape == (2, 448, 5, 7)


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


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_convolutions_that_are_not_dilated_are_those_of_the_plain_network(name):
    """But for the strides: padded as there."""
    plain, ours = timm.create_model(name), build(name, 16, dilated=False).backbone
    for key, module in ours.named_modules():
        if isinstance(module, nn.Conv2d):
            own, there = ((one.kernel_size, one.padding, one.dilation) for one in (module, plain.get_submodule(key)))
            assert own == there, key


@pytest.mark.parametrize("name", ["resnet18", "resnet38", "convnext_atto"])
def test_a_classifiers_weights_are_taken_without_its_head(tmp_path, name):
    """As files have them: with a head, and after a conversion without the counters of BatchNorm."""
    model = ResNet38() if name == "resnet38" else timm.create_model(name)
    state = {key: value + 0 for key, value in model.state_dict().items() if "num_batches_tracked" not in key}
    if name == "resnet38":
        state["fc8.weight"] = torch.zeros(1000, 4096, 1, 1)
    torch.save(state, tmp_path / "weights.pth")
    features = build(name, weights=str(tmp_path / "weights.pth"), pretrained=True)
    own = features.backbone.state_dict()
    kept = [key for key in state if not key.startswith(("fc", "head.fc"))]
    assert len(kept) == len([key for key in own if "num_batches_tracked" not in key])
    assert all(torch.equal(own[key], state[key]) for key in kept)


def test_a_vits_weights_are_taken_and_its_positions_are_those_of_the_images(tmp_path):
    learnt = timm.create_model("vit_shapes_patch8_64")
    torch.save(learnt.state_dict(), tmp_path / "weights.pth")
    taken = build("vit_shapes_patch8_64", weights=str(tmp_path / "weights.pth"), image_size=48).backbone
    assert torch.equal(taken.blocks[0].attn.qkv.weight, learnt.blocks[0].attn.qkv.weight)
    assert taken.pos_embed.shape[1] == 36


def test_weights_of_another_backbone_are_refused(tmp_path):
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "weights.safetensors")
    for name, told in (("test_resnet", ", read as test_resnet,"), ("resnet38", "")):
        with pytest.raises(UserError, match=rf"weights\.safetensors{told} is of another architecture"):
            build(name, weights=str(tmp_path / "weights.safetensors"))
    with pytest.raises(UserError, match=r"affinity\.backbone resnet38 has features of stride 8, not 16"):
        build("resnet38", 16, field="affinity")


def test_nothing_is_frozen_at_first():
    norms = [module for module in build("test_resnet").train().modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.training for norm in norms} == {True}


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


@pytest.mark.parametrize(
    ("variant", "strides", "dilations"),
    [("edge", (2, 4, 8, 16, 16), {(1, 1)}), ("feature", (2, 4, 8, 8, 8), {(1, 1), (2, 2), (4, 4)})],
)
def test_affinity_net_has_the_strides_of_its_variant(variant, strides, dilations):
    """Edges: the last stage has stride 1, undilated as published."""
    features = affinity.build(AffinityConfig(variant=variant, backbone="resnet18", pretrained=False)).features
    assert features.strides == strides
    found = {module.dilation for module in features.modules() if isinstance(module, nn.Conv2d)}
    assert found == dilations


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
