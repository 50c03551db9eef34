"""An MLflow that is used from afar: reached or not, its experiments, its runs."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

from semformer.errors import UserError, first_line
from semformer.secrets import without_password

TAG = "semformer."
"""All our tags begin with this."""


@contextmanager
def connecting(uri: str) -> Iterator[None]:
    """MLflow, quiet; whatever it raises becomes a UserError that names the URI."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # MLflow lets through whatever the database driver or the HTTP library raises
        told = f"--tracking-uri {uri}: MLflow cannot be used there: {type(error).__name__}: {first_line(error)}"
        raise UserError(without_password(told, uri)) from error


def reading_client(uri: str) -> MlflowClient:
    """Reading must not leave a trace, but MLflow creates an sqlite database that is not there: a UserError."""
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
        if not path.is_file():
            raise UserError(
                f"there is no MLflow database {path}: run a sweep first (semformer-sweep run), or name the "
                "database with --tracking-uri"
            )
    return MlflowClient(uri)


def open_experiment(client: MlflowClient, name: str) -> str:
    """The id of an experiment, made where there is none. Raises UserError if it was deleted."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return client.create_experiment(name, artifact_location=_artifact_location(client.tracking_uri, name))
    if experiment.lifecycle_stage != "active":
        raise UserError(
            f"the MLflow experiment {name!r} was deleted: restore it (mlflow experiments restore "
            f"-x {experiment.experiment_id}), or give another name with --experiment"
        )
    return experiment.experiment_id


def search_runs(client: MlflowClient, experiment_id: str, query: str = "") -> Iterator[Run]:
    """The runs of an experiment that match, oldest first."""
    token = None
    while True:
        page = client.search_runs([experiment_id], query, order_by=["attribute.start_time ASC"], page_token=token)
        yield from page
        if not (token := page.token):
            return


def _artifact_location(uri: str, experiment: str) -> str | None:
    """`mlartifacts/` beside an sqlite database; a server knows its own."""
    if not uri.startswith("sqlite:///"):
        return None
    folder = Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute().parent
    return (folder / "mlartifacts" / hashlib.sha256(experiment.encode()).hexdigest()[:12]).as_uri()
