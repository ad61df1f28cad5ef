"""Writes docs/results.md and the tables of the guides from docs/results/*.json.

Each file is one section: `title`, `setting`, `machine`, and any nesting of tables. A
dict of dicts, and a list of dicts, is a table; a dict of values is a table of two
columns. A file with a `summary` is a reproduction: its single `runs` stay in the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NBSP = "\N{NO-BREAK SPACE}"  # keeps a cell in one line
SCRIPTS = HERE.parent / "examples"
INTRODUCTION = """# Results

Every figure on this page was measured by a script, which wrote it to a file in
`docs/results`; the page is made from these files. Each section names the command. A
reproduction goes on from the runs that are in its file; to measure anew, give it
another one with `--out`, and another folder with `--runs`.
"""
REPRODUCTIONS = """## Methods and papers

What the papers claim, at a size that two processor cores can train. A difference is
paired: both networks have the same seed; ± is half of its 95 % confidence interval. The
files hold every single run.
"""
MEASUREMENTS = """## Time, memory and exactness

What the library costs, and how near it is to official implementations. Times are ratios
within one run, for the machines were shared: *load* says how busy they were, and where
there is a CPU column it is the one to compare. *To reach* is a bound that was set
beforehand. There are no figures of GPUs yet.
"""


def page(folder: Path) -> str:
    """The page in Markdown."""
    found = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}
    parts = {REPRODUCTIONS: [], MEASUREMENTS: []}
    for name, result in found.items():
        part = REPRODUCTIONS if "summary" in result else MEASUREMENTS
        parts[part].append(section(name, result, (folder / f"{name}.png").exists()))
    texts = [INTRODUCTION]
    for heading, sections in parts.items():
        texts += [heading, *sections] if sections else []
    return "\n".join(texts)


def section(name: str, result: dict[str, Any], plot: bool = False) -> str:
    """One file's figures."""
    values = dict(result)
    machine, setting = values.pop("machine", None), dict(values.pop("setting", {}))
    lines = [f"### {values.pop('title', name)}\n"]
    command = setting.pop("command", None) or default_command(name)
    if command:
        lines.append(f"```sh\n{command}\n```\n")
    if setting:
        lines.append(f"Setting: {sentence(setting)}.\n")
    if "summary" in values:
        del values["runs"]
        values = {"": values.pop("summary"), **values}
    lines += blocks(values)
    if plot:
        lines.append(f"![{name}](results/{name}.png)\n")
    if machine:
        lines.append(f"Measured on: {sentence(machine)}.")
    lines.append(f"All figures: {{download}}`{name}.json <results/{name}.json>`.\n")
    return "\n".join(lines)


def default_command(name: str) -> str | None:
    """The script of the same name."""
    found = sorted(SCRIPTS.rglob(f"{name}.py"))
    return f"python {found[0].relative_to(SCRIPTS.parent)}" if found else None


def sentence(values: dict[str, Any]) -> str:
    """The entries of a dict, one after the other."""
    return "; ".join(f"{key} {text(value)}" for key, value in values.items())


def blocks(values: dict[str, Any]) -> list[str]:
    """The tables of a nested dict, each under its name."""
    result = []
    single = {k: v for k, v in values.items() if not is_nested(v)}
    if single:
        result.append(table(["", "value"], [[k, v] for k, v in single.items()]))
    for name, value in values.items():
        if not is_nested(value):
            continue
        if name:
            result.append(f"**{name}**\n")
        if isinstance(value, list):
            columns = list(dict.fromkeys(key for row in value for key in row))
            rows = [[row.get(key) for key in columns] for row in value]
            result.append(table(columns, rows))
        elif is_table(value):
            columns = list(dict.fromkeys(k for row in value.values() for k in row))
            rows = [[n, *map(row.get, columns)] for n, row in value.items()]
            result.append(table(["", *columns], rows))
        else:
            result.extend(blocks(value))
    return result


def is_nested(value: Any) -> bool:
    """Whether a value needs a table of its own."""
    return isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(row, dict) for row in value)
    )


def is_table(value: Any) -> bool:
    """Whether a value is a dict of rows."""
    return isinstance(value, dict) and all(
        isinstance(row, dict) and not any(map(is_nested, row.values()))
        for row in value.values()
    )


def table(columns: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *([text(v) for v in r] for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def text(value: Any) -> str:
    """A value, numbers with at most four significant digits after the point."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, list):
        return ", ".join(map(text, value))
    return str(value).replace("|", "\\|")


# -- the tables of the guides ---------------------------------------------------------


def fill(guide: str, folder: Path) -> str:
    """A guide with its tables: one behind each `<!-- KIND FILE -->`."""

    def filled(match: re.Match[str]) -> str:
        kind, name = match.groups()
        path = folder / f"{name}.json"
        made = KINDS[kind](json.loads(path.read_text())) if path.exists() else ""
        made = made or "Not yet measured with three seeds; see the results.\n"
        return f"<!-- {kind} {name} -->\n\n{made}\n<!-- end -->"

    pattern = rf"<!-- ({'|'.join(KINDS)}) (\w+) -->.*?<!-- end -->"
    return re.sub(pattern, filled, guide, flags=re.DOTALL)


def verdicts(result: dict[str, Any]) -> str:
    """What each row of a reproduction gained, and whether that is more than noise.

    Of fewer than three seeds nothing is said.
    """
    rows = []
    for name, line in summary_lines(result["summary"]):
        gain, interval = line.get("difference"), line.get("± (95 %)")
        if gain is None or interval is None or line["seeds"] < 3:
            continue
        cost = line.get("times the plain step")
        verdict = f"not{NBSP}decided"
        if abs(gain) > interval:
            verdict = "better" if gain > 0 else "worse"
        rows.append(
            {
                "": name,
                "against": line.get("over"),
                "difference": f"{gain:+.2f}",
                "95 %": f"±{NBSP}{interval:.2f}",
                "verdict": verdict,
                "cost of a step": f"{cost:.1f}" if cost else None,
            }
        )
    if not rows:
        return ""
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    return table(columns, [[row[name] for name in columns] for row in rows])


def summary_lines(summary: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a summary that is one table, or several tables by title."""
    for name, value in summary.items():
        if is_table(value):
            yield from value.items()
        elif isinstance(value, dict):
            yield name, value


def plans(result: dict[str, Any]) -> str:
    """What caches take on paper, one in each row."""
    columns = {
        "classes": "classes",
        "top_k": "`top_k`",
        "views": "views",
        "bytes per row": "bytes a row",
        "GB in all": "GB",
        "hosts": "parts",
        "GB per host": "GB a part",
        "hours at 1000 rows per second and host": "hours",
    }
    rows = []
    for plan in result["plan on paper"]:
        stored = plan | {"top_k": plan["top_k"] or "dense"}
        millions = f"{plan['rows'] / 1e6:g}"
        rows.append([millions, *(grouped(stored[key]) for key in columns)])
    return table(["million rows", *columns.values()], rows)


def grouped(value: Any) -> str:
    """Three digits of a number, or all of a large one with its thousands apart."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}".replace(",", NBSP) if value >= 1000 else f"{value:.3g}"


KINDS = {"gains": verdicts, "plan": plans}


if __name__ == "__main__":
    (HERE / "results.md").write_text(page(HERE / "results"))
    for name in ("choosing.md", "cache.md"):
        guide = HERE / name
        guide.write_text(fill(guide.read_text(), HERE / "results"))
