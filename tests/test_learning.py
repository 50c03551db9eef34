"""The training loop itself, on a network of one weight."""

import threading

import pytest
import torch
from torch import nn

from semformer.config import load_config
from semformer.data.loading import Batch
from semformer.stages import training
from semformer.stages.context import Context
from semformer.stages.training import Checkpoint, train

CPU = torch.device("cpu")
ONE = {"name": "sgd", "lr": 0.01, "momentum": 0, "weight_decay": 0, "new_multiplier": 1, "bias_multiplier": 1}


class TwoSteps:
    """A loader of two batches an epoch."""

    batch_size = 1

    def __len__(self):
        return 2

    def epoch(self, epoch):
        return iter([Batch(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4), torch.ones(1, 2))] * 2)


def learn(folder, gradients, *, seed=0, score=None, **optimizer) -> nn.Module:
    """Three epochs; gradients(model, generator) -> the gradient of the one weight, which starts at 0."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)

    def add(batch, generator, pieces):
        before = 0 if model.weight.grad is None else model.weight.grad
        model.weight.grad = before + torch.full((1, 1), gradients(model, generator))
        return {"total": torch.tensor(model.weight.item())}

    config = load_config("micro", {"caae.optimizer": {**ONE, **optimizer}, "caae.epochs": 3}).caae
    ctx = Context(CPU, lambda told: None, folder, folder, selection="images" if score else None)
    model.history = train(
        model,
        stage="caae",
        config=config,
        loader=TwoSteps(),
        gradients=add,
        precision="float32",
        seed=seed,
        ctx=ctx,
        score=lambda data: score(model),
    )
    return model


@pytest.mark.parametrize("warmup", [0, 4])
def test_a_step_moves_a_weight_by_its_rate_times_its_own_gradient(tmp_path, warmup):
    weights = []
    last = learn(tmp_path, lambda model, _: weights.append(model.weight.item()) or 100.0, warmup_steps=warmup)
    moves = [a - b for a, b in zip(weights, [*weights[1:], last.weight.item()], strict=True)]
    wanted = [min(1, (t + 1) / (warmup or 1)) * (1 - t / 6) ** 0.9 for t in range(6)]
    assert moves == pytest.approx(wanted, abs=1e-5)


def test_what_is_new_learns_faster_than_what_is_pretrained(tmp_path):
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))

    def add(batch, generator, pieces):
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
            parameter.grad = torch.ones(1, 1)
        return {"total": torch.zeros(())}

    optimizer = ONE | {"new_multiplier": 10, "power": 0}
    config = load_config("micro", {"caae.optimizer": optimizer, "caae.epochs": 1}).caae
    ctx = Context(CPU, lambda told: None, tmp_path, tmp_path)
    options = {"stage": "caae", "config": config, "precision": "float32", "seed": 0, "ctx": ctx}
    train(model, loader=TwoSteps(), gradients=add, pretrained=model[0], **options)
    assert [weight.item() for weight in model.parameters()] == pytest.approx([-0.01, -0.1])


def test_a_network_learns_in_training_mode_though_it_is_measured_in_evaluation_mode(tmp_path):
    modes = []
    measured = {"miou": 1.0}
    learn(tmp_path, lambda model, _: modes.append(model.training) or 0.0, score=lambda model: model.eval() and measured)
    assert modes == [True] * 6


def test_what_is_dropped_depends_on_seed_and_epoch(tmp_path):
    def dropped(seed: int) -> list[float]:
        numbers = []
        (tmp_path / str(seed)).mkdir(exist_ok=True)
        learn(tmp_path / str(seed), lambda _, g: numbers.append(torch.rand((), generator=g).item()) or 0.0, seed=seed)
        return numbers

    numbers = [number for seed in (0, 1, 2) for number in dropped(seed)]
    assert len(set(numbers)) == 18


def test_a_checkpoint_that_is_written_beside_the_training_has_the_weights_of_its_epoch(tmp_path, monkeypatch):
    go_on, write = threading.Event(), training.write_whole
    monkeypatch.setattr(training, "QUICK", 0.0)
    monkeypatch.setattr(training, "write_whole", lambda *a, **k: go_on.wait(60) and write(*a, **k))
    model = nn.Linear(3, 2)
    optimizer, told = torch.optim.SGD(model.parameters(), 0.1), {n: v.clone() for n, v in model.state_dict().items()}
    with Checkpoint(tmp_path) as checkpoint:
        checkpoint.save(model, optimizer, {"total": [1.0]})
        for parameter in model.parameters():
            parameter.data += 1
        go_on.set()
    assert Checkpoint(tmp_path).load(model, optimizer) == {"total": [1.0]}
    torch.testing.assert_close(model.state_dict(), told)


def test_an_epoch_s_losses_are_the_means_of_its_steps(tmp_path):
    weights = []
    history = learn(tmp_path, lambda model, _: weights.append(model.weight.item()) or 100.0).history
    assert history["total"] == pytest.approx([(a + b) / 2 for a, b in zip(weights[::2], weights[1::2], strict=True)])
