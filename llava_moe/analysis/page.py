"""index.html: the figures and numbers of runs as one page, with no script, no network and nothing beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from llava_moe.analysis.numbers import in_words

_STYLE = """
:root { --ground: #fbfbfa; --card: #fff; --ink: #1d2329; --soft: #5b6570; --line: #dfe3e6; --warn: #fff4d6;
  --edge: #d9a400; }
@media (prefers-color-scheme: dark) { :root { --ground: #14181c; --card: #1b2127; --ink: #e6e9ec; --soft: #9aa5b0;
  --line: #303840; --warn: #362c0d; --edge: #b98c00; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
.note { color: var(--soft); font-size: .9rem; max-width: 56rem; margin: .3rem 0; }
.warning { background: var(--warn); border: 1px solid var(--edge); border-radius: 10px; padding: .6rem 1rem;
  margin: .75rem 0; }
.warning ul { margin: .2rem 0 0; padding-left: 1.2rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); gap: .8rem;
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem; margin: .75rem 0; }
svg { width: 100%; height: auto; display: block; } svg text { font-family: inherit !important; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { font-size: .8rem; color: var(--soft); font-weight: 600; }
td.number { text-align: right; }
@media print { .panels, svg { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Section:
    """Figures under a heading.

    Attributes:
        note: how to read them.
        figures: SVGs.
        level: of the heading.
        alarms: shown before the figures.
        optional: whether it is left out where it has neither.
    """

    title: str
    note: str
    figures: Sequence[str]
    level: int = 2
    alarms: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    optional: bool = True


def render(summaries: Sequence[Mapping[str, Any]], sections: Sequence[Section], missing: Sequence[str]) -> str:
    """The page.

    Args:
        summaries: from `numbers.summarise`.
        missing: what the logs do not hold, in words.
    """
    title = "Training runs: " + ", ".join(s["label"] for s in summaries)
    parts = [f"<h1>{escape(title)}</h1>", _overview(summaries)]
    parts += [f'<p class="note">{escape(text)}</p>' for text in missing]
    parts += [_section(section) for section in sections if section.figures or section.alarms or not section.optional]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    parts = [f"<h{section.level}>{escape(section.title)}</h{section.level}>"]
    if section.note:
        parts.append(f'<p class="note">{escape(section.note)}</p>')
    if section.alarms:
        lines = "".join(f"<li>{escape(in_words(record))}</li>" for record in section.alarms)
        parts.append(f'<div class="warning" role="note"><strong>Alarms</strong><ul>{lines}</ul></div>')
    if section.figures:
        parts.append('<div class="panels">' + "\n".join(section.figures) + "</div>")
    return "\n".join(parts)


def _overview(summaries: Sequence[Mapping[str, Any]]) -> str:
    rows = {
        "stage": [s["stage"] for s in summaries],
        "status": [s["status"] for s in summaries],
        "folder": [s["folder"] for s in summaries],
    }
    for group, words in (("at_the_end", "at the end"), ("median", "median")):
        for key in dict.fromkeys(key for s in summaries for key in s[group]):
            rows[f"{key.replace('_', ' ')}, {words}"] = [_number(s[group].get(key)) for s in summaries]
    rows["alarms"] = [str(len(s["alarms"])) for s in summaries]
    head = "".join(f"<th>{escape(s['label'])}</th>" for s in summaries)
    lines = [
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for name, cells in rows.items()
    ]
    return (
        f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _number(value: float | None) -> str:
    return "not logged" if value is None else f"{value:.4g}"
