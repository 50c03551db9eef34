"""`make gpu`, on the CPU: the same script that a machine with a GPU runs."""

from tests.gpu.__main__ import main


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
    for stage in ("caae", "segmentor", "cams"):
        assert f"\n| {stage} | " in report
    assert "All 14 tables, preset paper, at these rates: " in report
