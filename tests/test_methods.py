"""Networks and losses: fast against plain, every variant forward and backward."""

from dataclasses import replace

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models import VisionTransformer

from semformer import losses
from semformer.config import SegmentorConfig, load_config
from semformer.data.loading import Batch
from semformer.errors import UserError
from semformer.inference import final_map
from semformer.losses import similarity
from semformer.models.caae import CAAE
from semformer.models.segmentor import Segmentor
from semformer.models.vit import Backbone, backbone_shape, build_backbone, build_vit, class_to_patch_attention
from semformer.stages import caae as caae_stage
from semformer.stages import segmentor as segmentor_stage
from tests import reference

K, D = 4, 16


def small_backbone(size: int = 32, **kwargs) -> Backbone:
    options = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0} | kwargs
    return Backbone(VisionTransformer(size, **options))


def small_caae(**kwargs) -> CAAE:
    options = {"n_classes": K, "class_dim": D, "decoder_depth": 1, "decoder_width": 8} | kwargs
    return CAAE(small_backbone(), **options)


@pytest.fixture
def batch():
    """Three images: two objects, one object, background alone; the last two padded."""
    torch.manual_seed(3)
    Y = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 0]]).float()
    regions = torch.tensor([[0, 0, 64, 64], [8, 0, 64, 50], [0, 20, 40, 64]])
    return Batch(torch.randn(3, 3, 64, 64), regions, Y)


@pytest.mark.parametrize("pair_reduction", ["batch", "image"])
@pytest.mark.parametrize(("suppress", "complement"), [("objects", "present"), ("all", "all")])
def test_segmentor_losses_and_gradients_equal_the_plain_ones(batch, pair_reduction, suppress, complement):
    torch.manual_seed(0)
    options = SegmentorConfig(pair_reduction=pair_reduction, suppress=suppress, complement=complement)
    guide = small_caae().eval().requires_grad_(False)
    model = Segmentor(small_backbone(64), n_classes=K, class_dim=D).train()
    gradients = []
    for compute in (segmentor_stage.loss_terms, reference.segmentor_losses):
        model.zero_grad()
        terms = compute(model, guide, options, batch, caae_size=32, generator=torch.Generator().manual_seed(5))
        terms["total"].backward()
        gradients.append((terms, [p.grad.clone() for p in model.parameters()]))
    (ours, our_gradients), (plain, plain_gradients) = gradients
    for name in ours:
        torch.testing.assert_close(ours[name], plain[name], atol=1e-5, rtol=1e-5, msg=name)
    torch.testing.assert_close(our_gradients, plain_gradients, atol=1e-5, rtol=1e-3)


def gradients_of(compute, model) -> tuple[dict[str, float], list[torch.Tensor]]:
    """The terms that compute() returns, and the gradients that it leaves."""
    model.zero_grad()
    terms = {name: term.item() for name, term in compute().items()}
    return terms, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("pieces", [2, 4, 16])
@pytest.mark.parametrize("dropout", [0.5, 0.0])
def test_a_batch_in_pieces_has_the_same_losses_and_gradients(batch, pieces, dropout):
    torch.manual_seed(0)
    guide = small_caae().eval().requires_grad_(False)
    model = Segmentor(small_backbone(64), n_classes=K, class_dim=D, token_dropout=dropout).train()

    def compute(pieces: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(5)
        return segmentor_stage.gradients(model, guide, SegmentorConfig(), batch, generator, pieces, caae_size=32)

    whole, whole_gradients = gradients_of(lambda: compute(1), model)
    parts, gradients = gradients_of(lambda: compute(pieces), model)
    assert parts == pytest.approx(whole, abs=1e-6)
    torch.testing.assert_close(gradients, whole_gradients, atol=1e-6, rtol=1e-4)


def test_pieces_save_memory_where_it_counts(batch, monkeypatch):
    """No more pairs at once than a piece has, and of a block only its input is kept for the way back."""
    guide = small_caae().eval().requires_grad_(False)
    model = Segmentor(small_backbone(64), n_classes=K, class_dim=D).train()
    seen, embed = [], guide.embed
    monkeypatch.setattr(guide, "embed", lambda images: seen.append(len(images)) or embed(images))

    def kept(pieces: int) -> int:
        """Bytes that the graph holds."""
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            segmentor_stage.loss_terms(model, guide, SegmentorConfig(), batch, caae_size=32, pieces=pieces)
        return sum(sizes.values())

    whole, parts = kept(1), kept(4)
    assert max(seen[1:]) * 4 <= seen[0] + 3
    assert parts < 0.6 * whole


@pytest.mark.parametrize("reconstruction", [True, False])
@pytest.mark.parametrize("pieces", [2, 3])
def test_a_batch_in_pieces_has_the_same_losses_and_gradients_for_the_caae(batch, reconstruction, pieces):
    torch.manual_seed(0)
    model = small_caae(reconstruction=reconstruction)
    one = replace(batch, images=batch.images[..., :32, :32])
    whole, whole_gradients = gradients_of(lambda: caae_stage.gradients(model, one), model)
    parts, gradients = gradients_of(lambda: caae_stage.gradients(model, one, pieces), model)
    assert parts == pytest.approx(whole, abs=1e-5)
    torch.testing.assert_close(gradients, whole_gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reconstruction", [True, False])
def test_caae_loss_equals_the_plain_one(batch, reconstruction):
    torch.manual_seed(0)
    model = small_caae(reconstruction=reconstruction)
    images = batch.images[..., :32, :32]
    ours = caae_stage.loss_terms(model, images, batch.Y)["total"]
    torch.testing.assert_close(ours, reference.caae_loss(model, images, batch.Y))


@pytest.mark.parametrize("losses", ["CF", "CB", "AS", "AC", "SS", "CF,CB", "CF,AS,SS"])
def test_only_the_named_losses_are_computed(batch, losses):
    options = load_config("micro", {"segmentor.losses": losses}).segmentor
    model = Segmentor(small_backbone(64), n_classes=K, class_dim=D)
    terms = segmentor_stage.loss_terms(model, small_caae().requires_grad_(False), options, batch, caae_size=32)
    assert set(terms) == {"total", *losses.split(",")}
    terms["total"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_absent_classes_do_not_move_their_semantics(batch):
    model = small_caae()
    Y = torch.tensor([[1.0, 1, 0, 0]]).repeat(3, 1)
    caae_stage.loss_terms(model, batch.images[..., :32, :32], Y)["total"].backward()
    assert model.semantics_weight.grad[:2].abs().sum() > 0
    assert model.semantics_weight.grad[2:].abs().sum() == 0


@pytest.mark.parametrize("merge", ["sum", "mean", "max"])
@pytest.mark.parametrize("reconstruction", [True, False])
def test_caae_variants(merge, reconstruction):
    model = small_caae(merge=merge, reconstruction=reconstruction)
    images = torch.randn(2, 3, 32, 32)
    E, recon = model(images)
    assert E.shape == (2, K, D)
    assert (recon.shape == images.shape) if reconstruction else recon is None
    sim = similarity(E, model.semantics)
    assert ((sim >= 0) & (sim < 1)).all()
    sim.sum().backward()
    assert model.primary.weight.grad.isfinite().all()


def test_sum_and_mean_of_primary_tokens_are_equally_similar():
    """As the notes of Table 5 say."""
    primary, S = torch.rand(2, 9, K, D), torch.rand(K, D)
    by_sum, by_mean = (similarity(small_caae(merge=merge).class_embeddings(primary), S) for merge in ("sum", "mean"))
    torch.testing.assert_close(by_sum, by_mean)


def test_final_maps_are_eq_5_and_6_written_out():
    """Logits of patch tokens; attention of whole matrices, mean of heads, sum of last blocks, min-max over patches."""
    torch.manual_seed(0)
    model = Segmentor(small_backbone(64, depth=3), n_classes=K, class_dim=D).eval()
    images = torch.randn(2, 3, 48, 64)
    patches, _ = model.backbone.tokens(images)
    tokens = torch.cat([(model.class_tokens + model.class_positions).expand(2, -1, -1), patches], dim=1)
    attention = torch.zeros(2, K, 48)
    for index, block in enumerate(model.backbone.blocks):
        q, k, _ = block.attn.qkv(block.norm1(tokens)).reshape(2, K + 48, 3, 2, 8).permute(2, 0, 3, 1, 4)
        if index >= 1:  # U = 2 of 3
            attention += (q @ k.transpose(-2, -1) * 8**-0.5).softmax(dim=-1).mean(dim=1)[:, :K, K:]
        tokens = block(tokens)
    activation = model.patch_head(model.backbone.norm(tokens)[:, K:]).relu().transpose(1, 2)
    low, high = attention.min(dim=2, keepdim=True).values, attention.max(dim=2, keepdim=True).values
    relative = (attention - low) / (high - low + 1e-5)
    expected = {"activation": activation, "attention": relative, "both": activation * relative}
    for kind, theirs in expected.items():
        ours = final_map(model, images, kind, last_blocks=2)
        torch.testing.assert_close(ours, theirs.unflatten(2, (6, 8)), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(activation, relative, atol=0.1)


def test_class_attention_equals_the_full_matrix():
    backbone = small_backbone()
    block, tokens = backbone.blocks[0], torch.randn(2, K + 16, 16)
    q, k, _ = block.attn.qkv(block.norm1(tokens)).reshape(2, K + 16, 3, 2, 8).permute(2, 0, 3, 1, 4)
    full = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(dim=-1).mean(dim=1)
    torch.testing.assert_close(class_to_patch_attention(block, tokens, K), full[:, :K, K:])


def test_dropout_drops_whole_tokens_and_only_in_training():
    model = Segmentor(small_backbone(64), n_classes=K, class_dim=D, token_dropout=0.5).train()
    images = torch.randn(4, 3, 64, 64)
    kept = model.draw_kept(images, torch.Generator().manual_seed(0))
    assert kept.shape == (4, 64, 1)
    assert 0.3 < kept.float().mean() < 0.7
    assert kept.any(dim=1).all(), "no image is dropped as a whole"
    logits, bias = model(images, kept=kept)[0].flatten(2).transpose(1, 2), model.patch_head.bias
    whole = model(images)[0].flatten(2).transpose(1, 2)
    torch.testing.assert_close(logits, torch.where(kept, 2 * (whole - bias) + bias, bias))
    assert model.eval().draw_kept(images, None) is None


def test_class_tokens_start_as_copies_of_the_pretrained_one():
    vit = VisionTransformer(32, 8, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    torch.nn.init.normal_(vit.cls_token)
    model = Segmentor(Backbone(vit), n_classes=K, class_dim=D)
    torch.testing.assert_close(model.class_tokens, vit.cls_token.expand(1, K, 16))
    torch.testing.assert_close(model.class_positions, vit.pos_embed[:, :1].expand(1, K, 16))


@pytest.mark.parametrize(
    "name",
    [
        "vit_shapes_patch8_64",
        "vit_shapes_medium_patch8_64",
        "vit_shapes_small_patch8_64",
        "vit_wiring_patch8_48",
        "vit_tiny_patch16_224",
    ],
)
def test_backbone_equals_timm_without_prefix_tokens(name):
    """Ours has no class token: it must equal a timm ViT whose attention cannot see one."""
    size = backbone_shape(name)["patch_size"] * 4
    torch.manual_seed(0)
    ours = build_backbone(name, image_size=size).eval()
    theirs = timm.create_model(
        name, class_token=False, img_size=size, num_classes=0, global_pool="avg", fc_norm=False
    ).eval()
    state = {f"blocks.{k}": v for k, v in ours.blocks.state_dict().items()}
    state |= {f"norm.{k}": v for k, v in ours.norm.state_dict().items()}
    state |= {f"patch_embed.proj.{k}": v for k, v in ours.patch_embed.state_dict().items()}
    images = torch.randn(1, 3, size, size)
    tokens, _ = ours.tokens(images)
    patches = ours.patch_embed(images).flatten(2).transpose(1, 2)
    theirs.load_state_dict({**theirs.state_dict(), **state, "pos_embed": (tokens - patches).detach()}, strict=False)
    torch.testing.assert_close(ours(images), theirs.forward_features(images), atol=1e-4, rtol=1e-4)


def test_position_embedding_takes_the_grid_of_the_training_images():
    """As in published checkpoints: DeiT-S at 448 has 28 x 28 positions."""
    backbone = build_backbone("deit_tiny_distilled_patch16_224", image_size=448)
    assert backbone.pos_embed.shape == (1, 28 * 28, 192)
    assert safetensors.torch.save(backbone.state_dict()), "safetensors refuses what is not contiguous"
    assert backbone(torch.randn(1, 3, 64, 96)).shape == (1, 4 * 6, 192)


OTHERS = {
    "no ViT": ["resnet18", "swin_tiny_patch4_window7_224"],
    "other blocks": ["vit_base_patch16_xp_224", "vit_small_patch16_18x2_224", "vit_dwee_patch16_reg1_gap_256"],
    "another embedding of patches": ["vit_base_r50_s16_224", "vit_base_mci_224", "aimv2_large_patch14_224"],
    "no final norm": ["beit3_base_patch16_224", "eva_large_patch14_196"],
    "no model": ["vit_no_such_model"],
}


@pytest.mark.parametrize("name", [name for names in OTHERS.values() for name in names])
def test_backbones_that_cannot_be_used_are_refused(name):
    with pytest.raises(UserError, match=name):
        build_backbone(name, image_size=224)


def test_impossible_download_tells_how_to_give_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="--weights FILE"):
        build_backbone("deit_tiny_patch16_224", pretrained=True, image_size=224)


@pytest.mark.parametrize("options", [{}, {"pretrained": True, "weights": "w.pth"}, {"pretrained": True}])
def test_only_a_download_that_failed_is_told_as_one(monkeypatch, options):
    """Memory that ran out, and what no download is part of, stay what they are."""
    error = MemoryError() if options == {"pretrained": True} else RuntimeError("no such option")

    def fail(*_, **__):
        raise error

    backbone_shape("vit_shapes_patch8_64")
    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(type(error)) as raised:
        build_backbone("vit_shapes_patch8_64", image_size=64, **options)
    assert raised.value is error


def test_the_classifier_of_a_file_is_left_where_a_network_has_its_own(tmp_path):
    donor = timm.create_model("vit_wiring_patch8_48", num_classes=5)
    torch.save(donor.state_dict(), tmp_path / "w.pth")
    made = build_vit("vit_wiring_patch8_48", pretrained=False, weights=str(tmp_path / "w.pth"), num_classes=3)
    assert made.head.weight.shape == (3, donor.embed_dim)
    torch.testing.assert_close(made.blocks[0].attn.qkv.weight, donor.blocks[0].attn.qkv.weight)


def test_local_weights_are_loaded_and_position_embeddings_resized(tmp_path):
    donor = timm.create_model("vit_shapes_patch8_64")
    torch.save({"model": donor.state_dict()}, tmp_path / "weights.pth")
    backbone = build_backbone("vit_shapes_patch8_64", weights=str(tmp_path / "weights.pth"), image_size=64)
    torch.testing.assert_close(backbone.blocks[0].attn.qkv.weight, donor.blocks[0].attn.qkv.weight)
    assert torch.equal(backbone.pos_embed, donor.pos_embed[:, 1:])
    larger = timm.create_model("vit_shapes_patch8_64", img_size=96)
    torch.save(larger.state_dict(), tmp_path / "larger.pth")
    backbone = build_backbone("vit_shapes_patch8_64", weights=str(tmp_path / "larger.pth"), image_size=64)
    resized = resample_abs_pos_embed(larger.pos_embed, [8, 8], num_prefix_tokens=1)
    torch.testing.assert_close(backbone.pos_embed, resized[:, 1:])
    torch.testing.assert_close(backbone.class_position, larger.pos_embed[:, :1])
    for shape in ((), (64,), (65, 64), (2, 65, 64), (1, 0, 64), (1, 1, 64), (1, 66, 64), (1, 65, 32)):
        torch.save(donor.state_dict() | {"pos_embed": torch.zeros(shape)}, tmp_path / "bent.pth")
        with pytest.raises(UserError, match=r"bent.pth.*another architecture: pos_embed has shape"):
            build_backbone("vit_shapes_patch8_64", weights=str(tmp_path / "bent.pth"), image_size=64)
    wrong = timm.create_model("vit_wiring_patch8_48")
    torch.save(wrong.state_dict(), tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=r"wrong.pth.*another architecture"):
        build_backbone("vit_shapes_patch8_64", weights=str(tmp_path / "wrong.pth"), image_size=64)


def test_class_heads_start_as_published():
    """Uniform, the weights within 1 / sqrt(d * D), the biases within 1 / sqrt(d)."""
    torch.manual_seed(0)
    model = Segmentor(small_backbone(), n_classes=50, class_dim=D)
    heads = (model.class_head_weight.detach(), (16 * D) ** -0.5), (model.class_head_bias.detach(), 16**-0.5)
    for values, bound in heads:
        assert 0.99 * bound < values.abs().max() <= bound
        assert values.std() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_semantic_similarity_is_binary_cross_entropy():
    """Similarities of 0 and below count as 0; a NaN comes through, for the training to stop."""
    torch.manual_seed(0)
    sim, Y = torch.rand(8, K) * 1.9 - 0.95, (torch.rand(8, K) < 0.5).float()
    sim[0] = 0.0
    gradients = []
    for loss in (losses.semantic_similarity, lambda sim, Y: F.binary_cross_entropy(sim.relu(), Y)):
        leaf = sim.clone().requires_grad_()
        loss(leaf, Y).backward()
        gradients.append((loss(sim, Y), leaf.grad))
    torch.testing.assert_close(*gradients)
    assert losses.semantic_similarity(sim.fill_(torch.nan), Y).isnan()
