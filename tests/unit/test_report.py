"""``--report``: rows of the heat map, and pictures and pages that say what they are to say, whatever names processes
have."""

from __future__ import annotations

import html
import os
import re
import shlex
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.image import imread

import incdump
from incdump.cli import report as report_module
from incdump.cli.main import main
from incdump.cli.report import LastDump, Origin, Record, Report, render
from incdump.cli.report_figure import _SETTINGS, draw, title_lines
from incdump.cli.report_rows import heat_map
from incdump.cli.text import bytes_text
from incdump.errors import IncdumpError
from incdump.model.precopy import MappingWrites, PrecopyPolicy, PrecopyRound, should_stop
from incdump.model.stats import DumpResult, DumpStats, FreezePart
from tests.command import NO_PID

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle


class Named(NamedTuple):
    """As much of a target as the command asks for."""

    comm: str


Capture = pytest.CaptureFixture[str]

ODD_NAMES = (
    "/tmp/$x_{1$ \\frac$",
    "</text><script>alert(1)</script>&amp;",
    "\x1b[31mred\x00\n\r\t\x7f",
    "\ufffe\udc80 日本 \u202e",
    "/" + "long" * 1000,
    "",
)
ORIGIN = Origin("somehost (Linux 6.18.0, x86_64)", "2026-01-02 03:04:05 +0100", "incdump precopy -t 7 -D x", "1.2.3")
PARTS = [FreezePart("freezing", 900), FreezePart("scan", 4000), FreezePart("copy", 11_000), FreezePart("rest", 2500)]


def written(
    start: int, end: int, pages: int, *, name: str = "[heap]", pid: int = 7, comm: str = "worker"
) -> MappingWrites:
    return MappingWrites(pid=pid, comm=comm, start=start << 12, end=end << 12, name=name, pages=pages)


def record(
    rounds: int, *, last: bool = True, comm: str = "worker", names: tuple[str, ...] = ("[heap]", "[stack]")
) -> Record:
    """A loop of so many rounds."""
    found = Record(7, comm, PrecopyPolicy(downtime=0.05), ORIGIN)
    for n in range(rounds):
        size = 300 << 20 if n == 0 else (40 << 20) // (n + 1)
        done = PrecopyRound(
            number=n + 1,
            started=0.5 * n,
            seconds=0.45,
            scan_seconds=0.01,
            write_seconds=0.3,
            pages_scanned=100_000,
            bytes_written=size,
            throttled=0.5 if n > 3 else 0.0,
        )
        found.rounds.append(done)
        found.decisions.append(should_stop(found.rounds, found.policy))
        found.written.append([written(256 * k, 256 * k + 200, 10 + k, name=name) for k, name in enumerate(names)])
    found.tracker, found.processes = "uffd-wp", 3
    if last:
        found.written.append([written(0, 200, 5, name=names[0])])
        found.last = LastDump(rounds * 0.5 + 0.1, 3 << 20, PARTS)
    else:
        found.failure = "process 7 writes too fast: 9 s are over"
    return found


def svg_texts(data: bytes) -> list[str]:
    """Every text in a picture; it is well-formed."""
    return [
        "".join(node.itertext()).replace("\u00a0", " ")
        for node in ET.fromstring(data).iter("{http://www.w3.org/2000/svg}text")
    ]


# -- the heat map's rows ---------------------------------------------------------------------------------------------


def test_a_mapping_that_grows_or_merges_with_its_neighbours_is_one_row() -> None:
    heat = heat_map(
        [
            [written(10, 20, 1), written(20, 30, 2), written(50, 60, 3)],
            [written(10, 30, 4)],
            [written(5, 12, 5), written(60, 70, 6)],
        ],
        30,
    )
    rows = {label.split()[2]: pages.tolist() for label, pages in zip(heat.labels, heat.pages, strict=True)}
    assert rows == {"5000-1e000": [3, 4, 5], "32000-3c000": [3, 0, 0], "3c000-46000": [0, 0, 6]}


def test_other_processes_and_other_names_are_other_rows() -> None:
    heat = heat_map([[written(1, 9, 1), written(1, 9, 1, name="b"), written(1, 9, 1, pid=8), written(1, 9, 5)]], 30)
    assert sorted(heat.pages[:, 0].tolist()) == [1, 1, 6]


def test_rows_are_ordered_by_what_was_written_after_the_first_dump() -> None:
    heat = heat_map(
        [[written(1, 9, 900, name="cold"), written(11, 19, 1, name="hot")], [written(11, 19, 2, name="hot")]], 9
    )
    assert [label.split()[-1] for label in heat.labels] == ["hot", "cold"]


def test_what_has_no_row_is_in_the_last_one() -> None:
    dumps = [[written(10 * n, 10 * n + 5, 100 - n, name=f"m{n}") for n in range(50)] for _ in range(3)]
    heat = heat_map(dumps, 30)
    assert len(heat.labels) == 30
    assert heat.labels[-1] == "21 others"
    assert heat.left_out == 21
    assert heat.pages.sum(axis=0).tolist() == [sum(range(51, 101))] * 3
    assert heat_map(dumps, 50).left_out == 0


def test_of_nothing_written_there_are_no_rows() -> None:
    assert heat_map([], 30).labels == []
    assert heat_map([[], []], 30).pages.shape == (0, 2)


# -- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 2, 7, 60, 400])
@pytest.mark.parametrize("last", [True, False])
def test_the_picture_says_what_was_measured(rounds: int, last: bool) -> None:
    texts = svg_texts(render(record(rounds, last=last), "svg"))
    assert "Pre-copy of process 7 (worker) and 2 processes below it" in texts
    assert any("tracker uffd-wp" in text for text in texts)
    assert "allowed: 50 ms" in texts
    assert any(text.startswith("7 worker") and text.endswith("[stack]") for text in texts)
    assert ("true: 18.4 ms" in texts) == last
    assert ("rounds, target slowed down" in texts) == (rounds > 4)
    assert any(text.endswith("MiB/s") for text in texts)


def test_a_loop_that_wrote_nothing_can_be_drawn() -> None:
    idle = record(3, last=False)
    idle.rounds = [replace(done, bytes_written=0, write_seconds=0.0) for done in idle.rounds]
    idle.decisions = [should_stop(idle.rounds[: n + 1], idle.policy) for n in range(3)]
    idle.written = [[], [], []]
    assert "not known" in svg_texts(render(idle, "svg"))
    assert render(idle, "html")


@pytest.mark.parametrize("comm", ODD_NAMES)
def test_odd_names_do_no_harm(comm: str) -> None:
    odd = record(3, comm=comm, names=ODD_NAMES)
    texts = svg_texts(render(odd, "svg"))
    assert all(text.isprintable() for text in texts)
    assert any(ODD_NAMES[0] in text for text in texts)
    assert any(ODD_NAMES[1][1:] in text or "script" in text for text in texts)
    assert max(len(text) for text in texts if text.startswith("7 ")) < len(comm) + 100
    page = render(odd, "html").decode()
    assert "<script" not in page
    assert "\x1b" not in page
    assert html.escape(ODD_NAMES[0]) in page


def test_a_png_is_a_picture_of_some_size_with_something_on_it() -> None:
    data = render(record(5), "png")
    assert data.startswith(b"\x89PNG\r\n")
    from io import BytesIO

    pixels = imread(BytesIO(data))
    assert pixels.shape[0] > 800
    assert pixels.shape[1] > 1000
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 10


def test_the_page_has_the_picture_and_the_numbers_and_loads_nothing() -> None:
    page = render(record(7), "html").decode()
    picture = page[page.index("<svg") : page.index("</svg>") + 6]
    assert "allowed: 50 ms" in svg_texts(picture.encode())
    for text in ("<h2>Rounds</h2>", "<td>300.0 MiB</td>", "<h2>Downtime</h2>", "<td>59.8%</td>", "<h2>Mappings</h2>"):
        assert text in page
    assert "src=" not in page.replace("img-src", "")
    assert "@import" not in page
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page
    failed = render(record(7, last=False), "html").decode()
    assert "writes too fast" in failed
    assert "<h2>Downtime</h2>" not in failed


def test_a_picture_is_the_same_each_time() -> None:
    assert render(record(4), "svg") == render(record(4), "svg")


# -- what it says ----------------------------------------------------------------------------------------------------


def figure_of(told: Record) -> Figure:
    with mpl.rc_context(_SETTINGS):
        return draw(told)


def bars(axes: Axes) -> list[Rectangle]:
    return [patch for container in axes.containers for patch in container.patches]


def test_it_says_where_and_when_and_by_what_it_was_made() -> None:
    for file_format in ("svg", "html"):
        shown = html.unescape(render(record(3), file_format).decode())
        for text in (ORIGIN.host, ORIGIN.date, ORIGIN.command, f"incdump {ORIGIN.version}"):
            assert shown.replace("</dt><dd>", " ").count(text) == 1, text


def test_the_host_the_date_the_command_and_the_version_are_the_true_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("incdump.cli.precopy.check_target", lambda _pid: Named("worker"))

    async def precopy(
        *_args: object, on_round: Callable[..., None], on_written: Callable[..., None], **_: object
    ) -> None:
        known = record(2)
        on_written(DumpResult("images", 7, pids=[7], tracker="uffd-wp"), known.written[0])
        on_round(known.rounds[0], known.decisions[0])
        raise IncdumpError("enough")

    monkeypatch.setattr("incdump.engine.precopy.precopy", precopy)
    before = time.time()
    arguments = ["precopy", "-t", "7", "-D", str(tmp_path / "an odd name"), "--report", str(tmp_path / "a.html")]
    assert main(arguments) == 1
    shown = html.unescape((tmp_path / "a.html").read_text())
    told = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", shown))
    assert told["host"].startswith(f"{os.uname().nodename} (Linux {os.uname().release}")
    assert told["command"] == shlex.join(["incdump", *arguments])
    assert told["incdump"] == incdump.__version__
    date = datetime.strptime(told["date"], "%Y-%m-%d %H:%M:%S %z")
    assert before - 1 <= date.timestamp() <= time.time()


def test_a_bar_begins_with_nothing_on_a_linear_scale() -> None:
    alike = record(7)
    alike.rounds = [replace(done, bytes_written=(60 << 20) // done.number) for done in alike.rounds]
    alike.decisions = [should_stop(alike.rounds[: n + 1], alike.policy) for n in range(7)]
    axes = figure_of(alike).axes[0]
    assert axes.get_yscale() == "linear"
    assert axes.get_ylim()[0] == 0
    assert len(bars(axes)) == 7
    assert {bar.get_y() for bar in bars(axes)} == {0}


def test_on_a_logarithmic_scale_there_are_dots_and_no_bars() -> None:
    axes = figure_of(record(60)).axes[0]
    assert axes.get_yscale() == "log"
    assert bars(axes) == []
    heights = [y for line in axes.lines if line.get_label().startswith("rounds") for y in line.get_ydata()]
    assert sorted(heights) == sorted(float(done.bytes_written) for done in record(60).rounds)


def test_mappings_that_are_never_written_again_are_one_line() -> None:
    told = record(3)
    told.written[0] += [written(10**6 + 300 * n, 10**6 + 300 * n + 200, 50, name=f"lib{n}.so") for n in range(70)]
    heat = heat_map(told.written, 30)
    assert {label.split()[-1] for label in heat.labels[:-1]} == {"[heap]", "[stack]"}
    assert heat.labels[-1] == "70 mappings not written after the first round"
    assert heat.pages[-1].tolist() == [3500, 0, 0, 0]
    assert (heat.idle, heat.left_out) == (70, 0)
    page = render(told, "html").decode()
    assert "70 mappings not written after the first round" in page
    assert "lib1.so" not in page


def test_of_a_single_round_no_mapping_is_said_to_be_idle() -> None:
    heat = heat_map([[written(10 * n, 10 * n + 5, 1, name=f"m{n}") for n in range(5)]], 30)
    assert (len(heat.labels), heat.idle) == (5, 0)


def test_what_is_left_for_the_last_stop_is_shown() -> None:
    told = record(5)
    told.rounds = [replace(done, bytes_deferred=(done.number > 3) * (7 << 20)) for done in told.rounds]
    told.decisions = [should_stop(told.rounds[: n + 1], told.policy) for n in range(5)]
    dirty = [d.estimate.dirty_bytes for d in told.decisions if d.estimate.dirty_bytes is not None]
    assert len(dirty) == 4
    (left,) = (line for line in figure_of(told).axes[0].lines if line.get_label() == "left, if it were stopped then")
    assert list(left.get_ydata()) == dirty
    texts = svg_texts(render(told, "svg"))
    assert "last dump: 3.0 MiB" in texts
    assert any("7.0 MiB written in every round and left for last" in text for text in texts)
    page = render(told, "html").decode()
    assert "<th>left to copy</th><th>of it in every round</th>" in page
    assert page.count(f"<td>{bytes_text(dirty[-1])}</td><td>7.0 MiB</td>") == 1


def test_the_page_has_its_title_once() -> None:
    told = record(5)
    head, text = title_lines(told)
    page = render(told, "html").decode()
    assert page.count(head) == 1
    assert page.count(text) == 1
    assert page.count("<h1>") == 1
    assert svg_texts(render(told, "svg")).count(head) == 1


# -- the file --------------------------------------------------------------------------------------------------------


def told(report: Report, rounds: int) -> None:
    known = record(rounds)
    for done, decision, mappings in zip(known.rounds, known.decisions, known.written, strict=False):
        report.written(DumpResult("images", 7, pids=[7, 8, 9], tracker="uffd-wp"), mappings)
        report.round(done, decision)


def test_a_report_is_written_when_the_loop_fails(tmp_path: Path) -> None:
    report, warnings = Report(str(tmp_path / "a.html"), "html"), list[str]()

    def fail() -> None:
        with report.of(7, "worker", PrecopyPolicy(), warnings.append):
            told(report, 3)
            raise RuntimeError("it <did> not converge")

    with pytest.raises(RuntimeError):
        fail()
    assert "it &lt;did&gt; not converge" in (tmp_path / "a.html").read_text()
    assert (tmp_path / "a.html").stat().st_mode & 0o777 == 0o600
    assert warnings == []
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_a_report_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_text("old")
    report = Report(str(tmp_path / "a.svg"), "svg")
    with report.of(7, "worker", PrecopyPolicy(), pytest.fail):
        told(report, 2)
        stats = DumpStats(pages_written=10, freezing_time=100, frozen_time=900)
        report.last_dump(DumpResult("images", 7, stats=stats), None, PARTS)
    assert "true: 18.4 ms" in svg_texts((tmp_path / "a.svg").read_bytes())
    assert report.path == str(tmp_path / "a.svg")


def test_a_report_that_cannot_be_written_in_the_end_is_a_warning(tmp_path: Path) -> None:
    report, warnings = Report(str(tmp_path / "gone" / "a.svg"), "svg"), list[str]()
    with report.of(7, "worker", PrecopyPolicy(), warnings.append):
        told(report, 2)
    (warning,) = warnings
    assert "there is no report" in warning
    assert report.path is None


def test_of_no_round_there_is_no_report(tmp_path: Path) -> None:
    report, warnings = Report(str(tmp_path / "a.svg"), "svg"), list[str]()
    with report.of(7, "worker", PrecopyPolicy(), warnings.append):
        pass
    assert warnings == ["there is no report: no round was complete"]
    assert list(tmp_path.iterdir()) == []


# -- the option ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "an empty name"),
        ("report", "ends in none of .svg, .png, .html"),
        ("report.pdf", "ends in none of"),
        (".svg", "ends in none of"),
        ("nowhere/report.svg", "cannot write to"),
        ("directory.svg", "is a directory"),
    ],
)
def test_a_file_that_cannot_be_is_refused_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, name: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory.svg").mkdir()
    assert main(["precopy", "-t", str(NO_PID), "-D", "images", "--report", name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert words in err
    assert [path.name for path in tmp_path.iterdir()] == ["directory.svg"]


def test_without_the_library_it_is_said_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(report_module, "find_spec", lambda _name: None)
    assert main(["precopy", "-t", str(NO_PID), "-D", str(tmp_path / "1"), "--report", str(tmp_path / "a.SVG")]) == 1
    assert "pip install '.[report]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
