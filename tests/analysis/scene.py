"""MLflow experiments filled as sweeps fill them, and what is needed to read compiled tables."""

import hashlib
import json
import re

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from analysis.tables import compile_from_mlflow
from semformer.config import flatten, load_config
from sweeps.plan.protocol import of_stages, uses
from sweeps.plan.table import load_table, resolve
from sweeps.tracking import rows as row_tags

TINY = load_config("tiny")
SCALES = ", ".join(map(str, TINY.cams.scales))
PAPER = [35.6, 43.5, 40.1, 42.0, 48.8, 48.8, 55.0, 55.8]
OURS = [34.8, 44.0, 41.2, 43.3, 50.1, 52.4, 66.0, 71.6]
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

ENDS = {"finished": "FINISHED", "failed": "FAILED", "pruned": "KILLED"}


class Sweep:
    """An MLflow experiment with trial runs as `sweeps.tracking` leaves them."""

    def __init__(self, folder, table="table03", preset="tiny", experiment=""):
        self.folder, self.uri = folder, f"sqlite:///{folder}/mlflow.db"
        self.client = MlflowClient(self.uri)
        self.table, self.preset = load_table(table), preset
        self.rows = {row.id: row for row in self.table.rows}
        self.experiment = experiment or f"{self.table.name} {preset}"
        known = self.client.get_experiment_by_name(self.experiment)
        location = str(folder / "artifacts")
        self.id = known.experiment_id if known else self.client.create_experiment(self.experiment, location)

    def trial(
        self,
        row,
        miou=None,
        *,
        seed=0,
        rows="",
        overrides=None,
        tags=None,
        protocol=None,
        begun=True,
        ended="",
        stages=(),
        **metrics,
    ):
        """Logs one run and returns its id; `tags` (None removes one), `protocol` and `metrics` add to the usual.

        Runs of equal configs and protocols are of one trial. `ended` is MLflow's own status. With `stages`, it is told
        which these are, and no settings but theirs; `metrics` by their full names are of others than the maps.
        """
        config = resolve(self.table, self.rows[row], self.preset, overrides or {}, seed)
        names = [f"{self.table.name}/{name}" for name in (rows or row).split(",")]
        usual = {"status": "finished", **row_tags.tags(names)} | (tags or {})
        run = self.record(config, miou, usual, protocol or {}, begun, stages, **metrics)
        if ended := ended or ENDS.get(usual["status"], ""):
            self.client.set_terminated(run, ended)
        return run

    def record(self, config, miou, tags, protocol, begun=True, stages=(), **metrics):
        split, fields = config.data.eval_split, flatten(config)
        if stages:
            fields = {name: value for name, value in fields.items() if uses(name, stages, fields)}
        settings = of_stages(stages or ("cams", "evaluate"), fields)
        protocol = {name: fields[setting.field] for name, setting in settings.items() if setting.field} | protocol
        key = hashlib.sha256(json.dumps([fields, config.seed, protocol]).encode()).hexdigest()
        usual = {
            "kind": "trial",
            "trial_key": key,
            "stage_keys": json.dumps({name: f"{name} of {key}" for name in stages}) if stages else None,
            "seed": str(config.seed),
            "preset": self.preset,
            "commit": "0123abcd",
            "masks_read_by": '["evaluate"]',
            "protocol": json.dumps(protocol),
        } | tags
        told = {name if "." in name else f"semformer.{name}": text for name, text in usual.items() if text is not None}
        run = self.client.create_run(self.id, tags=told).info.run_id
        values = {"miou": miou, "threshold": 0.31, **metrics}
        named = {name if "/" in name else f"cam/{split}/{name}": value for name, value in values.items()}
        logged = [Metric(name, value, 0, 0) for name, value in named.items() if value is not None]
        params = [Param(name, value if isinstance(value, str) else json.dumps(value)) for name, value in fields.items()]
        self.client.log_batch(run, logged, params * begun)
        return run

    def full(self, values=OURS, **options):
        """A trial for each row, or for the first rows."""
        return [self.trial(row, miou, **options) for row, miou in zip(self.rows, values, strict=False)]

    def compiled(self, table=None, **options):
        options = {"preset": self.preset, "tracking_uri": self.uri} | options
        (compiled,) = compile_from_mlflow([load_table(table or self.table.path)], **options)
        return compiled


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


def heading_and_lines(markdown):
    table = re.search(r"(?m)(^\|.*\n)+", markdown)[0]
    heading, _, *lines = [[entry.strip() for entry in line.split("|")[1:-1]] for line in table.splitlines()]
    return heading, lines


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
