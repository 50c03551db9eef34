"""A trial's network in MLflow's model registry, read back by MLflow's own loaders."""

import io
import zipfile
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from semformer.stages import segmentor
from sweeps.tracking.registry import DEFAULT_NAME
from tests.records import FINISHED, Recorded


@pytest.fixture(scope="module")
def registered(records):
    """A sweep of two trials, recorded twice with their networks registered."""
    recorded = Recorded(records, "registered")
    for _ in range(2):
        tracker = recorded.tracker(register=DEFAULT_NAME)
        tracker.begin()
        for trial in tracker.sweep.trials:
            tracker.hear(trial, FINISHED)
        tracker.end("FINISHED")
        assert tracker.errors == []
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(recorded.uri)
    yield recorded
    mlflow.set_tracking_uri(before)


def test_every_trial_has_one_version_with_its_scores(registered):
    client = MlflowClient(registered.uri)
    versions = client.search_model_versions(f"name = '{DEFAULT_NAME}'")
    runs = registered.runs("trial")
    assert {version.run_id for version in versions} == {run.info.run_id for run in runs.values()}
    assert len(versions) == len(runs)
    for version in versions:
        run = client.get_run(version.run_id)
        assert version.tags["semformer.trial_key"] == run.data.tags["semformer.trial_key"]
        assert float(version.tags["cam/val/miou"]) == pytest.approx(run.data.metrics["cam/val/miou"], abs=0.01)
        assert len(run.outputs.model_outputs) == 1


@pytest.mark.parametrize("n_images", [1, 3])
def test_mlflow_loads_the_network_and_gets_our_logits(registered, n_images):
    trial = registered.tracker().sweep.trials[0]
    version = next(
        v
        for v in MlflowClient(registered.uri).search_model_versions(f"name = '{DEFAULT_NAME}'")
        if v.tags["semformer.trial_key"] == trial.key
    )
    uri, size = f"models:/{DEFAULT_NAME}/{version.version}", trial.config.segmentor.image_size
    images = np.random.default_rng(1).standard_normal((n_images, 3, size, size), dtype=np.float32)
    artifact = registered.store.find(trial.keys["segmentor"])
    ours = segmentor.load(trial.config.segmentor, artifact, device=torch.device("cpu"))
    expected = ours(torch.from_numpy(images))[0].numpy()

    np.testing.assert_allclose(mlflow.pyfunc.load_model(uri).predict(images), expected, atol=1e-5)
    with torch.no_grad():
        np.testing.assert_allclose(mlflow.pytorch.load_model(uri)(torch.from_numpy(images)), expected, atol=1e-5)


def test_the_model_has_a_signature_an_example_and_no_pickle(registered):
    uri = f"models:/{DEFAULT_NAME}/1"
    info = mlflow.models.get_model_info(uri)
    assert str(info.signature.inputs.inputs[0].shape) == "(-1, 3, 48, 48)"
    root = Path(mlflow.artifacts.download_artifacts(uri))
    example = mlflow.pyfunc.load_model(uri).input_example
    assert mlflow.pyfunc.load_model(uri).predict(example).shape[0] == 2
    assert [p.name for p in root.rglob("*") if p.suffix in (".pkl", ".pickle", ".pth", ".bin")] == []
    with zipfile.ZipFile(next(root.rglob("*.pt2"))) as archive:
        names = [name for name in archive.namelist() if name.endswith((".pt", ".pkl"))]
        assert [Path(name).parent.name for name in names] == ["sample_inputs"]
        torch.load(io.BytesIO(archive.read(names[0])), weights_only=True)  # tensors, and nothing that runs
