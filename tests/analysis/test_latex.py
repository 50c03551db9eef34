"""LaTeX that compiles."""

import re
import shutil
import subprocess

import pytest

from analysis.render import to_latex
from tests.analysis.scene import check_latex


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


def test_a_row_named_as_a_heading_keeps_its_values(cra):
    path = cra.folder / "named.yaml"
    text = re.sub(r"layout: .*\n|(, |    )marks: \{.*?\}\n?", "", cra.table.text)
    path.write_text(text.replace("label: without", 'label: "SemFormer (ours)"'))
    (line,) = (line for line in to_latex(cra.compiled(path)).splitlines() if line.startswith("SemFormer (ours) &"))
    assert "60.0" in line


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
