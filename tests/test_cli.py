"""`semformer-sweep` as a user meets it: real Ray, real MLflow, real training, in preset micro."""

import re
from collections import Counter
from importlib.metadata import version
from types import SimpleNamespace

import optuna
import psutil
import pytest
from optuna.trial import TrialState

from analysis.cli import main as analysis_main
from semformer import cli as single
from sweeps import cli
from sweeps.plan.table import load_table
from sweeps.tracking.folder import SweepFolder
from tests.artifacts import eventually
from tests.servers import mlflow_server
from tests.workplace import Answer, Workplace

INFERENCE = "U,final_map,thresholds"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("cli"))


def study(place: Workplace, name: str) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{place.folder / 'studies.db'}")


def sweep_name(place: Workplace, start: str) -> str:
    (found,) = (path.name for path in (place.folder / "sweeps").iterdir() if path.name.startswith(start))
    return found


@pytest.mark.parametrize(("main", "program"), [(cli.main, "semformer-sweep"), (single.main, "semformer")])
def test_each_program_tells_its_version(capsys, main, program):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"{program} {version('semformer-sweeps')}\n"


# Planning


def test_the_plan_of_all_tables_of_the_paper(tmp_path, devkit):
    place = Workplace(tmp_path)
    told = place.call("plan", "--all", "--preset", "paper", "--data", devkit, "--json").json()
    assert (told["rows"], told["trials"], told["preset"]) == (51, 34, "paper")
    distinct = {"caae": 15, "segmentor": 26, "cams": 34, "evaluate": 34}
    assert told["stages"] == {name: {"requested": 51, "distinct": n, "cached": 0} for name, n in distinct.items()}
    assert told["price"]["basis"] == "stages: 109 counted at 40 TFLOP/s"
    gpu_hours = [told["price"][part]["gpu_hours"] for part in ("missing", "empty_store", "without_sharing")]
    assert 0 < gpu_hours[0] == gpu_hours[1] < gpu_hours[2]
    keys = {stage["key"] for trial in told["trial_list"] for stage in trial["stages"].values()}
    assert len(keys) == sum(distinct.values())
    assert sum(len(trial["cells"]) for trial in told["trial_list"]) == 51
    assert place.artifacts() == []


def test_all_tables_are_those_whose_scores_lie_on_the_way(tmp_path):
    told = Workplace(tmp_path).call("plan", "--all", "--preset", "micro", "--until", "pseudo_masks", "--json").json()
    assert (told["tables"][0], told["rows"], told["trials"]) == ("table01", 52, 34)


# A search, and two tables in the same store


@pytest.fixture(scope="module")
def searched(place) -> SimpleNamespace:
    """A search over what needs no training, and what it left in the store."""
    answer = place.call("search", "--axes", INFERENCE, "--trials", "5", "--json")
    return SimpleNamespace(answer=answer, made=Counter(artifact.key.stage for artifact in place.artifacts()))


def test_a_search_over_inference_trains_one_network_of_each_kind(place, searched):
    told = searched.answer.json()
    assert (searched.made["caae"], searched.made["segmentor"]) == (1, 1)
    assert 1 < searched.made["evaluate"] <= 5
    assert told["sweep/made_segmentor"] == 1
    assert told["sweep/finished"] == told["trials"] == searched.made["evaluate"]
    trials = study(place, "search-micro").trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 5
    runs = place.runs("search-micro", "trial")
    assert {run.data.tags["semformer.trial_key"] for run in runs} == {t.user_attrs["trial_key"] for t in trials}
    assert "4 trials needed no training" in searched.answer.err


def test_the_best_config_of_a_search_is_a_table_that_is_planned_from_the_store(place, searched):
    best = place.folder / "sweeps" / sweep_name(place, "search-micro") / "report" / "best.yaml"
    told = place.call("plan", best, "--json").json()
    scores = [trial.value for trial in study(place, "search-micro").trials]
    assert told["rows"] == 1 + (max(scores) > scores[0])
    assert load_table(best).name == "search-micro-best", "a sweep of its own, not the search's"
    said = re.search(r"best: trial (\d+), cam/val/miou ([\d.]+): \S+", searched.answer.err)
    assert float(said[2]) == pytest.approx(max(scores), abs=0.01)
    assert scores[int(said[1])] == max(scores)
    assert told["trials"] == told["rows"]
    for count in told["stages"].values():
        assert count["cached"] == count["distinct"]
    assert told["price"]["missing"]["gpu_hours"] == 0


def test_a_search_goes_on_to_more_trials(place, searched):
    answer = place.call("search", "--axes", INFERENCE, "--trials", "7", "--json")
    assert answer.json()["sweep"] == searched.answer.json()["sweep"]
    assert answer.json()["trials"] <= 2
    assert [trial.state for trial in study(place, "search-micro").trials] == [TrialState.COMPLETE] * 7
    made = Counter(artifact.key.stage for artifact in place.artifacts())
    assert (made["caae"], made["segmentor"]) == (1, 1)


def test_a_search_for_two_things_ends_with_its_budget_and_a_front(place, searched):
    objectives = "cam/val/miou,gpu_hours"
    options = ["--study", "thrifty", "--objectives", objectives, "--budget", "0.001m", "--max-concurrent", "1"]
    answer = place.call("search", "--axes", "U,erosion", "--trials", "40", *options, "--json")
    assert answer.json()["trials"] < 10
    assert re.search(r"--budget 0.001m: .* are spent, and trials that run may need .*: nothing more", answer.err)
    trials = study(place, "thrifty").trials
    assert all(len(trial.values) == 2 for trial in trials if trial.state == TrialState.COMPLETE)
    assert sum(trial.state == TrialState.COMPLETE for trial in trials) >= 1
    report = place.folder / "sweeps" / sweep_name(place, "thrifty") / "report"
    assert {"best.yaml", "pareto_front.png"} <= {path.name for path in report.iterdir()}


def test_a_budget_counts_what_came_to_nothing(place):
    """Every trial has a network of its own, which diverges."""
    axes = ["--axes", "segmentor.optimizer.lr=1e8:1e9:log", "--set", "segmentor.optimizer.lr=1e9"]
    options = ["--study", "hopeless", "--trials", "40", "--budget", "0.04m", "--max-concurrent", "1", *axes]
    answer = place.call("search", *options)
    assert "nothing more is suggested" in answer.out
    assert 1 <= answer.out.count("failed: segmentor: TrainingDiverged") < 20


def test_a_pruner_stops_poor_trials_of_a_search(place):
    axes = ["--axes", "segmentor.optimizer.lr=1e-4:1e-2", "--set", "segmentor.epochs=4", "--trials", "3"]
    options = ["--study", "pruned", "--scheduler", "threshold:lower=100", "--max-concurrent", "1"]
    answer = place.call("search", *axes, *options)
    assert answer.status == 0, answer
    assert answer.out.count(": pruned") == 3
    assert {trial.state for trial in study(place, "pruned").trials} == {TrialState.PRUNED}
    assert all(0 < len(trial.intermediate_values) < 4 for trial in study(place, "pruned").trials)


def test_asha_ends_poor_trials_of_a_search_early(place):
    axes = "segmentor.optimizer.lr=0.000001:1:log,losses"
    options = ["--set", "segmentor.epochs=6", "--scheduler", "asha", "--max-concurrent", "1", "--study", "asha"]
    told = place.call("search", "--axes", axes, "--trials", "4", *options, "--json").json()
    trials = study(place, "asha").trials
    states = Counter(trial.state for trial in trials)
    assert states[TrialState.PRUNED] + states[TrialState.COMPLETE] + states[TrialState.FAIL] == 4
    assert states[TrialState.PRUNED] == told["sweep/pruned"] >= 1
    for trial in trials:
        epochs = list(trial.intermediate_values)
        assert epochs == list(range(1, len(epochs) + 1))
        if trial.state != TrialState.FAIL:
            assert (len(epochs) < 6) == (trial.state == TrialState.PRUNED)
    assert {run.info.status for run in place.runs("asha", "trial")} <= {"FINISHED", "KILLED", "FAILED"}


@pytest.fixture(scope="module")
def tables(place, searched) -> SimpleNamespace:
    """Two tables that share a row, under two seeds, of which the search has trained the networks of one."""
    paths = [place.table("left", plain=""), place.table("right", same="", last="cams.last_blocks: 1")]
    before = Counter(artifact.key.stage for artifact in place.artifacts())
    answer = place.call("run", *paths, "--seeds", "0,1", "--json")
    made = Counter(artifact.key.stage for artifact in place.artifacts()) - before
    return SimpleNamespace(paths=paths, answer=answer, made=made)


def test_tables_share_trials_and_each_stage_is_made_once(place, tables):
    told = tables.answer.json()
    assert (told["rows"], told["trials"]) == (3, 4)
    assert told["stages"]["segmentor"] == {"requested": 6, "distinct": 2, "cached": 1}
    assert (tables.made["caae"], tables.made["segmentor"]) == (1, 1)
    assert {stage: told.get(f"sweep/made_{stage}", 0) for stage in tables.made} == tables.made
    assert told["sweep/finished"] + told.get("sweep/found", 0) == 4
    seeds = Counter(run.data.tags["semformer.seed"] for run in place.runs("tables micro", "trial"))
    assert seeds == {"0": 2, "1": 2}


def test_tables_that_were_run_are_not_run_again(place, tables):
    before = [artifact.path.stat().st_mtime_ns for artifact in place.artifacts()]
    answer = place.call("run", *tables.paths, "--seeds", "0,1", "--json")
    assert "nothing to do: all 4 trials are finished and recorded" in answer.err
    assert answer.json()["sweep"] == tables.answer.json()["sweep"]
    assert answer.json()["sweep/found"] == 4
    assert Counter(trial["status"] for trial in place.call("status", "--json").json()["trials"]) == {"found": 4}
    assert [artifact.path.stat().st_mtime_ns for artifact in place.artifacts()] == before


def test_tables_are_compiled_from_their_common_experiment(place, tables, capsys):
    names = list(map(str, tables.paths))
    arguments = [*names, "--preset", "micro", "--tracking-uri", place.uri, "--experiment", "tables micro"]
    assert analysis_main(arguments) == 0
    out = capsys.readouterr().out
    assert "3 of 3 cells filled" in out
    assert out.count("seeds 0, 1") >= 2
    assert out.index("### left") < out.index("### right")


# A sweep that is watched, killed, resumed, stopped and resumed again


class Life:
    """`answers` of `status` and the others on the way; `lines` that the drivers printed."""

    def __init__(self, place: Workplace):
        self.place, self.answers, self.lines = place, {}, []
        rows = {"a": "", "b": "cams.last_blocks: 1", "c": "caae.merge: max"}
        self.table = place.table("life", **rows)
        self.children: list[psutil.Process] = []

    def note(self, name: str, command: str, *options: str) -> Answer:
        self.answers[name] = self.place.call(command, *options)
        return self.answers[name]

    def until(self, driver, text: str) -> None:
        for line in driver.stdout:
            self.lines.append(line)
            if text in line:
                self.children += psutil.Process(driver.pid).children(recursive=True)
                return
        raise AssertionError("".join(self.lines))

    def close(self) -> None:
        """Ray's own processes take their time to notice that the driver was killed."""
        for process in self.children:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    folder = tmp_path_factory.mktemp("life")
    with mlflow_server(folder) as server:
        place = Workplace(folder, server.uri)
        life = Life(place)
        try:
            run = place.start("run", life.table, "--set", "segmentor.epochs=60", "--max-concurrent", "1")
            life.until(run, "a: segmentor epoch 3/60")
            waits = lambda: "waits for segmentor, which a makes, epoch" in life.note("running", "status", "--json").out  # noqa: E731
            eventually(waits)
            life.note("running as text", "status")
            life.note("sync while running", "sync")
            life.note("resume while running", "resume")
            server.stop()
            life.until(run, "a: segmentor epoch 30/60")
            run.kill()
            life.lines += run.communicate()[0].splitlines(keepends=True)
            life.note("killed", "status")
            life.note("killed as JSON", "status", "--json")
            life.note("stop of nobody", "stop", "--json")
            server.start()
            life.note("sync", "sync", "--json")
            life.note("sync again", "sync")
            resumed = place.start("resume")
            life.until(resumed, "c: segmentor epoch 3/60")
            life.note("stop", "stop")
            life.lines += resumed.communicate()[0].splitlines(keepends=True)
            life.status_of_stopped = resumed.returncode
            life.note("stopped", "status")
            life.lines += life.note("resumed", "resume", "--json").err.splitlines(keepends=True)
            life.note("ended", "status")
            yield life
        finally:
            life.close()


def trials(answer: Answer) -> dict[str, dict]:
    return {trial["name"]: trial for trial in answer.json()["trials"]}


def test_status_tells_what_trials_do_and_why_they_wait(life):
    told = trials(life.answers["running"])
    assert {name: trial["status"] for name, trial in told.items()} == {"a": "running", "b": "queued", "c": "queued"}
    assert re.match(r"waits for segmentor, which a makes, epoch \d+/60", told["b"]["told"])
    assert told["c"]["told"] == "waits for a free place"
    assert told["a"]["stage"] == "segmentor"
    text = life.answers["running as text"].out
    assert re.search(r"life-micro-\w+: driven by process \d+ on \S+, which wrote this [\d.]+ s ago", text)
    assert "which a makes" in " ".join(text.split())


def test_a_sweep_that_is_driven_is_left_alone(life):
    for command in ("sync", "resume"):
        answer = life.answers[f"{command} while running"]
        assert answer.status == 2
        assert re.search(r"error: .*process \d+ on ", answer.err)


def test_status_of_a_killed_driver_says_how_to_go_on(life):
    text = life.answers["killed"].out
    assert re.search(r"(life-micro-\w+): nobody drives it any more; semformer-sweep resume \1\n", text)
    assert "interrupted; goes on" in text
    assert life.answers["killed as JSON"].json()["driver"] == ""
    assert life.answers["stop of nobody"].json()["stopped"] == ""


def test_what_mlflow_was_not_there_to_take_is_delivered_once(life):
    assert life.answers["sync"].json()["delivered"] > 0
    assert life.answers["sync again"].out == "0 records delivered\n"


def test_stop_ends_a_sweep_that_can_be_resumed(life):
    assert life.status_of_stopped == 130
    assert re.fullmatch(r"(life-micro-\w+) is stopped: semformer-sweep resume \1\n", life.answers["stop"].out)
    assert "stopped; the same command, or resume, goes on" in "".join(life.lines)
    assert "nobody drives it any more" in life.answers["stopped"].out
    assert life.answers["resumed"].json()["sweep/finished"] >= 1
    assert re.match(r"life-micro-\w+: ended\n", life.answers["ended"].out)


def test_no_stage_was_trained_twice_and_no_series_has_a_gap(life):
    made = Counter(artifact.key.stage for artifact in life.place.artifacts())
    assert made == {"caae": 2, "segmentor": 2, "cams": 3, "evaluate": 3}
    epochs = Counter(re.findall(r"([abc]): segmentor epoch (\d+)/60, total", "".join(life.lines)))
    assert sum(epochs.values()) - len(epochs) <= 2  # the epochs that the kill and the stop cut short
    assert {n for _, n in epochs} == {str(n) for n in range(1, 61)}
    runs = life.place.runs("life micro", "trial")
    assert Counter(run.info.status for run in runs) == {"FINISHED": 3}
    for run in runs:
        assert sorted(life.place.steps(run, "segmentor/loss/total")) == list(range(1, 61))


def test_the_second_of_two_like_sweeps_is_resumed_as_itself(tmp_path):
    place = Workplace(tmp_path)
    nowhere = ["table03", "--address", "nowhere"]  # which is refused, before anything is started
    place.call("run", *nowhere)
    first = SweepFolder(tmp_path / "sweeps" / sweep_name(place, "table03"))
    with first.drive(["by the first"]):
        place.call("run", *nowhere)
    answer = place.call("resume", f"{first.name}-2")
    assert answer.out.startswith("semformer-sweep run ")
    assert "--address nowhere" in answer.err
    assert first.started()[1] == ["by the first"]


# What a store keeps; last, because it deletes


def test_gc_deletes_only_what_no_sweep_reaches(place, tables):
    def paths() -> set:
        return {artifact.path for artifact in place.artifacts()}

    before, name = paths(), tables.answer.json()["sweep"]
    told = place.call("gc", "--grace", "0", "--json").json()
    assert not told["applied"]
    assert {one["why"] for one in told["found"]} <= {"a lease that has ended", "checkpoints of what is published"}
    answer = place.call("gc", "--grace", "0", "--drop", name)
    assert "could be deleted (--apply does it); kept for " in answer.out
    assert paths() == before
    told = place.call("gc", "--grace", "0", "--drop", name, "--apply", "--json").json()
    assert told["applied"]
    gone = Counter(path.parent.name for path in before - paths())
    assert gone["caae"] == gone["segmentor"] == 1  # those of seed 1
    assert name not in place.store.roots.all()
    searched = {digest for root in place.store.roots.all().values() for digest in root.digests}
    assert {path.name for path in paths()} >= searched & {path.name for path in before}
    told = place.call("plan", tables.paths[0], "--json").json()
    assert told["stages"]["segmentor"]["cached"] == 1
    assert place.call("gc", "--grace", "0").out.startswith("0.0 MB in 0 places could be deleted")
