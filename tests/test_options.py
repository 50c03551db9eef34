"""Every option of a network reaches the network that is built, trained and loaded again."""

import pytest
import torch
from safetensors.torch import save_file

from semformer.config import load_config
from semformer.data.loading import Batch
from semformer.keys import StageKey
from semformer.stages import caae, segmentor
from semformer.stages.training import lr_factor
from semformer.store import Artifact

CPU = torch.device("cpu")


def options(stage: str, **changes):
    return getattr(load_config("micro", {f"{stage}.{name}": value for name, value in changes.items()}), stage)


def test_the_caae_is_built_as_its_options_say():
    model = caae.build(options("caae", decoder_depth=3, decoder_width=48, class_dim=5, merge="max"), n_classes=7)
    assert len(model.decoder.blocks) == 3
    assert model.decoder.norm.normalized_shape == (48,)
    assert model.semantics.shape == (7, 5)
    assert model.merge == "max"
    assert caae.build(options("caae", reconstruction=False), n_classes=7).decoder is None


@pytest.mark.parametrize("merge", ["sum", "mean", "max"])
def test_the_guide_embeds_as_the_caae_that_was_trained(tmp_path, merge):
    torch.manual_seed(0)
    trained = caae.build(options("caae", merge=merge), n_classes=7)
    state = {name: value for name, value in trained.state_dict().items() if not name.startswith("decoder.")}
    save_file(state, tmp_path / caae.WEIGHTS)
    artifact = Artifact(StageKey("caae", {}), tmp_path, {}, {caae.WEIGHTS: {}})
    guide = caae.load(options("caae", merge=merge), artifact, device=CPU)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(guide.embed(images), trained(images)[0])


def test_the_segmentation_network_drops_as_many_tokens_as_its_option_says():
    model = segmentor.build(options("segmentor", token_dropout=0.1), n_classes=7, class_dim=5).train()
    kept = model.draw_kept(torch.zeros(50, 3, 48, 48), torch.Generator().manual_seed(0))
    assert kept.float().mean().item() == pytest.approx(0.9, abs=0.03)


def test_sigma_scales_the_suppression():
    torch.manual_seed(0)
    model = segmentor.build(options("segmentor"), n_classes=3, class_dim=8).eval()
    guide = caae.build(options("caae"), n_classes=3).eval().requires_grad_(False)
    batch = Batch(torch.randn(1, 3, 48, 48), torch.tensor([[0, 0, 48, 48]]), torch.tensor([[1.0, 1, 0]]))
    suppressed = [
        segmentor.loss_terms(model, guide, options("segmentor", sigma=s), batch, caae_size=32)["AS"].item()
        for s in (0.05, 0.2)
    ]
    assert suppressed[1] == pytest.approx(4 * suppressed[0])


def test_the_power_bends_the_schedule():
    assert lr_factor(3, 4, options("caae", optimizer={"power": 2.0}).optimizer) == pytest.approx(1 / 16)


def test_similarities_are_computed_in_full_precision(monkeypatch):
    seen, similarity = [], caae.losses.similarity
    monkeypatch.setattr(caae.losses, "similarity", lambda E, S: seen.append((E.dtype, S.dtype)) or similarity(E, S))
    model = caae.build(options("caae"), n_classes=3)
    with torch.autocast("cpu", torch.bfloat16):
        caae.loss_terms(model, torch.randn(2, 3, 32, 32), torch.ones(2, 3))
    assert seen == [(torch.float32, torch.float32)]
