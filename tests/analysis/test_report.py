"""The report: well-formed, on its own, with the table's values and where they come from; in a browser."""

import json
import re
import shutil
import subprocess

import html5lib
import pytest
from matplotlib.figure import Figure

from analysis.chance import with_chance
from analysis.cli import main
from analysis.figures import Drawn
from analysis.render import to_markdown
from analysis.report import to_html
from tests.analysis.scene import Sweep, grid

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
HTML = "{http://www.w3.org/1999/xhtml}"


def parsed(html):
    """Raises for anything that is not as the standard wants it."""
    return html5lib.HTMLParser(strict=True).parse(html)


def text_of(element):
    return " ".join("".join(element.itertext()).split())


def table_of(page, name):
    """The lines of a table of the paper: of each place the text."""
    (section,) = (s for s in page.iter(f"{HTML}section") if s.find(f"{HTML}h2").get("id") == name)
    table = next(section.iter(f"{HTML}table"))
    return [[text_of(place) for place in line] for line in table.iter(f"{HTML}tr")]


def popovers_of(page):
    return {e.get("id"): text_of(e) for e in page.iter() if e.get("popover") is not None}


def facts_of(page):
    texts = [text_of(e) for e in next(page.iter(f"{HTML}dl"))]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def drawn(name):
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2], [3, 4])
    return Drawn(name, f"Title of {name}", "Two seeds.", figure)


def report(sweep, *figures):
    return to_html(with_chance([sweep.compiled()], sweep.uri), figures)


def test_it_is_html_that_loads_nothing(cra):
    html = report(cra, drawn("cra-axis"), drawn("cost"))
    page = parsed(html)
    links = [v for e in page.iter() for k, v in e.attrib.items() if k in ("src", "href", "action", "data", "srcset")]
    assert links
    assert all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in links)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp", html)
    ids = [e.get("id") for e in page.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)


@pytest.mark.parametrize("name", ["table03", "cra"])
def test_its_tables_are_those_of_the_markdown(name, sweep, cra):
    """Laid out across and down."""
    own = cra if name == "cra" else sweep
    if name == "table03":
        own.full()
    (compiled,) = with_chance([own.compiled()], own.uri)
    page = parsed(to_html([compiled], []))
    lines = table_of(page, name)[1:]
    plain = {key.replace("\\", ""): value for key, value in grid(to_markdown(compiled)).items()}
    assert [line[0] for line in lines] == [*plain][2:]
    told = [[re.sub(r"[*\\]", "", text) for text in line] for line in plain.values()]
    assert [line[1:] for line in lines] == told[2:]
    across = compiled.table.layout.transposed
    sortable = [own for own in page.iter(f"{HTML}table") if own.get("class") == "sortable"]
    assert len(sortable) == (not across)


def test_every_cell_opens_where_it_comes_from(cra):
    page = parsed(report(cra))
    (compiled,) = with_chance([cra.compiled()], cra.uri)
    popovers = popovers_of(page)
    opens = [e.get("popovertarget") for e in page.iter(f"{HTML}button") if e.get("popovertargetaction") is None]
    assert sorted(filter(None, opens)) == sorted(f"cra.{line.id}" for line in compiled.lines for _ in line.cells)
    for line in compiled.lines:
        told = popovers[f"cra.{line.id}"]
        assert line.trials[0].run_id in told
        assert f"semformer-tables why cra {line.id} --preset tiny" in told
    assert "cams.final_map = activation" in popovers["cra.without"]


def test_failed_and_missing_rows_say_why(sweep):
    sweep.trial("CF", 40.0)
    sweep.trial("CF-CB", tags={"status": "failed", "reason": "the loss <diverged> & burst"})
    page = parsed(report(sweep))
    popovers = popovers_of(page)
    assert "failed: the loss <diverged> & burst" in popovers["table03.CF-CB"]
    assert "not run" in popovers["table03.CF-AS"]
    ours = table_of(page, "table03")[-2]
    assert ours[2].startswith("40.0")
    assert ours[3] == "failed[1]"
    assert ours[4] == "—[2]"


def test_the_answer_comes_first(sweep):
    """Values as ordered as the paper's, but for two neighbours; two trials that share their CAAE."""
    for i, (row, miou) in enumerate(zip(sweep.rows, [30.0, 43.0, 41.0, 42.0, 50.0, 51.0, 61.0, 60.0], strict=True)):
        keys = {"caae": "shared", "segmentor": f"own {i}"}
        seconds = {"caae/seconds": 3600.0, "segmentor/seconds": 1800.0}
        sweep.trial(row, miou, tags={"stage_keys": json.dumps(keys)}, **seconds)
    told = facts_of(parsed(report(sweep)))
    assert next(iter(told)) == "Order of the rows"
    assert told["Order of the rows"].startswith("26 of 27 and 24 of 24 (seed 0) pairs as in the paper")
    assert told["Cells"] == "8 of 8 rows measured, by 8 runs"
    assert told["Cost"] == f"{1 + 8 * 0.5:.1f} hours of stages, each made once; had no run shared one, {8 * 1.5:.1f}"
    assert told["Pixel masks"] == "read by evaluate; by no other stage"
    assert told["Seeds"] == "0"


def test_only_what_has_ended_well_is_counted(sweep):
    sweep.trial("CF", 40.0)
    sweep.trial("CF", 42.0, seed=1)
    sweep.trial("CF-AS", 50.0, protocol={"erosion": 7})
    sweep.trial("CF-CB", tags={"status": "stopped"}, seed=2)
    page = parsed(report(sweep))
    told, popovers = facts_of(page), popovers_of(page)
    assert (told["Cells"], told["Seeds"]) == ("2 of 8 rows measured, by 3 runs", "0, 1")
    assert "2stopped: " in popovers["table03.CF-CB"]
    assert re.search(r"0finished40\.000\.31\w{32}", popovers["table03.CF"])
    assert popovers["table03.CF-AS"].count("Not comparable: ") == 1
    assert "Not comparable" not in popovers["table03.CF"]


def test_best_rows_are_named(sweep, cra):
    """Of two seeds, another row than the paper's; and none at all."""
    sweep.trial("CF", tags={"status": "failed"})
    (empty,) = with_chance([sweep.compiled()], sweep.uri)
    cra.trial("without", 80.0, seed=1, fp=20.0)
    page = parsed(to_html([empty, *with_chance([cra.compiled()], cra.uri)], []))
    lines = [[text_of(place) for place in line] for line in next(page.iter(f"{HTML}tbody"))]
    assert [line[1:] for line in lines] == [
        ["nothing is measured", f"{empty.lines[-1].label}: 55.8"],
        ["without: 70.0 ± 14.1 (2)", "[with] | both: 63.7"],
    ]


def test_a_stage_costs_what_it_took_though_not_all_runs_tell(sweep):
    """The run that found it, and knows no time, comes last."""
    for row, seconds in (("CF", 7200.0), ("CF-CB", None)):
        told = {"caae/seconds": seconds} if seconds else {}
        sweep.trial(row, 40.0, tags={"stage_keys": json.dumps({"caae": "shared"})}, **told)
    assert facts_of(parsed(report(sweep)))["Cost"].startswith("2.0 hours of stages")


def test_of_nothing_finished_no_more_is_told(sweep):
    sweep.trial("CF", tags={"status": "queued"}, begun=False)
    assert facts_of(parsed(report(sweep))) == {"Cells": "0 of 8 rows measured, by 0 runs", "Preset": "tiny"}


def test_figures_stand_under_their_table(cra):
    page = parsed(report(cra, drawn("cra-axis"), drawn("cradle-axis"), drawn("cost")))
    (section,) = page.iter(f"{HTML}section")
    assert [e.get("alt") for e in section.iter(f"{HTML}img")] == ["Title of cra-axis"]
    assert [e.get("alt") for e in page.iter(f"{HTML}img")] == [
        f"Title of {name}" for name in ("cra-axis", "cradle-axis", "cost")
    ]
    assert "Title of cost. Two seeds." in [text_of(e) for e in page.iter(f"{HTML}figcaption")]


def test_figures_of_a_table_whose_name_begins_with_anothers_stand_once(cra):
    page = parsed(report(cra, drawn("cra-axis"), drawn("cra-2-axis")))
    (section,) = page.iter(f"{HTML}section")
    assert [image.get("alt") for image in section.iter(f"{HTML}img")] == ["Title of cra-axis"]
    assert len([*page.iter(f"{HTML}img")]) == 2


def test_the_command_writes_it(cra, capsys):
    path = cra.folder / "made" / "report.html"
    assert main(["report", str(cra.table.path), "--tracking-uri", cra.uri, "--out", str(path)]) == 0
    told = capsys.readouterr()
    assert (told.out, told.err.splitlines()[-1]) == ("", f"wrote {path}")
    assert table_of(parsed(path.read_text()), "cra")
    assert main(["report", str(cra.table.path), "--tracking-uri", cra.uri, "--out", str(cra.folder)]) == 2
    assert f"cannot write {cra.folder}" in capsys.readouterr().err
    assert main(["report", "table05", "--tracking-uri", cra.uri]) == 2
    assert "has no trial of table05" in capsys.readouterr().err


@pytest.mark.skipif(not BROWSER, reason="chromium is not installed")
def test_a_browser_sorts_and_opens_it(database):
    sweep = Sweep(database, "table08")
    for row, miou in zip(sweep.rows, [61.0, 9.5, 70.0, 62.0], strict=True):
        sweep.trial(row, miou)
    act = """<script>
      const table = document.querySelector("#table08 ~ .wide table"), heads = [...table.tHead.rows[0].cells];
      const column = heads.findIndex((head) => head.textContent.startsWith("mIoU (%) ours")), told = [];
      for (let i = 0; i < 2; i++) {
        heads[column].querySelector("button").click();
        told.push([...table.tBodies[0].rows].map((row) => row.cells[column].textContent.trim()));
      }
      document.querySelector("button.cell").click();
      told.push(document.querySelector("[popover]:popover-open").id);
      console.log("told " + JSON.stringify(told));
    </script></body>"""
    page = database / "report.html"
    page.write_text(report(sweep).replace("</body>", act))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=60)
    lines = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert len(lines) == 1, lines
    rising, falling, opened = json.loads(re.search(r'told (.*)", source', lines[0])[1])
    assert rising == ["9.5", "61.0", "62.0", "70.0"]
    assert falling == rising[::-1]
    assert opened.startswith("table08.")
