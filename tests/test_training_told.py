"""What a training tells while it goes, and what it keeps when it ends: one weight, on batches of numbers."""

import json
import logging

import pytest
import torch
from safetensors import safe_open
from torch import nn

from semformer.config import CaaeConfig, OptimizerConfig
from semformer.data.loading import Batch
from semformer.stages import training
from semformer.stages.context import Context
from semformer.stages.training import Checkpoint, TrainingDiverged, build_optimizer, train

CPU = torch.device("cpu")
PLAIN = OptimizerConfig(name="sgd", lr=0.1, power=0.0, new_multiplier=1, bias_multiplier=1, momentum=0, weight_decay=0)
EPOCHS, STEPS, IMAGES = 3, 4, 5


class Batches:
    batch_size = IMAGES

    def __len__(self):
        return STEPS

    def epoch(self, epoch):
        for _ in range(STEPS):
            yield Batch(torch.zeros(IMAGES, 3, 2, 2), torch.zeros(IMAGES, 4), torch.ones(IMAGES, 2))


def learn(folder, *, loss=lambda step, weight: weight, progress=lambda told: None, optimizer=PLAIN):
    model, steps = nn.Linear(1, 1, bias=False), iter(range(1000))
    nn.init.ones_(model.weight)

    def gradients(batch, generator, pieces):
        total = loss(next(steps), model.weight.sum())
        total.backward()
        return {"total": total.detach()}

    config = CaaeConfig(epochs=EPOCHS, batch_size=IMAGES, optimizer=optimizer)
    history = train(
        model,
        stage="caae",
        config=config,
        loader=Batches(),
        gradients=gradients,
        precision="float32",
        seed=0,
        ctx=Context(CPU, progress, folder, folder),
    )
    return model, history


def test_a_training_tells_how_far_it_is_and_how_fast(tmp_path, monkeypatch):
    told, now, seconds = [], [1000.0], 0.5

    def loss(step, weight):
        now[0] += seconds
        return weight

    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    learn(tmp_path, loss=loss, progress=told.append)
    assert {(one.stage, one.epochs, one.total, one.note) for one in told} == {("caae", EPOCHS, EPOCHS * STEPS, "")}
    ends = [one for one in told if one.end_of_epoch]
    assert [(one.epoch, one.done) for one in ends] == [(e, e * STEPS) for e in (1, 2, 3)]
    assert [one.done for one in told] == sorted(one.done for one in told)
    for one in ends:
        assert set(one.values) == {"total", "lr", "pieces", "images_per_second"}
        assert one.values["images_per_second"] == one.images_per_second == pytest.approx(IMAGES / seconds)
        assert one.seconds_left == pytest.approx((one.total - one.done) * seconds)


def test_the_rate_of_an_epoch_is_that_of_its_last_step(tmp_path):
    _, history = learn(tmp_path, optimizer=PLAIN.model_copy(update={"power": 1.0}))
    last = [epoch * STEPS - 1 for epoch in (1, 2, 3)]
    assert history["lr"] == pytest.approx([0.1 * (1 - step / (EPOCHS * STEPS)) for step in last])


@pytest.mark.parametrize(("size", "diverges"), [(0.999 * training.DIVERGED, False), (training.DIVERGED, True)])
def test_the_step_at_which_a_loss_diverged_is_told(tmp_path, size, diverges):
    def loss(step, weight):
        return 0 * weight + (size if step == STEPS + 1 else 1.0)

    if diverges:
        with pytest.raises(TrainingDiverged, match=r"caae: the loss diverged in epoch 2, step 2 \(total 1e\+04\)"):
            learn(tmp_path, loss=loss)
    else:
        learn(tmp_path, loss=loss)


def test_the_last_epoch_is_kept_however_long_writing_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "QUICK", -1.0)
    monkeypatch.setattr(training, "SHARE", 10**6)
    model, history = learn(tmp_path)
    with safe_open(tmp_path / "checkpoint.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["history"]) == history
        assert torch.equal(file.get_tensor("model.weight"), model.weight)
    assert len(history["total"]) == EPOCHS


def test_a_slow_checkpoint_is_written_again_after_two_minutes_at_the_latest(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(training, "QUICK", 1.0)
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Checkpoint, "_write", lambda self, tensors, history: written.append(history) or 50.0)
    written, model = [], nn.Linear(1, 1)
    with Checkpoint(tmp_path) as checkpoint:
        for after in (0, 1, 119, 121):  # seconds; 20 times 50 s would be longer
            now[0] = 1000.0 + after
            checkpoint.save(model, torch.optim.SGD(model.parameters()), {"total": [float(after)]})
    assert [json.loads(history)["total"] for history in written] == [[0.0], [121.0]]


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path, caplog):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"no tensors")
    model = nn.Linear(1, 1)
    with caplog.at_level(logging.WARNING):
        assert Checkpoint(tmp_path).load(model, build_optimizer(model, PLAIN, None)) == {}
    assert f"starting again: the checkpoint {tmp_path / 'checkpoint.safetensors'} cannot be read" in caplog.text
