import shutil

import pytest
from mlflow import MlflowClient

from tests.analysis.scene import CRA, Sweep


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow")
    MlflowClient(f"sqlite:///{folder}/mlflow.db").create_experiment("another sweep", artifact_location=str(folder))
    return folder / "mlflow.db"


@pytest.fixture
def database(empty_database, tmp_path):
    shutil.copy(empty_database, tmp_path)
    return tmp_path


@pytest.fixture
def sweep(database):
    return Sweep(database)


@pytest.fixture
def tables(database):
    """Sweeps of table08 and table11 in one experiment, under one parent run, with a trial that fills rows of both."""
    sweeps = [Sweep(database, name, experiment="tables tiny") for name in ("table08", "table11")]
    client, experiment = sweeps[0].client, sweeps[0].id
    parent = client.create_run(experiment, tags={"semformer.kind": "sweep"}).info.run_id
    sweeps[0].trial("D-32", 40.0)
    both = {"table": "table08,table11", "rows": "table08/D-256,table11/with"}
    runs = [sweeps[0].trial("D-256", 50.0, tags=both), sweeps[1].trial("without", 45.0)]
    for run in runs:
        client.set_tag(run, "mlflow.parentRunId", parent)
    return sweeps[0], parent


@pytest.fixture
def cra(database):
    path = database / "cra.yaml"
    path.write_text(CRA)
    sweep = Sweep(database, path)
    sweep.trial("without", 60.0, fp=20.0)
    sweep.trial("with", 70.0, fp=25.0)
    return sweep
