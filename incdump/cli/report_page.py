"""The report as one HTML page: the picture, and the numbers in it as tables. It loads nothing from anywhere."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from incdump.cli.invocation import one_line
from incdump.cli.report_figure import picture, title_lines
from incdump.cli.report_rows import heat_map
from incdump.cli.rounds import allowed_text, part_texts, round_texts
from incdump.cli.text import bytes_text, time_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from incdump.cli.report import Record

_MAPPINGS = 100
_STYLE = """
body { font: 15px/1.45 system-ui, "DejaVu Sans", sans-serif; color: #222; background: #fff; margin: 2em auto;
       max-width: 90em; padding: 0 1.5em; }
h1 { font-size: 1.5em; margin-bottom: 0; } h2 { font-size: 1.15em; margin: 2em 0 0.5em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.1em 1em; color: #555; font-size: 0.9em; }
dd { margin: 0; overflow-wrap: anywhere; }
p { margin: 0.3em 0; } .failure { color: #a01420; }
svg { width: 100%; height: auto; margin-top: 1em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2em 0.6em; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e4e4; }
th { border-bottom: 2px solid #bbb; white-space: normal; vertical-align: bottom; }
.text { text-align: left; } td.text { white-space: normal; } td.text:last-child { min-width: 12em; }
td.text.code { font-family: monospace; white-space: nowrap; }
"""


def page(record: Record) -> str:
    """The whole page."""
    head, text = (html.escape(line) for line in title_lines(record))
    svg = picture(record, "svg", titled=False).decode()
    failure = "" if record.failure is None else f'<p class="failure">{html.escape(one_line(record.failure))}</p>'
    sections = [
        f"<h1>{head}</h1>\n<p>{text}</p>{failure}\n{_origin(record)}",
        svg[svg.index("<svg") :],
        f"<h2>Rounds</h2>\n{_rounds(record)}",
        _last_dump(record),
        f"<h2>Mappings</h2>\n{_mappings(record)}",
    ]
    tab = html.escape(one_line(f"incdump: {record.comm} ({record.pid})"))
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{tab}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _origin(record: Record) -> str:
    """Where, when and by what it was made."""
    origin = record.origin
    rows = (("host", origin.host), ("date", origin.date), ("command", origin.command), ("incdump", origin.version))
    lines = "\n".join(f"<dt>{name}</dt><dd>{html.escape(one_line(value))}</dd>" for name, value in rows)
    return f"<dl>\n{lines}\n</dl>"


def _rounds(record: Record) -> str:
    headings = (
        *("round", "began", "pages", "bytes", "time", "written/s", "copied/s", "stopped now"),
        *(f"of {allowed_text(record.policy)}", "left to copy", "of it in every round", "slowed by", "what was decided"),
    )
    rows = []
    for done, decision in zip(record.rounds, record.decisions, strict=True):
        number, *texts, share = round_texts(done, decision, record.policy)
        slowed = f"{done.throttled:.0%}" if done.throttled else ""
        dirty = decision.estimate.dirty_bytes
        left = (
            "" if dirty is None else bytes_text(dirty),
            bytes_text(done.bytes_deferred) if done.bytes_deferred else "",
        )
        rows.append((number, time_text(int(done.started * 1e6)), *texts, share, *left, slowed, decision.why))
    return _table(headings, rows, text=(len(headings) - 1,))


def _last_dump(record: Record) -> str:
    last = record.last
    if last is None:
        return ""
    whole = sum(part.microseconds for part in last.parts)
    rows = [part_texts(part, whole) for part in last.parts]
    wrote = bytes_text(last.bytes_written)
    began = f"<p>It began {time_text(int(last.at * 1e6))} after the loop had begun, and wrote {wrote}.</p>"
    table = _table(("part", "time", "share", ""), [*rows, ("in all", time_text(whole), "", "")], text=(0, 3))
    return f"<h2>Downtime</h2>\n{began}\n{table}"


def _mappings(record: Record) -> str:
    heat = heat_map(record.written, _MAPPINGS)
    rows = [
        (label, f"{int(pages[0]):,}", f"{int(pages[1:].sum()):,}", str(int((pages[1:] > 0).sum())))
        for label, pages in zip(heat.labels, heat.pages, strict=True)
    ]
    headings = ("process, addresses, name", "pages in the first round", "pages later", "in so many dumps")
    return _table(headings, rows, text=(0,), code=True)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, text: Sequence[int], code: bool = False) -> str:
    """Rows of texts; the columns `text` to the left, all others, which are numbers, to the right."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{_kind(n in text, code)}>{html.escape(one_line(cell))}</{tag}>" for n, cell in enumerate(cells)
        )

    body = "\n".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{line("th", headings)}</tr>\n{body}\n</table></div>'


def _kind(is_text: bool, code: bool) -> str:
    return f' class="text{" code" if code else ""}"' if is_text else ""
