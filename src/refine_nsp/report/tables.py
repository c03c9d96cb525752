"""One table, three faces: Markdown, HTML and the terminal."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import Any

from rich.table import Table as RichTable

Cell = str | float | int | None


def show(cell: Cell) -> str:
    """A cell as text: floats with four significant digits, nothing for None."""
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


@dataclass(frozen=True)
class Table:
    """rows: one list of cells a row, as long as `columns`. notes: lines under the table."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.columns) + " |", "|" + " --- |" * len(self.columns)]
        lines += ["| " + " | ".join(show(c).replace("|", "\\|") for c in row) + " |" for row in self.rows]
        return "\n".join([*lines, "", *self.notes]).rstrip() + "\n"

    def html(self) -> str:
        head = "".join(f"<th>{escape(c)}</th>" for c in self.columns)
        body = "".join("<tr>" + "".join(f"<td>{escape(show(c))}</td>" for c in row) + "</tr>" for row in self.rows)
        notes = "".join(f"<p class='note'>{escape(n)}</p>" for n in self.notes)
        caption = f"<caption>{escape(self.title)}</caption>"
        return f"<div class='scroll'><table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{notes}"

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, caption="\n".join(self.notes) or None, caption_justify="left")
        for i, name in enumerate(self.columns):
            table.add_column(name, justify="left" if i == 0 else "right")
        for row in self.rows:
            table.add_row(*(show(c) for c in row))
        return table

    def as_json(self) -> dict[str, Any]:
        return {"title": self.title, "columns": self.columns, "rows": self.rows, "notes": self.notes}
