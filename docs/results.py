"""Writes docs/results.md from the measurements in docs/results/*.json.

Each file is one section: `title`, `machine`, and any nesting of tables. A dict of
dicts, and a list of dicts, is a table; a dict of values is a table of two columns.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
INTRODUCTION = """# Results

Every figure on this page was measured by a script in `examples/benchmarks`, which
wrote it to a file in `docs/results`; the page is made from these files.
"""


def page(folder: Path) -> str:
    """The page in Markdown."""
    sections = [
        section(path.stem, json.loads(path.read_text()))
        for path in sorted(folder.glob("*.json"))
    ]
    return "\n".join([INTRODUCTION, *sections])


def section(name: str, result: Any) -> str:
    """One file's figures."""
    values = dict(result) if isinstance(result, dict) else {"results": result}
    machine = values.pop("machine", None)
    lines = [f"## {values.pop('title', name)}\n", *blocks(values)]
    if machine:
        text = ", ".join(f"{key} {value}" for key, value in machine.items())
        lines.append(f"Measured on: {text}.\n")
    return "\n".join(lines)


def blocks(values: dict[str, Any]) -> list[str]:
    """The tables of a nested dict, each under its name."""
    result = []
    single = {k: v for k, v in values.items() if not is_nested(v)}
    if single:
        result.append(table(["", "value"], [[k, v] for k, v in single.items()]))
    for name, value in values.items():
        if not is_nested(value):
            continue
        result.append(f"**{name}**\n")
        if isinstance(value, list):
            columns = list(dict.fromkeys(key for row in value for key in row))
            rows = [[row.get(key) for key in columns] for row in value]
            result.append(table(columns, rows))
        elif all(
            isinstance(row, dict) and not any(map(is_nested, row.values()))
            for row in value.values()
        ):
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


if __name__ == "__main__":
    (HERE / "results.md").write_text(page(HERE / "results"))
