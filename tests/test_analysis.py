"""Tables compiled from a real MLflow database, filled as a sweep fills it."""

import hashlib
import json
import re
import shutil
import statistics
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from analysis.cli import main
from analysis.render import to_frame, to_latex, to_markdown, write_files
from analysis.tables import compile_from_mlflow
from semformer.config import flatten, load_config
from semformer.errors import UserError
from sweeps.plan.table import load_table, resolve

TINY = load_config("tiny")
SCALES = ", ".join(map(str, TINY.cams.scales))
PAPER = [35.6, 43.5, 40.1, 42.0, 48.8, 48.8, 55.0, 55.8]
OURS = [34.8, 44.0, 41.2, 43.3, 50.1, 52.4, 66.0, 71.6]


class Sweep:
    """An MLflow experiment with trial runs as sweeps/tracking.py leaves them."""

    def __init__(self, folder, table="table03", preset="tiny", experiment=""):
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.client = MlflowClient(self.uri)
        self.table, self.preset = load_table(table), preset
        self.rows = {row.id: row for row in self.table.rows}
        self.experiment = experiment or f"{self.table.name} {preset}"
        known = self.client.get_experiment_by_name(self.experiment)
        location = str(folder / "artifacts")
        self.id = known.experiment_id if known else self.client.create_experiment(self.experiment, location)

    def trial(self, row, miou=None, *, seed=0, rows="", overrides=None, tags=None, protocol=None, **metrics):
        """Logs one run and returns its id; `tags`, `protocol` and `metrics` replace or add to the usual."""
        config = resolve(self.table, self.rows[row], self.preset, overrides or {}, seed)
        split = config.data.eval_split
        usual_protocol = {
            "eval_split": split,
            "scales": config.cams.scales,
            "flip": config.cams.flip,
            "erosion": config.evaluate.erosion,
            "rule": config.evaluate.rule,
        }
        key = hashlib.sha256(f"{rows or row} {seed} {overrides} {protocol}".encode()).hexdigest()
        usual = {
            "kind": "trial",
            "trial_key": key,
            "table": self.table.name,
            "rows": ",".join(f"{self.table.name}/{r}" for r in (rows or row).split(",")),
            "seed": str(seed),
            "preset": self.preset,
            "status": "finished",
            "commit": "0123abcd",
            "masks_read_by": '["evaluate"]',
            "protocol": json.dumps(usual_protocol | (protocol or {})),
        }
        tags = {f"semformer.{name}": value for name, value in (usual | (tags or {})).items()}
        run = self.client.create_run(self.id, tags=tags).info.run_id
        values = {"miou": miou, "threshold": 0.31, **metrics}
        logged = [Metric(f"cam/{split}/{m}", v, 0, 0) for m, v in values.items() if v is not None]
        values = flatten(config).items()
        params = [Param(name, value if isinstance(value, str) else json.dumps(value)) for name, value in values]
        self.client.log_batch(run, logged, params)
        states = {"finished": "FINISHED", "failed": "FAILED"}
        if state := states.get(tags["semformer.status"]):
            self.client.set_terminated(run, state)
        return run

    def full(self, values=OURS, **options):
        """A trial for each row, or for the first rows."""
        return [self.trial(row, miou, **options) for row, miou in zip(self.rows, values, strict=False)]

    def compiled(self, **options):
        options = {"preset": self.preset, "tracking_uri": self.uri} | options
        (compiled,) = compile_from_mlflow([load_table(self.table.path)], **options)
        return compiled


@pytest.fixture(scope="module")
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


def cells(compiled, metric="miou"):
    return {line.id: line.cells[metric] for line in compiled.lines}


def grid(markdown):
    """{first entry: the other entries} of the first table in a Markdown text."""
    table = re.search(r"(?m)(^\|.*\n)+", markdown)[0]
    lines = [[entry.strip() for entry in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
    assert len({len(line) for line in lines}) == 1, "a line has more entries than another"
    return {line[0]: line[1:] for line in lines}


def note(markdown, heading):
    return " ".join(re.findall(rf"(?m)^- \*\*{heading}:\*\* (.*)", markdown))


def footnote(markdown, symbol):
    return re.search(rf"(?m)^- {re.escape(symbol)} (.*)", markdown)[1]


# ---- the table ----


def test_full_table_has_the_papers_layout(sweep):
    sweep.full()
    lines = grid(to_markdown(sweep.compiled()))
    assert list(lines)[2:] == ["L_CF", "L_CB", "L_AS", "L_AC", "mIoU (%) ours", "mIoU (%) paper"]
    assert lines[""] == ["TS-CAM", "SemFormer (ours)"] + [""] * 7
    assert lines["L_CF"] == ["–"] + ["✓"] * 8  # noqa: RUF001
    assert lines["L_AC"][1:] == ["", "", "", "✓", "", "✓", "✓", "✓"]
    assert lines["mIoU (%) ours"] == ["–", *(f"{v:.1f}" for v in OURS[:-1]), "**71.6**"]  # noqa: RUF001
    assert lines["mIoU (%) paper"] == ["40.3", *(f"{v:.1f}" for v in PAPER[:-1]), "**55.8**"]


def test_best_is_judged_as_printed(sweep):
    sweep.full([50.04, 49.96, 40.0])
    assert [cell.best for cell in cells(sweep.compiled()).values()][1:4] == [True, True, False]


def test_equal_values_have_no_best(sweep):
    sweep.full([50.04, 49.96])
    assert not any(cell.best for cell in cells(sweep.compiled()).values())


def test_notes_tell_what_the_numbers_are(sweep):
    sweep.full()
    text = to_markdown(sweep.compiled())
    assert note(text, "Ours") == "preset tiny; measured on split val; seed 0."
    assert "Table 3" in note(text, "Paper")
    assert "TS-CAM" in note(text, "Paper")
    assert note(text, "Threshold").startswith("oracle")
    assert "0.01 to 0.99 in steps of 0.01" in note(text, "Threshold")
    assert "activation map alone" in note(text, "Final map")
    assert note(text, "Protocol") == f"scales {SCALES}; flip yes; erosion 0."
    assert "stage evaluate alone, for the scores and the oracle threshold" in note(text, "Supervision audit")
    assert sweep.table.notes[0] in note(text, "Note")
    assert "†" not in text
    assert not note(text, "Runs")


def test_paper_values_come_from_the_table_file(sweep):
    sweep.full()
    edited = yaml.safe_load(sweep.table.text)
    edited["rows"][1]["paper"]["miou"] = 12.3
    edited["paper_only"][0]["paper"]["miou"] = 98.7
    path = Path(sweep.uri.removeprefix("sqlite:///")).parent / "edited.yaml"
    path.write_text(yaml.safe_dump(edited))
    (compiled,) = compile_from_mlflow([load_table(path)], preset="tiny", tracking_uri=sweep.uri)
    paper = grid(to_markdown(compiled))["mIoU (%) paper"]
    assert (paper[0], paper[2], paper[8]) == ("**98.7**", "12.3", "55.8")
    assert cells(compiled)["CF-CB"].mean == OURS[1]


def test_missing_failed_and_running_cells_say_so(sweep):
    sweep.trial("CF", 34.8)
    sweep.trial("CF-AS", tags={"status": "failed", "reason": "segmentor: \x1b[31mloss is nan\x1b[0m\n at <epoch> 3"})
    sweep.trial("CF-AC", tags={"status": "running"})
    sweep.trial("CF-CB-AS", tags={"status": "queued"})
    text = to_markdown(sweep.compiled())
    ours = grid(text)["mIoU (%) ours"]
    assert ours[1:] == ["34.8", "— [1]", "failed [2]", "running [3]", "queued [4]", "— [1]", "— [1]", "— [1]"]
    assert footnote(text, "[1]") == "not run"
    assert footnote(text, "[2]") == r"failed: segmentor: loss is nan at \<epoch> 3"
    assert footnote(text, "[3]").startswith("still running")


def test_a_run_that_ended_badly_without_a_word_has_failed(sweep):
    run = sweep.trial("CF", tags={"status": "running"})
    sweep.client.set_terminated(run, "KILLED")
    line = sweep.compiled().lines[1]
    assert line.status == "failed"
    assert line.cells["miou"].remarks == ("failed: no reason recorded",)


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_finished_trial_without_its_metric_is_no_number(sweep, value):
    sweep.trial("CF", value)
    cell = cells(sweep.compiled())["CF"]
    assert cell.mean is None
    assert cell.remarks == ("finished, but without a value of mIoU (%)",)


def test_several_seeds_give_mean_and_deviation(sweep):
    for seed, shift in ((0, 0.0), (1, 1.0), (2, 5.0)):
        sweep.full([v + shift for v in OURS], seed=seed)
    compiled = sweep.compiled()
    cell = cells(compiled)["CF"]
    assert cell.n == 3
    assert cell.mean == pytest.approx(OURS[0] + 2)
    assert cell.spread == pytest.approx(statistics.stdev([0, 1, 5]))
    text = to_markdown(compiled)
    assert grid(text)["mIoU (%) ours"][1] == "36.8 ± 2.6 (3)"
    assert grid(text)["mIoU (%) ours"][8] == "**73.6 ± 2.6 (3)**"
    assert "seeds 0, 1, 2" in note(text, "Ours")
    assert "over n seeds" in note(text, "Seeds")
    assert grid(to_markdown(sweep.compiled(seed=1)))["mIoU (%) ours"][1] == "35.8"


def test_seeds_without_a_value_are_named(sweep):
    sweep.full()
    sweep.trial("CF", 36.8, seed=1)
    sweep.trial("CF-AS-AC", seed=1, tags={"status": "failed", "reason": "out of memory"})
    text = to_markdown(sweep.compiled())
    ours = grid(text)["mIoU (%) ours"]
    assert ours[1:3] == ["35.8 ± 1.4 (2)", "44.0 (1) [1]"]
    assert ours[7] == "66.0 (1) [2]"
    assert footnote(text, "[1]") == "seed 1: not run"
    assert footnote(text, "[2]") == "seed 1: failed: out of memory"
    assert "do not all have the same seeds" in note(text, "Seeds")


# ---- comparability ----


@pytest.mark.parametrize(
    ("overrides", "protocol", "says"),
    [
        ({"evaluate.erosion": 7}, {}, "erosion = 7 (otherwise 0)"),
        ({"evaluate.rule": "fixed"}, {}, "rule = fixed (otherwise oracle)"),
        ({"cams.scales": "1.0"}, {}, f"scales = 1.0 (otherwise {SCALES})"),
        ({"data.eval_split": "train"}, {}, "eval_split = train (otherwise val)"),
        ({"segmentor.epochs": 50}, {}, f"segmentor.epochs = 50 (otherwise {TINY.segmentor.epochs})"),
        ({"caae.reconstruction": False}, {}, "caae.reconstruction = no (otherwise yes)"),
        ({}, {"data": "VOC2012"}, "data = VOC2012 (otherwise not recorded)"),
    ],
)
def test_a_deviating_cell_is_marked_and_never_the_best(sweep, overrides, protocol, says):
    sweep.full(OURS[:7])
    sweep.trial("CF-CB-AS-AC", 99.9, overrides=overrides, protocol=protocol)
    text = to_markdown(sweep.compiled())
    ours = grid(text)["mIoU (%) ours"]
    assert ours[8] == "99.9†"
    assert ours[7] == "**66.0**"
    assert footnote(text, "†") == f"not comparable: {says}"
    assert text.count("not comparable") == 1


def test_supervision_is_audited_cell_by_cell(sweep):
    sweep.full(OURS[:7])
    sweep.trial("CF-CB-AS-AC", 80.0, tags={"masks_read_by": '["segmentor", "evaluate"]'})
    text = to_markdown(sweep.compiled())
    assert footnote(text, "†") == "not comparable: pixel masks read by = segmentor, evaluate (otherwise evaluate)"
    assert "not in all cells" in note(text, "Supervision audit")


def test_supervision_audit_names_all_stages_that_read_masks(sweep):
    sweep.full(tags={"masks_read_by": '["segmentor", "evaluate"]'})
    text = to_markdown(sweep.compiled())
    assert note(text, "Supervision audit") == "pixel masks are read by segmentor, evaluate."
    assert "†" not in text


def test_fixed_threshold_is_told_apart_from_oracle(sweep):
    sweep.full(overrides={"evaluate.rule": "fixed"})
    text = to_markdown(sweep.compiled())
    assert note(text, "Threshold") == "fixed at 0.25, chosen without masks."
    assert note(text, "Supervision audit").endswith("stage evaluate alone, for the scores.")


def test_settings_other_than_the_presets_are_named(sweep):
    sweep.full(overrides={"segmentor.epochs": 1, "segmentor.sigma": 0.05})
    text = to_markdown(sweep.compiled())
    assert "preset tiny, segmentor.epochs = 1, segmentor.sigma = 0.05;" in note(text, "Ours")
    assert "†" not in text


def test_runs_of_other_settings_are_left_out_and_can_be_chosen(sweep):
    sweep.full()
    sweep.full([1.0] * 8, overrides={"segmentor.epochs": 1})
    compiled = sweep.compiled()
    assert [cell.mean for cell in cells(compiled).values()][1:] == OURS
    assert "8 other runs of these cells left out: segmentor.epochs = 1" in note(to_markdown(compiled), "Runs")
    chosen = sweep.compiled(overrides={"segmentor.epochs": "1"})
    assert [cell.mean for cell in cells(chosen).values()][1:] == [1.0] * 8
    assert "preset tiny, segmentor.epochs = 1;" in note(to_markdown(chosen), "Ours")


def test_duplicate_runs_of_a_trial_newest_finished_wins(sweep):
    sweep.full()
    newest = sweep.trial("CF", 36.0)
    sweep.trial("CF", tags={"status": "failed", "reason": "crashed"})
    compiled = sweep.compiled()
    assert cells(compiled)["CF"].mean == 36.0
    assert compiled.lines[1].trials[0].run_id == newest
    assert re.search(
        rf"has 3 runs; the newest finished one, {newest[:8]}, is shown", note(to_markdown(compiled), "Runs")
    )


def test_rows_that_share_a_trial_show_the_same_run(sweep):
    run = sweep.trial("CF", 34.8, rows="CF,CF-CB")
    compiled = sweep.compiled()
    assert [line.trials[0].run_id for line in compiled.lines[1:3]] == [run, run]
    assert "†" not in to_markdown(compiled)


def test_a_row_whose_definition_changed_since_the_run_deviates(sweep, tmp_path):
    sweep.full()
    edited = yaml.safe_load(sweep.table.text)
    edited["rows"][0]["set"]["segmentor.losses"] = "CF"
    path = tmp_path / "edited.yaml"
    path.write_text(yaml.safe_dump(edited))
    (compiled,) = compile_from_mlflow([load_table(path)], preset="tiny", tracking_uri=sweep.uri)
    assert cells(compiled)["CF"].deviations == ("segmentor.losses = CF, SS (otherwise CF)",)


# ---- other layouts ----

CRA = """
name: cra
title: Class-relative attention & co_1
source: Table 12
metrics:
  - {name: miou, header: mIoU (%)}
  - {name: fp, header: FP (%), best: min}
layout: {marks: [{name: CRA, header: CRA}, {name: U, header: U, latex: $U$}]}
rows:
  - {id: without, label: without, marks: {CRA: false}, set: {cams.final_map: activation}, paper: {miou: 55.8, fp: 20.5}}
  - id: with
    label: "[with] | both"
    marks: {CRA: true, U: 4}
    set: {cams.final_map: both}
    paper: {miou: 63.7, fp: null}
"""


@pytest.fixture
def cra(database):
    path = database / "cra.yaml"
    path.write_text(CRA)
    sweep = Sweep(database, path)
    sweep.trial("without", 60.0, fp=20.0)
    sweep.trial("with", 70.0, fp=25.0)
    return sweep


def test_rows_down_with_two_metrics(cra):
    text = to_markdown(cra.compiled())
    lines = [line.strip("| ") for line in re.search(r"(?m)(^\|.*\n)+", text)[0].splitlines()]
    entries = [re.split(r" *\| *", line) for line in lines]
    assert entries[0] == ["CRA", "U", "mIoU (%) ours", "mIoU (%) paper", "FP (%) ours", "FP (%) paper"]
    assert entries[2] == ["✗", "", "60.0", "55.8", "**20.0**", "20.5"]
    assert entries[3] == ["✓", "4", "**70.0**", "**63.7**", "25.0", "–"]  # noqa: RUF001
    assert note(text, "Final map") == "differs from row to row."


def test_rows_are_labelled_where_marks_do_not_tell_them(cra, tmp_path):
    path = tmp_path / "labelled.yaml"
    path.write_text(CRA + "paper_only: [{id: TS-CAM, label: TS-CAM, paper: {miou: 40.3, fp: null}}]\n")
    (compiled,) = compile_from_mlflow([load_table(path)], preset="tiny", tracking_uri=cra.uri)
    lines = grid(to_markdown(compiled))
    assert lines["TS-CAM"] == ["–", "–", "–", "40.3", "–", "–"]  # noqa: RUF001
    assert lines[r"[with] \| both"][:3] == ["✓", "4", "**70.0**"]


# ---- axes whose values are scaled ----


def heading_and_lines(markdown):
    table = re.search(r"(?m)(^\|.*\n)+", markdown)[0]
    heading, _, *lines = [[entry.strip() for entry in line.split("|")[1:-1]] for line in table.splitlines()]
    return heading, lines


def test_a_scaled_axis_shows_our_values_beside_the_papers(database):
    sweep = Sweep(database, "table08")
    sweep.full([40.0, 45.0, 50.0])  # of the last row nothing is measured: it shows what it would have
    compiled = sweep.compiled()
    heading, lines = heading_and_lines(to_markdown(compiled))
    assert heading == ["D ours", "D paper", "mIoU (%) ours", "mIoU (%) paper"]
    assert [line[:2] for line in lines] == [["4", "32"], ["16", "128"], ["32", "256"], ["64", "512"]]
    assert [line[2] for line in lines] == ["40.0", "45.0", "**50.0**", "— [1]"]
    source = to_latex(compiled)
    check_latex(source)
    assert r"\shortstack{$D$\\ours} & \shortstack{$D$\\paper} & \shortstack{mIoU (\%)\\ours}" in source
    assert "D = 32, 4, 0, finished, 40.00" in source
    frame = to_frame(compiled)
    assert frame["settings"].tolist() == ["D = 4", "D = 16", "D = 32", "D = 64"]


def test_a_scaled_axis_of_a_transposed_table(database):
    sweep = Sweep(database, "table13")
    sweep.full([50.0, 51.0, 52.0, 53.0, 53.0, 53.0, 53.0], fp=20.0, fn=30.0)
    lines = grid(to_markdown(sweep.compiled()))
    assert lines["U ours"] == ["1", "2", "3", "4", "4", "4", "4"]
    assert lines["U paper"] == ["1", "2", "3", "4", "5", "6", "7"]
    assert lines["FN (%) ours"] == ["30.0"] * 7
    assert lines["FN (%) paper"][5:] == ["**15.7**", "16.5"]
    check_latex(to_latex(sweep.compiled()))


def test_the_papers_own_values_are_shown_once(database):
    sweep = Sweep(database, "table06", preset="paper")
    sweep.full([59.0, 61.0, 63.0])
    heading, lines = heading_and_lines(to_markdown(sweep.compiled()))
    assert heading == ["Backbone", "mIoU (%) ours", "mIoU (%) paper"]
    assert [line[0] for line in lines] == ["DeiT-S", "DeiT-B", "DeiT-B↑"]


def test_a_scaled_axis_shows_what_the_run_had_not_what_the_file_says_now(database, tmp_path):
    sweep = Sweep(database, "table08")
    sweep.full([40.0, 45.0, 50.0, 48.0])
    path = tmp_path / "edited.yaml"
    path.write_text(sweep.table.text.replace("{caae.class_dim: 64}", "{caae.class_dim: 128}"))
    (compiled,) = compile_from_mlflow([load_table(path)], preset="tiny", tracking_uri=sweep.uri)
    _, lines = heading_and_lines(to_markdown(compiled))
    assert lines[3][:3] == ["64", "512", "48.0†"]
    assert compiled.lines[3].cells["miou"].deviations == ("caae.class_dim = 64 (otherwise 128)",)


# ---- several tables ----


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


def test_a_trial_fills_rows_of_several_tables(tables):
    sweep, _ = tables
    names = ["table08", "table11", "table05"]
    compiled = compile_from_mlflow([load_table(name) for name in names], preset="tiny", tracking_uri=sweep.uri)
    assert [table.table.name for table in compiled] == ["table08", "table11"]
    assert [cell.mean for cell in cells(compiled[0]).values()] == [40.0, None, 50.0, None]
    assert [cell.mean for cell in cells(compiled[1]).values()] == [45.0, 50.0]
    assert {table.experiment for table in compiled} == {"tables tiny"}
    assert "†" not in to_markdown(compiled[1])


def test_all_tables_are_read_once_counted_written_and_kept(tables, tmp_path, capsys, monkeypatch):
    sweep, parent = tables
    search, searched = MlflowClient.search_runs, []
    monkeypatch.setattr(
        MlflowClient, "search_runs", lambda *args, **query: searched.append(query) or search(*args, **query)
    )
    assert main(["tables", "--all", "--tracking-uri", sweep.uri, "--out", str(tmp_path / "out"), "--log"]) == 0
    assert len(searched) == 1
    printed = capsys.readouterr().out
    assert re.findall(r"(?m)^### (\w+):", printed) == ["table08", "table11"]
    last = printed.splitlines()[-1]
    assert last.startswith("4 of 51 cells filled; no trial of table03, table04, ")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.md")) == ["table08.md", "table11.md"]
    kept = {file.path for file in sweep.client.list_artifacts(parent)}
    assert kept == {"table08.md", "table08.tex", "table11.md", "table11.tex"}


def test_one_table_is_found_in_its_own_experiment_or_in_that_of_several(tables, database):
    sweep, _ = tables
    options = {"preset": "tiny", "tracking_uri": sweep.uri}
    (compiled,) = compile_from_mlflow([load_table("table11")], **options)
    assert compiled.experiment == "tables tiny"
    Sweep(database, "table11").trial("with", 60.0)
    (compiled,) = compile_from_mlflow([load_table("table11")], **options)
    assert compiled.experiment == "table11 tiny"
    assert cells(compiled)["with"].mean == 60.0


def test_latex_of_several_tables_ends_with_a_comment(tables, capsys):
    sweep, _ = tables
    assert main(["tables", "table08", "table11", "--format", "latex", "--tracking-uri", sweep.uri]) == 0
    printed = capsys.readouterr().out
    assert printed.count(r"\begin{table}") == 2
    assert printed.splitlines()[-1] == "% 4 of 6 cells filled"


# ---- LaTeX ----


def check_latex(source):
    """Strict enough to find what breaks a table: nesting, column counts, bare specials, unknown characters."""
    body = "\n".join(line for line in source.splitlines() if not line.startswith("%"))
    assert body.isascii()
    stack = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", body):
        if kind == "begin":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert not stack
    depth = 0
    for token in re.findall(r"\\.|[{}]", body):
        depth += {"{": 1, "}": -1}.get(token, 0)
        assert depth >= 0
    assert depth == 0
    assert len(re.findall(r"(?<!\\)\$", body)) % 2 == 0
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", body)[1]
    before, inside, after = re.split(r"\\toprule\n|\\bottomrule", body)
    for line in inside.replace("\\midrule\n", "").splitlines():
        assert line.endswith(r" \\")
        spans = [int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", line)]
        assert 1 + len(re.findall(r"(?<!\\)&", line)) + sum(spans) == len(columns)
    assert not re.search(r"(?<!\\)[&#%]", before + after)
    assert "_" not in re.sub(r"\$[^$]*\$|\\_|\\label\{[^}]*\}", "", body)


def awkward(sweep):
    sweep.trial("CF", 34.8)
    sweep.trial("CF-CB", 44.0, overrides={"evaluate.erosion": 7})
    reason = "50% of $PATH_1 & {x} ~ ^ \\n #3 --set a|b <c>"
    sweep.trial("CF-AS", tags={"status": "failed", "reason": reason})
    return sweep.compiled()


def test_latex_has_the_papers_layout(sweep):
    sweep.full()
    source = to_latex(sweep.compiled())
    check_latex(source)
    assert r"& TS-CAM & \multicolumn{8}{c}{SemFormer (ours)} \\" in source
    assert r"$\mathcal{L}_{CF}$ & \textendash{} & \checkmark{} &" in source
    assert r"& 66.0 & \textbf{71.6} \\" in source
    assert r"mIoU (\%) paper & 40.3 & 35.6 &" in source


def test_latex_of_awkward_texts_is_well_formed(sweep):
    source = to_latex(awkward(sweep))
    check_latex(source)
    assert r"failed\textsuperscript{[1]}" in source
    assert r"34.8 & 44.0\textsuperscript{\dag{}}" in source
    assert r"50\% of \$PATH\_1 \& \{x\}" in source


def test_latex_of_rows_down_and_of_seeds_is_well_formed(cra):
    path = cra.table.path
    path.write_text(path.read_text() + "paper_only: [{id: TS-CAM, label: TS-CAM, paper: {miou: 40.3, fp: null}}]\n")
    cra.trial("with", 72.0, fp=24.0, seed=1)
    source = to_latex(cra.compiled())
    check_latex(source)
    assert "\n{}[with] " in source
    assert r"\shortstack{71.0\\{\scriptsize $\pm$ 1.4}\\{\scriptsize (2)}}" in source
    assert r"without & $\times$ &" in source


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")
def test_latex_compiles(sweep, tmp_path):
    document = r"\documentclass{article}\usepackage{booktabs,amssymb}\begin{document}" + "\n"
    (tmp_path / "document.tex").write_text(document + to_latex(awkward(sweep)) + r"\end{document}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "document.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-2000:]


# ---- traceability ----


def test_every_measured_cell_is_traceable_to_its_run(sweep, tmp_path):
    sweep.full()
    sweep.full([v + 1 for v in OURS], seed=1)
    compiled = sweep.compiled()
    paths = write_files(compiled, tmp_path / "out")
    assert [path.name for path in paths] == ["table03.md", "table03.tex", "table03.parquet"]
    markdown, latex = (path.read_text() for path in paths[:2])
    assert (markdown, latex) == (to_markdown(compiled), to_latex(compiled))
    frame = pd.read_parquet(paths[2])
    pd.testing.assert_frame_equal(frame, to_frame(compiled))
    measured = frame[frame["status"] == "finished"]
    assert len(measured) == 16
    for cell in measured.to_dict("records"):
        run = sweep.client.get_run(cell["run_id"])
        assert cell["value"] == run.data.metrics["cam/val/miou"]
        assert cell["trial_key"] == run.data.tags["semformer.trial_key"]
        assert str(cell["seed"]) == run.data.tags["semformer.seed"]
        line = rf"\| {re.escape(cell['label'])} +\| +{cell['seed']} .*{cell['value']:.2f}.* {cell['run_id'][:8]} "
        assert re.search(line, markdown)
        assert re.search(rf"(?m)^% .*{cell['run_id']}, {cell['trial_key']}$", latex)
    paper_only = frame[frame["row"] == "TS-CAM"].iloc[0]
    assert (paper_only["status"], paper_only["paper"]) == ("paper only", 40.3)
    assert pd.isna(paper_only["value"])


def test_the_printed_filter_finds_the_run(sweep):
    runs = sweep.full()
    compiled = sweep.compiled()
    query = re.search(r"filter: `(.*)`", to_markdown(compiled))[1]
    key = compiled.lines[-1].trials[0].trial_key[:8]
    found = sweep.client.search_runs([sweep.id], query.replace("KEY", key))
    assert [run.info.run_id for run in found] == [runs[-1]]


# ---- the command line ----


def test_command_prints_and_writes(sweep, tmp_path, capsys):
    sweep.full()
    command = ["tables", "table03", "--tracking-uri", sweep.uri]
    assert main([*command, "--out", str(tmp_path / "out"), "--format", "both"]) == 0
    printed = capsys.readouterr()
    assert printed.out == to_markdown(sweep.compiled()) + "\n" + to_latex(sweep.compiled())
    assert printed.err.count("wrote ") == 3
    assert main([*command, "--experiment", "another sweep"]) == 2
    assert main([*command, "--seed", "0", "--set", f"segmentor.epochs={TINY.segmentor.epochs}"]) == 0


def test_a_sweep_of_more_than_a_page_of_runs_is_read_whole(sweep, monkeypatch):
    sweep.full()
    search = MlflowClient.search_runs
    monkeypatch.setattr(MlflowClient, "search_runs", lambda *args, **query: search(*args, **query, max_results=3))
    assert [cell.mean for cell in cells(sweep.compiled()).values()][1:] == OURS


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tabel03"], "did you mean table03"),
        (["table03", "table08", "table03"], "the table table03 is given twice"),
        (["table03", "table08"], "no experiment 'tables tiny': there are 'another sweep', 'table03 tiny'"),
        (
            ["table05", "table08", "--experiment", "table03 tiny"],
            "has no trial of table05, table08 with preset tiny; it",
        ),
        (["table03", "--all"], "give --all alone"),
        ([], "which tables?"),
        (
            ["table03", "--preset", "micro"],
            "no experiment 'table03 micro' or 'tables micro': there are 'another sweep', 'table03 tiny'",
        ),
        (["table03", "--preset", "micro", "--experiment", "table03 tiny"], "it has table03 tiny"),
        (["table03", "--experiment", "another sweep"], "it has no trial at all"),
        (["table03", "--seed", "5"], "no trial of experiment 'table03 tiny' has seed 5: there are 0"),
        (["table03", "--set", "segmentor.sigmo=1"], "did you mean segmentor.sigma"),
        (
            ["table03"],
            "no trial of experiment 'table03 tiny' has finished yet: CF failed, CF + CB running\nfailed: disk",
        ),
        (["table03", "--tracking-uri", "http://127.0.0.1:9"], "cannot read MLflow at http://127.0.0.1:9"),
        (["table03", "--tracking-uri", "mysql://me:secret@127.0.0.1:9/x"], "cannot read MLflow at mysql://me:***@127"),
        (["table03", "--tracking-uri", "nonsense://x"], "cannot read MLflow at nonsense://x"),
    ],
)
def test_bad_input_is_told_in_words(sweep, capsys, arguments, says):
    sweep.trial("CF", tags={"status": "failed", "reason": "disk full"})
    sweep.trial("CF-CB", tags={"status": "running"})
    uri = [] if "--tracking-uri" in arguments else ["--tracking-uri", sweep.uri]
    assert main(["tables", *arguments, *uri]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert "secret" not in error


def test_reading_makes_no_database(tmp_path, capsys):
    path = tmp_path / "deep" / "mlflow.db"
    assert main(["tables", "table03", "--tracking-uri", f"sqlite:///{path}"]) == 2
    assert f"there is no MLflow database {path}" in capsys.readouterr().err
    assert not path.parent.exists()


def test_a_deleted_experiment_is_no_experiment(sweep, capsys):
    sweep.full()
    sweep.client.delete_experiment(sweep.id)
    assert main(["tables", "table03", "--tracking-uri", sweep.uri]) == 2
    assert "no experiment 'table03 tiny' or 'tables tiny': there are 'another sweep'" in capsys.readouterr().err


def test_a_file_that_is_no_database_is_told(tmp_path, capsys):
    (tmp_path / "mlflow.db").write_text("this is no database at all" * 100)
    assert main(["tables", "table03", "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]) == 2
    assert "cannot read MLflow" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told(sweep, tmp_path, capsys):
    sweep.full()
    (tmp_path / "file").write_text("")
    assert main(["tables", "table03", "--tracking-uri", sweep.uri, "--out", str(tmp_path / "file" / "x")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_runs_of_no_row_of_the_table_are_told(sweep, tmp_path):
    sweep.trial("CF", 34.8, tags={"rows": f"{sweep.table.name}/renamed"})
    with pytest.raises(UserError, match="have the rows been renamed"):
        sweep.compiled()
