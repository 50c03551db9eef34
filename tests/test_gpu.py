"""`make gpu`, on the CPU: the same script that a machine with a GPU runs."""

import re

import pytest

from tests.gpu.__main__ import main
from tests.gpu.rates import Rate, price


def test_the_gpu_script_runs_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "results" / "gpu.md"
    arguments = ["--device", "cpu", "--preset", "micro", "--seconds", "0.5", "--photographs", "16", "--out", str(out)]
    status = main(arguments)
    told = capsys.readouterr()
    assert status == 0, told.err
    report = out.read_text()
    assert report.strip() == told.out.strip()
    assert report.count("| yes |") == 5
    assert report.count("| skipped | needs a GPU") == 1
    for stage in ("caae", "segmentor", "cams", "affinity", "walk", "deeplab", "segmentation"):
        assert re.search(rf"\n\| {stage} \| [\d.]+ \| \S+ \| ", report), f"images/s and TFLOP/s of {stage}"
    for stage in ("affinity_labels", "segmentation"):
        assert re.search(rf"\n\| {stage} \| [^|]+\|[^|]+\|  \| [\de.-]+ \|", report), f"labels/s of the CRF in {stage}"
    assert "All tables are priced at the rates of preset paper." in report


def test_all_tables_are_priced_at_the_rates_that_were_measured(tmp_path):
    def hours(tflops: float) -> float:
        measured = {stage: Rate(tflops, 1e12, None, 0) for stage in ("caae", "segmentor", "cams")}
        told = price(measured, tmp_path)
        return float(re.fullmatch(r"All 14 tables, preset paper, at these rates: ([\d.]+) GPU-hours \(.*\)\.", told)[1])

    assert hours(40) == pytest.approx(57, rel=0.1), "as the plan counts them"
    assert hours(80) == pytest.approx(hours(40) / 2, abs=0.1)
