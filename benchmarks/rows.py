"""Results of the benchmarks: files with a row of JSON in each line. Imports no library, so that memory can be measured."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace the rows of a file."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def append_row(path: Path, row: Row) -> None:
    """Add a row to a file."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def update_rows(path: Path, rows: list[Row], keys: tuple[str, ...]) -> None:
    """Add rows to a file, in place of those that agree with them in all keys."""
    write_rows(path, {tuple(row[key] for key in keys): row for row in [*read_rows(path), *rows]}.values())
