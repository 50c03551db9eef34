"""Registers a trial's segmentation network in MLflow's model registry, as an exported graph without pickled code.

model = mlflow.pytorch.load_model("models:/semformer-segmentor/1")     # or mlflow.pyfunc, for numpy arrays
maps = torch.sigmoid(model(images))
"""

import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import mlflow.pytorch
import numpy as np
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Run
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec
from torch import Tensor, nn

from semformer.stages import segmentor
from semformer.store import Artifact
from sweeps.plan.trials import Trial
from sweeps.tracking import exhibits
from sweeps.tracking.connection import TAG

DEFAULT_NAME = "semformer-segmentor"
EXAMPLES = 2
"""Images of the input example; with one alone, the export would fix the size of the batch at one."""


class ActivationLogits(nn.Module):
    """The registered forward pass: images (B, 3, s, s) -> logits (B, K, h, w), Eq. 5 before the sigmoid.

    B is free, s is `segmentor.image_size` and h = w = s / patch size. Images are normalised as
    `semformer.data.pixels.normalized` does. Channel 0 is the background; the classes are named in the metadata.
    """

    def __init__(self, network: segmentor.Segmentor):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0]


def register(uri: str, name: str, run: Run, trial: Trial, trained: Artifact, evaluate: Artifact) -> None:
    """Log the network in `trained` as a model of the trial's `run`, and as a version of the registered model `name`.

    The version's tags are the trial's key, rows and scores. Does nothing for a run that has a version already. Takes
    seconds, in which PyTorch exports the network. Raises whatever MLflow raises.
    """
    client, run_id = MlflowClient(tracking_uri=uri), run.info.run_id
    if client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        return
    experiment = run.info.experiment_id
    for unfinished in client.search_logged_models([experiment], f"source_run_id = '{run_id}'"):
        client.delete_logged_model(unfinished.model_id)

    model = activation_logits(trial, trained)
    size = trial.config.segmentor.image_size
    example = np.random.default_rng(0).standard_normal((EXAMPLES, 3, size, size), dtype=np.float32)
    with torch.no_grad():
        _, *shape = model(torch.from_numpy(example)).shape
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype(np.float32), (-1, 3, size, size))]),
        Schema([TensorSpec(np.dtype(np.float32), (-1, *shape))]),
    )
    classes = exhibits.class_table(evaluate)["data"]
    tags = {f"{TAG}trial_key": trial.key, f"{TAG}rows": ",".join(trial.rows)}
    scores = {metric: f"{value:.2f}" for metric, value in evaluate.info["metrics"].items()}
    logged = client.create_logged_model(experiment, name="segmentor", source_run_id=run_id, tags=tags)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model")
        mlflow.pytorch.save_model(
            model,
            path,
            mlflow_model=Model(artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id),
            signature=signature,
            input_example=example,
            serialization_format="pt2",
            pip_requirements=[f"{package}=={version(package)}" for package in ("torch", "numpy")],
            metadata={"classes": [name for name, _ in classes], "trial_key": trial.key},
        )
        client.log_model_artifacts(logged.model_id, path)
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    with suppress(MlflowException):  # it exists
        client.create_registered_model(name, description=ActivationLogits.__doc__)
    client.create_model_version(name, logged.artifact_location, run_id, tags=tags | scores, model_id=logged.model_id)


def activation_logits(trial: Trial, trained: Artifact) -> ActivationLogits:
    """The trained network of a trial as it is registered."""
    network = segmentor.load(trial.config.segmentor, trained, device=torch.device("cpu"))
    return ActivationLogits(network).eval()
