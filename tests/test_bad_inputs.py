"""What a user gets wrong: told in one sentence that names it, with exit status 2, before anything is started."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from tests.test_cluster import cluster, environment
from tests.workplace import Answer, Workplace

HERE = Path(__file__)


@pytest.fixture
def ray_folder(monkeypatch):
    """Where Ray would leave its files, if it were started."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # a socket's path must be short
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def place(tmp_path) -> Workplace:
    return Workplace(tmp_path)


def assert_refused(answer: Answer, told: str, place: Workplace) -> None:
    assert answer.status == 2, answer
    assert "Traceback" not in answer.out + answer.err
    assert "error: " in answer.err
    assert told in answer.err.splitlines()[-1]
    assert place.artifacts() == []
    if (place.folder / "mlflow.db").exists():
        client = MlflowClient(place.uri)
        assert client.search_runs([one.experiment_id for one in client.search_experiments()]) == []


MISTAKES = {
    "name an unknown field": ("segmentor.sigm: 0.1", "{miou: null}", "row 'a': unknown field 'segmentor.sigm'"),
    "have a value of the wrong type": ("segmentor.sigma: wide", "{miou: null}", "row 'a': segmentor.sigma = 'wide'"),
    "have a value of no metric": ("", "{fp: 1}", "row 'a': 'fp' is none of the metrics"),
    "set the seed": ("seed: 1", "{miou: null}", "row 'a': seeds are given by --seeds"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_rows_that(place, ray_folder, command, mistake):
    fields, paper, told = MISTAKES[mistake]
    table = place.table("mine", a=fields)
    table.write_text(table.read_text().replace("{miou: null}", paper))
    answer = place.call(command, table)
    assert_refused(answer, told, place)
    assert f"{table}:5: " in answer.err
    assert list(ray_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["plan"], "name one or more tables, or give --all"),
        (["run", "table03", "--all"], "name one or more tables, or give --all"),
        (["run", "table99"], "table99"),
        (["run", "none.yaml"], "none.yaml"),
        (["run", "table03", "table03"], "the table table03 is given twice"),
        (["run", "table03", "--set", "sigma=0.1"], "--set: unknown field 'sigma'"),
        (["run", "table03", "--set", "sigma"], "--set sigma"),
        (["run", "table03", "--data", "nowhere"], "nowhere"),
        (["run", "table03", "--seeds", "0,0"], "argument --seeds: '0,0'"),
        (["run", "table03", "--max-concurrent", "0"], "argument --max-concurrent"),
        (["run", "table03", "--budget", "soon"], "--budget soon: write GPU-hours or minutes"),
        (["run", "table03", "--budget", "1h", "--tflops", "1e-9"], "--budget 1h: the plan costs "),
        (["run", "table03", "--address", "nowhere"], "--address nowhere: write HOST:PORT"),
        (["run", "table03", "--tracking-uri", "nonsense://x"], "--tracking-uri nonsense://x: MLflow cannot be used"),
        (["run", "table03", "--tracking-uri", "sqlite:////proc/no/x.db"], "--tracking-uri sqlite:////proc/no/x.db: "),
        (["run", "table03", "--sweeps", "/proc/no"], "cannot use /proc/no/table03-micro-"),
        (["search", "--axes", "sgma"], "--axes: no axis is named 'sgma': did you mean sigma?"),
        (["search", "--objectives", "miou"], "--objectives: 'miou' is none of cam/val/miou"),
        (["search", "--trials", "0"], "--trials 0: a search needs at least one"),
        (["search", "--study", "my study"], "--study 'my study': a name is letters, digits"),
        (["search", "--budget", "soon"], "--budget soon: write GPU-hours or minutes"),
        (["search", "--storage", "sqlite:////proc/no/x.db"], "--storage sqlite:////proc/no/x.db: "),
        (["search", "--scheduler", "hyperbond"], "--scheduler hyperbond: did you mean hyperband? There are asha, "),
        (["search", "--scheduler", "asha:grace=1"], "--scheduler asha: unknown option 'grace': there are "),
        (["search", "--scheduler", "asha", "--objectives", "gpu_hours"], "--scheduler: gpu_hours is not known before "),
        (["search", "--sampler", "tpi"], "--sampler tpi: did you mean tpe? There are "),
        (["run", "table03", "--gpus-per-trial", "4"], "argument --gpus-per-trial: 4: a trial uses one GPU, and would "),
        (["run", "table03", "--register", "team/model"], "argument --register: 'team/model': a model's name is of "),
        (["search", "--register", "o'hara"], """argument --register: "o'hara": a model's name is of """),
        (["plan", "table06", "--weights", "vit="], "--weights vit=: write NAME=FILE with the name of a backbone, or "),
        (["run", "table06", "--weights", "nowhere"], "--weights nowhere: write NAME=FILE with the name of a backbone"),
        (["run", "table06", "--weights", "vit=none.pth"], "--weights vit=none.pth: there is no file none.pth"),
        (["run", "table06", "--weights", f"vit={HERE}", "--weights", f"vit={HERE}"], "vit has "),
        (
            ["run", "table06", "--weights", str(HERE.parent), "--weights", str(HERE.parent)],
            "is given already: put ",
        ),
        (["run", "table06", "--weights", f"vit={HERE}"], "--weights: no network starts from pretrained weights: with "),
        (["search", "--weights", f"vit={HERE}"], "--weights: no network starts from pretrained weights: with --set "),
        (["status"], "there is no sweep in "),
        (["resume"], "there is no sweep in "),
        (["stop"], "there is no sweep in "),
        (["sync"], "there is no sweep in "),
        (["gc"], "has no roots"),
        (["gc", "--drop", "mine"], "keeps nothing for 'mine', only for nobody"),
    ],
)
def test_options_that_make_no_sense(place, ray_folder, arguments, told):
    assert_refused(place.call(*arguments), told, place)
    assert list(ray_folder.iterdir()) == []


@pytest.mark.parametrize("command", ["status", "resume", "stop", "sync"])
def test_a_sweep_of_another_name(place, command):
    place.call("run", "table03", "--address", "nowhere")  # which is refused, but may be looked at and resumed
    (name,) = (path.name for path in (place.folder / "sweeps").iterdir())
    answer = place.call(command, "mine")
    assert_refused(answer, f"there is no sweep 'mine' in {place.folder / 'sweeps'}: there are {name}", place)


def test_a_store_below_a_file(place):
    blocked = place.folder / "file" / "store"
    blocked.parent.write_text("")
    for command in (["plan", "table03"], ["run", "table03"], ["search"], ["gc"]):
        assert_refused(place.call(*command, "--store", blocked), f"cannot use {blocked} as the store", place)


def test_a_bucket_that_is_not_there(place, bucket):
    answer = place.call("run", "table03", "--store", "s3://no-such-bucket/store")
    assert_refused(answer, "s3://no-such-bucket/store", place)


def test_servers_that_do_not_answer(place, ray_folder, unused_port):
    address = f"127.0.0.1:{unused_port}"
    answer = place.call("run", "table03", "--address", address)
    assert_refused(answer, f"--address {address}: nothing answers there", place)
    uri = f"http://{address}"
    answer = place.call("run", "table03", "--tracking-uri", uri)
    assert_refused(answer, f"--tracking-uri {uri}: MLflow cannot be used there", place)
    assert list(ray_folder.iterdir()) == []


def test_a_gpu_that_is_not_there(place, ray_folder):
    answer = place.call("run", "table03", "--gpus-per-trial", "1")
    assert_refused(answer, "--gpus-per-trial 1: no node can hold that; there are nodes with ", place)
    assert list(ray_folder.iterdir()) != []  # which had to be asked


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A cluster that asks for a token, and counts GPUs that are not there."""
    folder = tmp_path_factory.mktemp("guarded")
    env = environment(folder / "head", token="a" * 64)
    with cluster(env, [{"folder": str(folder), "num_cpus": 1, "num_gpus": 99}]) as address:
        yield SimpleNamespace(address=address, env=env)


def test_a_wrong_token(place, guarded, monkeypatch, tmp_path):
    wrong = environment(tmp_path / "here", "b" * 64)
    for name in ("HOME", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, wrong[name])
    answer = place.call("run", "table03", "--address", guarded.address)
    assert_refused(answer, f"--address {guarded.address}: the token here is not the cluster's: copy ", place)


def test_nodes_that_cannot_run_the_trials_of_a_search(place, guarded):
    arguments = place.arguments("search", "--address", guarded.address, "--gpus-per-trial", "0.5")
    driver = [sys.executable, "-m", "sweeps.cli", *arguments]
    done = subprocess.run(driver, env=guarded.env, capture_output=True, text=True, timeout=100)
    answer = Answer(done.returncode, done.stdout, done.stderr)
    assert_refused(answer, "Ray counts 99 GPUs, PyTorch can use 0 there", place)
    assert "error: 1 of 1 nodes cannot run this sweep." in answer.err
