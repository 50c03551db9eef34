"""Training steps of both networks beside the plain implementation of the same equations (tests/reference.py).

Preset tiny's networks, forward and backward, random weights and images with 1 to 3 objects. The plain version loops
over pairs, passes foreground and background images separately, and materialises every attention matrix. Both must
give the same loss.
"""

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from semformer.config import load_config
from semformer.data.loading import Batch
from semformer.stages import caae as caae_stage
from semformer.stages import segmentor as segmentor_stage
from tests import reference

K = 9
ROUNDS = 5


def run(batch: int = 16) -> list[dict[str, float | str]]:
    """Median images per second of each step, ours and plain, alternating in one process."""
    torch.manual_seed(0)
    config = load_config("tiny")
    caae = caae_stage.build(config.caae, n_classes=K)
    segmentor = segmentor_stage.build(config.segmentor, n_classes=K, class_dim=config.caae.class_dim)
    plain_caae, plain_segmentor = copy.deepcopy(caae), copy.deepcopy(segmentor)
    reference.materialise_attention(plain_caae)
    reference.materialise_attention(plain_segmentor)

    Y = torch.zeros(batch, K)
    Y[:, 0] = 1
    for b in range(batch):
        Y[b, 1 + torch.randperm(K - 1)[: 1 + b % 3]] = 1
    s, S = config.caae.image_size, config.segmentor.image_size
    small, large = torch.randn(batch, 3, s, s), torch.randn(batch, 3, S, S)
    crops = Batch(large, torch.tensor([[0, 0, S, S]]).repeat(batch, 1), Y)

    rows = [
        _compare(
            "CAAE step",
            batch,
            lambda: caae_stage.loss_terms(caae, small, Y)["total"],
            lambda: reference.caae_loss(plain_caae, small, Y),
        )
    ]
    for model in (caae, plain_caae):
        model.requires_grad_(False).eval()

    def step(compute, model, guide) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return compute(model, guide, config.segmentor, crops, caae_size=s, generator=generator)["total"]

    rows.append(
        _compare(
            "segmentation step",
            batch,
            lambda: step(segmentor_stage.loss_terms, segmentor, caae),
            lambda: step(reference.segmentor_losses, plain_segmentor, plain_caae),
        )
    )
    in_pieces = partial(segmentor_stage.loss_terms, segmentor, caae, config.segmentor, crops, caae_size=s, pieces=4)
    rows[-1]["in_pieces"] = kept(in_pieces)
    return rows


def _compare(name: str, batch: int, ours: Callable[[], Tensor], plain: Callable[[], Tensor]) -> dict[str, float | str]:
    torch.testing.assert_close(ours(), plain(), atol=1e-4, rtol=1e-4)
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(ROUNDS):
        for kind, compute in (("ours", ours), ("plain", plain)):
            started = time.perf_counter()
            compute().backward()
            seconds[kind].append(time.perf_counter() - started)
    ratio = statistics.median(p / o for o, p in zip(seconds["ours"], seconds["plain"], strict=True))
    rates = {kind: batch / statistics.median(values) for kind, values in seconds.items()}
    return {"what": name, **rates, "ratio": ratio, "kept": kept(ours), "plain_kept": kept(plain)}


def kept(compute: Callable[[], object]) -> float:
    """MiB of tensors that a forward pass keeps for its gradients."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        compute()
    return sum(sizes.values()) / 2**20
