"""The picture of a report: four charts over one time axis, drawn by matplotlib.

    bytes written       by each round, and what was left in the end of it: bars from 0, as wide as the rounds were long;
                        or, where they differ too much, dots on a logarithmic scale, on which no bar has a length
    rates               written by the target, copied by incdump
    downtime            estimated after each round, against what is allowed; and the true one
    heat map            mappings × rounds

Places are worked out in inches: the time axes have to be exactly above each other, and the labels of mappings, which
are long, have the room on the right. No setting of matplotlib's is changed for others, and no text is its markup.
"""

from __future__ import annotations

import io
import logging
import math
import textwrap
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from incdump.cli.invocation import one_line
from incdump.cli.report_rows import HeatMap, heat_map
from incdump.cli.rounds import allowed_text
from incdump.cli.text import bytes_text, count_text, time_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from incdump.cli.report import Record
    from incdump.model.precopy import PrecopyRound

ROWS = 30
"""Mappings in the heat map."""
_DPI = 130
_LEFT, _PLOT, _CHART, _GAP, _ROW = 1.0, 8.6, 1.75, 0.42, 0.2
_UNTITLED, _HEAD, _LINE, _BOTTOM = 0.35, 1.05, 0.17, 1.35
"""Heights: above the charts without a title and with one, of each further line of that, and below the charts."""
_COMMAND_LENGTH = 150
"""Characters of a line of the command."""
_COMMAND_LINES = 4
_STRIP = 0.3
"""Width of the last dump's column."""
_LABEL_SIZE = 7.0
_LABEL_CHARACTER = 0.65 * _LABEL_SIZE / 72
"""Width of a character of a monospaced font, of which some are wider than others, and pixels are whole."""
_MANY = 80
"""Rounds, from which on each has no mark of its own."""
_TOO_MANY_NUMBERS = 300
_LOG_FROM = 30.0
"""Ratio of the largest to the smallest value from which on the axis is logarithmic."""
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#3b75af", "#d9701a", "#2a8c55", "#c22f3d", "#666666"
_SETTINGS: dict[Any, Any] = {
    "text.parse_math": False,  # a mapping's name may hold a $
    "text.usetex": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "svg.fonttype": "none",  # text that can be searched and copied
    "svg.hashsalt": "incdump",
}


def picture(record: Record, file_format: str, *, titled: bool = True) -> bytes:
    """Draw a report.

    :param file_format: ``"svg"`` or ``"png"``.
    :param titled: whether it is to say what it is; a page that does has no need of it.
    """
    # It would say that it makes its list of fonts, that it cannot keep it, that a name's character is in none of them.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import matplotlib as mpl

        with mpl.rc_context(_SETTINGS):
            out = io.BytesIO()
            metadata = {"Date": None} if file_format == "svg" else None
            draw(record, titled=titled).savefig(out, format=file_format, dpi=_DPI, metadata=metadata)
            return out.getvalue()


def draw(record: Record, *, titled: bool = True) -> Figure:
    """The figure, under the settings of `picture`."""
    from matplotlib.figure import Figure

    heat = heat_map(record.written, ROWS)
    rows = max(len(heat.labels), 3)
    right = max(2.4, _STRIP + 0.35 + max(map(len, heat.labels), default=0) * _LABEL_CHARACTER)
    origin = origin_lines(record) if titled else []
    head = _HEAD + _LINE * len(origin) if titled else _UNTITLED
    top = head + 3 * (_CHART + _GAP) + 0.1
    size = (_LEFT + _PLOT + right, top + rows * _ROW + _BOTTOM)
    figure = Figure(figsize=size, facecolor="white")
    if titled:
        _title(figure, record, origin, size)
    place = _Places(figure, size)
    charts = [place.add(_LEFT, head + n * (_CHART + _GAP), _PLOT, _CHART) for n in range(3)]
    for axes, chart in zip(charts, (_bytes, _rates, _downtimes), strict=True):
        chart(axes, record)
        axes.tick_params(labelbottom=False)
    map_axes = place.add(_LEFT, top, _PLOT, rows * _ROW)
    _heat(map_axes, place, record, heat, top, rows * _ROW)
    for axes in (*charts, map_axes):
        axes.set_xlim(0, (record.ended or 1.0) * 1.01)
        _mark_freeze(axes, record)
    map_axes.set_xlabel("seconds since the loop began")
    return figure


class _Places:
    """Axes by inches from the left and from the top."""

    def __init__(self, figure: Figure, size: tuple[float, float]) -> None:
        self._figure = figure
        self._width, self._height = size

    def add(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = self._height - top - height
        return self._figure.add_axes(
            (left / self._width, bottom / self._height, width / self._width, height / self._height)
        )


def title_lines(record: Record) -> tuple[str, str]:
    """What was measured, and what came of it."""
    tree = "" if record.processes <= 1 else f" and {count_text(record.processes - 1, 'process', 'processes')} below it"
    head = f"Pre-copy of process {record.pid} ({record.comm}){tree}"
    rounds = count_text(len(record.rounds), "round", "rounds")
    text = f"tracker {record.tracker}, {rounds} in {_seconds(record.rounds[-1].ended)}" if record.rounds else ""
    if record.rounds and record.rounds[-1].bytes_deferred:
        text += f", {bytes_text(record.rounds[-1].bytes_deferred)} written in every round and left for last"
    if record.failure is not None:
        text += ", then no last dump"
    elif record.last is not None:
        downtime = time_text(round(record.last.downtime * 1e6))
        text += f", then the last dump: downtime {downtime}, {allowed_text(record.policy)} allowed"
    return one_line(head), one_line(text)


def origin_lines(record: Record) -> list[str]:
    """Where, when and by what it was made; the command, if it is long, on several lines."""
    origin = record.origin
    command = textwrap.wrap(one_line(origin.command), _COMMAND_LENGTH, subsequent_indent="    ")
    if len(command) > _COMMAND_LINES:
        command = [*command[: _COMMAND_LINES - 1], "    …"]
    return [one_line(f"on {origin.host}, {origin.date}, by incdump {origin.version}"), *command]


def _title(figure: Figure, record: Record, origin: Sequence[str], size: tuple[float, float]) -> None:
    head, text = title_lines(record)
    x = _LEFT / size[0]
    figure.text(x, 1 - 0.22 / size[1], head, ha="left", va="top", fontsize=14, fontweight="bold")
    figure.text(x, 1 - 0.52 / size[1], text, ha="left", va="top", fontsize=10, color="#333333")
    for n, line in enumerate(origin):
        y = 1 - (0.78 + _LINE * n) / size[1]
        shown = line.replace("  ", "\u00a0\u00a0")
        figure.text(x, y, shown, ha="left", va="top", fontsize=8, color=_GREY)


# -- the charts ------------------------------------------------------------------------------------------------------


def _bytes(axes: Axes, record: Record) -> None:
    """What each round wrote, and what was left in its end."""
    axes.set_title("written to the images by each round, and left to copy in the end of it", loc="left", fontsize=10)
    left = _left_to_copy(record)
    written = [r.bytes_written for r in record.rounds]
    last = [] if record.last is None else [record.last.bytes_written]
    is_linear = _byte_axis(axes, [*written, *last, *(value for _, value in left)])
    for throttled, colour, label in ((False, _BLUE, "rounds"), (True, _ORANGE, "rounds, target slowed down")):
        some = [r for r in record.rounds if bool(r.throttled) == throttled]
        if some:
            (_bars if is_linear else _dots)(axes, some, colour, label, many=len(record.rounds) > _MANY)
    if len(record.rounds) <= _TOO_MANY_NUMBERS:
        _number_rounds(axes, record)
    if left:
        times, values = zip(*left, strict=True)
        axes.plot(times, values, color=_GREY, marker="v", ms=4, lw=0, label="left, if it were stopped then")
    if record.last is not None:
        middle = record.last.at + record.last.downtime / 2
        text = f"last dump: {bytes_text(record.last.bytes_written)}"
        axes.plot([middle], last, "D", color=_RED, ms=6, label=text, clip_on=False, zorder=5)
    _legend(axes)


def _left_to_copy(record: Record) -> list[tuple[float, int]]:
    """What a stop would have had to copy in the end of each round, where that is known: also what was left out of the
    rounds because it is written in every one."""
    return [
        (r.ended, d.estimate.dirty_bytes)
        for r, d in zip(record.rounds, record.decisions, strict=True)
        if d.estimate.dirty_bytes is not None
    ]


def _bars(axes: Axes, rounds: Sequence[PrecopyRound], colour: str, label: str, *, many: bool) -> None:
    """Bars from 0, as wide as the rounds were long."""
    look: dict[str, Any] = {"align": "edge", "color": colour, "edgecolor": colour if many else "white", "lw": 0.6}
    axes.bar(
        [r.started for r in rounds], [r.bytes_written for r in rounds], [r.seconds for r in rounds], label=label, **look
    )


def _dots(axes: Axes, rounds: Sequence[PrecopyRound], colour: str, label: str, *, many: bool) -> None:
    """A dot in the middle of each round, on a line as long as the round was; on the edge, if it wrote nothing."""
    low = axes.get_ylim()[0]
    heights = [max(float(r.bytes_written), low) for r in rounds]
    axes.hlines(heights, [r.started for r in rounds], [r.ended for r in rounds], color=colour, lw=1.0 if many else 1.6)
    middles = [r.started + r.seconds / 2 for r in rounds]
    axes.plot(middles, heights, color=colour, marker="o", ms=2 if many else 4, lw=0, label=label, clip_on=False)


def _number_rounds(axes: Axes, record: Record) -> None:
    """The rounds' numbers, where they fit."""
    for r in record.rounds:
        if r.seconds > record.ended * 0.018 and r.bytes_written:
            middle = r.started + r.seconds / 2
            axes.annotate(
                str(r.number), (middle, r.bytes_written), (0, 4), textcoords="offset points", ha="center", fontsize=7
            )


def _rates(axes: Axes, record: Record) -> None:
    """What the decisions were made on: how fast the target writes, and how fast that is copied."""
    axes.set_title("rates, means over the last rounds", loc="left", fontsize=10)
    marker = "o" if len(record.rounds) <= _MANY else ""
    shown: list[float] = []
    for name, label, colour in (("dirty_rate", "dirty rate", _ORANGE), ("bandwidth", "bandwidth", _GREEN)):
        known = [
            (r.ended, value)
            for r, d in zip(record.rounds, record.decisions, strict=True)
            if (value := getattr(d.estimate, name)) is not None
        ]
        if known:
            times, values = zip(*known, strict=True)
            axes.plot(times, values, color=colour, marker=marker, ms=3.5, lw=1.5, label=label)
            shown.extend(values)
    if shown:
        _byte_axis(axes, shown, per="/s")
        _legend(axes)
    else:
        _nothing(axes, "not known: too few rounds, or too little was written")


def _downtimes(axes: Axes, record: Record) -> None:
    """How long the target would have stood still, if it had been stopped after each round."""
    axes.set_title("downtime, if the target were stopped after a round", loc="left", fontsize=10)
    known = [
        (r.ended, d.estimate.downtime)
        for r, d in zip(record.rounds, record.decisions, strict=True)
        if d.estimate.downtime is not None
    ]
    allowed = record.policy.downtime
    shown = [allowed, *(value for _, value in known)]
    if known:
        marker = "o" if len(record.rounds) <= _MANY else ""
        times, values = zip(*known, strict=True)
        axes.plot(times, values, color=_BLUE, marker=marker, ms=3.5, lw=1.5, label="estimated")
    axes.axhline(allowed, color=_GREEN, ls="--", lw=1.3, label=f"allowed: {allowed_text(record.policy)}")
    if record.last is not None:
        downtime = record.last.downtime
        shown.append(downtime)
        label = f"true: {time_text(round(downtime * 1e6))}"
        axes.plot(
            [record.last.at + downtime / 2],
            [max(downtime, 1e-6)],
            "D",
            color=_RED,
            ms=6,
            label=label,
            clip_on=False,
            zorder=5,
        )
    _log_axis(axes, shown, _seconds)
    _legend(axes)


def _heat(axes: Axes, place: _Places, record: Record, heat: HeatMap, top: float, height: float) -> None:
    """Mappings × rounds; the last dump, which is far too short to be seen, has a column of its own."""
    from matplotlib.colors import LogNorm

    axes.set_title(_heat_title(heat), loc="left", fontsize=10)
    axes.grid(visible=False)
    rounds = record.rounds[: len(record.written)]
    if not heat.labels or not rounds:
        axes.set_yticks([])
        _nothing(axes, "not known")
        return
    norm = LogNorm(1, max(10, int(heat.pages.max())))
    edges = np.array([*(r.started for r in rounds), rounds[-1].ended])
    pages = np.ma.masked_equal(heat.pages, 0)
    lines = np.arange(len(heat.labels) + 1)
    look: dict[str, Any] = {"norm": norm, "cmap": "YlOrRd", "rasterized": pages.size > 3000}
    mesh = axes.pcolormesh(edges, lines, pages[:, : len(rounds)], **look)
    beside = axes
    if record.last is not None and pages.shape[1] > len(rounds):
        beside = place.add(_LEFT + _PLOT + 0.08, top, _STRIP - 0.08, height)
        beside.pcolormesh(np.array([0, 1]), lines, pages[:, len(rounds) : len(rounds) + 1], **look)
        beside.set_xticks([0.5], labels=["last\ndump"], fontsize=7)
        beside.tick_params(axis="x", length=0)
        _lines(beside, len(heat.labels))
    _lines(axes, len(heat.labels))
    axes.tick_params(left=False, labelleft=False)
    beside.yaxis.tick_right()
    middles = lines[:-1] + 0.5
    labels = [label.replace("  ", "\u00a0\u00a0") for label in heat.labels]  # a browser would make one of several
    beside.set_yticks(middles, labels=labels, fontsize=_LABEL_SIZE, fontfamily="DejaVu Sans Mono")
    beside.tick_params(axis="y", length=0, pad=4, labelright=True)
    scale = place.add(_LEFT, top + height + 0.72, 3.2, 0.12)
    bar = axes.figure.colorbar(mesh, cax=scale, orientation="horizontal")
    bar.set_label("pages of 4 KiB written in a round; white: none", fontsize=8)
    ticks = [10**n for n in range(math.floor(math.log10(norm.vmax or 10)) + 1)]
    bar.set_ticks(ticks, labels=[f"{tick:,}" for tick in ticks], fontsize=7)
    bar.ax.minorticks_off()


def _heat_title(heat: HeatMap) -> str:
    shown = len(heat.labels) - bool(heat.left_out) - bool(heat.idle)
    which = f"the {shown} mappings written most after the first round" if heat.left_out else "mappings"
    return f"{which}, and when they were written"


def _lines(axes: Axes, rows: int) -> None:
    axes.set_ylim(rows, 0)
    axes.set_yticks([])
    axes.grid(visible=False)
    for line in range(1, rows):
        axes.axhline(line, color="#eeeeee", lw=0.5)


def _mark_freeze(axes: Axes, record: Record) -> None:
    """The moment and the length of the last dump's freeze."""
    if record.last is not None:
        axes.axvspan(record.last.at, record.last.at + record.last.downtime, color=_RED, alpha=0.35, lw=0.8, zorder=0.5)


# -- axes ------------------------------------------------------------------------------------------------------------


def _nothing(axes: Axes, why: str) -> None:
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=_GREY)
    axes.set_yticks([])


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.005, 1.03), frameon=False, fontsize=8.5, borderaxespad=0.2)


def _byte_axis(axes: Axes, values: Sequence[float], per: str = "") -> bool:
    """Scale the y axis for bytes: from nothing on, or by powers of two where they differ too much.

    :returns: whether it begins with nothing, so that lengths can be compared.
    """
    seen = [float(value) for value in values if value > 0]
    if not seen:
        axes.set_ylim(0, 1)
        axes.set_yticks([0], labels=[f"0 B{per}"])
        return True
    least, most = min(seen), max(seen)
    if most / least <= _LOG_FROM:
        _set_ticks(axes, _round_bytes(most), lambda value: _bytes_tick(value) + per)
        axes.set_ylim(0, most * 1.12)
        return True
    low, high = math.floor(math.log2(least)), math.ceil(math.log2(most))
    step = max(1, math.ceil((high - low) / 5))
    axes.set_yscale("log", base=2)
    _set_ticks(axes, [2.0**n for n in range(low, high + 1, step)], lambda value: _bytes_tick(value) + per)
    axes.set_ylim(2.0**low / 1.3, most * 1.9)
    return False


def _bytes_tick(value: float) -> str:
    return bytes_text(int(value)).replace(".0 ", " ")


def _round_bytes(most: float) -> list[float]:
    """Round numbers of bytes up to one, from 0."""
    unit = 1024.0 ** min(4, int(math.log2(most)) // 10)
    raw = most / unit / 4
    step = next(s for n in range(-3, 5) for s in (10.0**n, 2 * 10.0**n, 5 * 10.0**n) if s >= raw)
    return [float(v) for v in np.arange(0, most * 1.05, step * unit)]


def _log_axis(axes: Axes, values: Sequence[float], text: Callable[[float], str]) -> None:
    """A logarithmic axis that has room for these values, and few ticks."""
    low, high = max(min(values), 1e-6) / 1.8, max(*values, 1e-6) * 1.8
    axes.set_yscale("log")
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 200 else (1, 3) if high / low < 2000 else (1,)
    ticks = [factor * 10.0**n for n in decades for factor in factors]
    step = math.ceil(len(decades) / 6) if len(factors) == 1 else 1
    _set_ticks(axes, [tick for tick in ticks[::step] if low <= tick <= high], text)
    axes.set_ylim(low, high)


def _set_ticks(axes: Axes, ticks: Sequence[float], text: Callable[[float], str]) -> None:
    from matplotlib.ticker import NullLocator

    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticks(ticks, labels=[text(tick) for tick in ticks])


def _seconds(value: float) -> str:
    """A round time for an axis: ``"5 ms"``, ``"0.1 ms"``, ``"20 s"``."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
