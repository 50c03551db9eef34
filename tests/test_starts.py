"""How what is new in a network starts, and which tokens are dropped."""

import pytest
import timm
import torch
from timm.models import VisionTransformer
from torch import nn

from semformer.models.caae import CAAE
from semformer.models.segmentor import Segmentor
from semformer.models.vit import Backbone, build_backbone


def backbone(**options) -> Backbone:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2, "num_classes": 0}
    return Backbone(VisionTransformer(**sizes | options))


def test_new_linear_layers_start_as_pytorch_s_default():
    """Weights and biases uniform within 1 / sqrt(fan in), in the blocks of the decoder as well."""
    torch.manual_seed(0)
    caae = CAAE(backbone(), n_classes=20, class_dim=16, decoder_depth=2, decoder_width=48)
    new = [("primary", caae.primary), *caae.decoder.named_modules()]
    new.append(("patch_head", Segmentor(backbone(), n_classes=20, class_dim=16).patch_head))
    layers = {name: layer for name, layer in new if isinstance(layer, nn.Linear)}
    assert len(layers) == 2 + 3 + 2 * 4
    for name, layer in layers.items():
        bound = layer.in_features**-0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound, name
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name
        if layer.bias is not None:
            assert 0.7 * bound < layer.bias.abs().max() <= bound, name


def test_class_semantics_start_unit_normal():
    torch.manual_seed(0)
    weights = CAAE(backbone(), n_classes=40, class_dim=50, reconstruction=False).semantics_weight
    assert weights.mean().item() == pytest.approx(0, abs=0.1)
    assert weights.std().item() == pytest.approx(1, abs=0.05)


def test_layer_norms_have_the_published_eps():
    caae = CAAE(backbone(), n_classes=4, class_dim=8, decoder_depth=1, decoder_width=48)
    for name, layer in caae.named_modules():
        if isinstance(layer, nn.LayerNorm):
            assert layer.eps == (1e-6 if name.startswith("encoder") else 1e-5), name


def test_each_image_of_a_batch_drops_tokens_of_its_own():
    model = Segmentor(backbone(), n_classes=4, class_dim=8, token_dropout=0.5).train()
    kept = model.draw_kept(torch.zeros(6, 3, 64, 64), torch.Generator().manual_seed(0))[..., 0]
    assert len({tuple(row.tolist()) for row in kept}) == 6


def test_the_class_tokens_take_the_position_of_the_class_token_not_of_the_distilled_one():
    from timm.models.deit import VisionTransformerDistilled

    vit = VisionTransformerDistilled(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=2, num_classes=0)
    assert torch.equal(Backbone(vit).class_position, vit.pos_embed[:, :1])


def test_positions_are_resized_bicubically_for_the_training_s_grid():
    vit = VisionTransformer(32, 8, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    square = vit.pos_embed[:, 1:].reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    wanted = nn.functional.interpolate(square, (6, 6), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(Backbone(vit, 48).pos_embed, wanted)


def test_class_tokens_and_positions_start_from_those_of_a_weights_file(tmp_path):
    donor = timm.create_model("vit_shapes_patch8_64")
    for parameter in donor.parameters():
        nn.init.normal_(parameter)
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    loaded = build_backbone("vit_shapes_patch8_64", weights=str(tmp_path / "weights.pth"), image_size=64)
    model = Segmentor(loaded, n_classes=3, class_dim=8)
    for k in range(3):
        assert torch.equal(model.class_tokens[0, k], donor.cls_token[0, 0])
        assert torch.equal(model.class_positions[0, k], donor.pos_embed[0, 0])
    assert torch.equal(loaded.pos_embed, donor.pos_embed[:, 1:])
