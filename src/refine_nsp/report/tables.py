"""Show one table as Markdown, as HTML, and in the terminal."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

from rich.table import Table as RichTable

Cell = str | float | int | None

TEXT_LENGTH = 24  # a column is prose, and is aligned to the left, if one of its cells is longer or has words and no digit


def show(cell: Cell) -> str:
    """Write a cell as text: floats with four significant digits, None as an empty text."""
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _is_prose(cell: Cell) -> bool:
    return isinstance(cell, str) and (len(cell) > TEXT_LENGTH or (bool(cell.strip()) and not any(c.isdigit() for c in cell)))


@dataclass(frozen=True)
class Table:
    """Hold a table: a list of cells for each row, as long as `columns`, and notes, the lines under the table."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)

    def prose(self) -> list[bool]:
        """Tell for each column whether it holds text rather than figures."""
        return [i == 0 or any(_is_prose(row[i]) for row in self.rows) for i in range(len(self.columns))]

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.columns) + " |", "|" + " --- |" * len(self.columns)]
        lines += ["| " + " | ".join(show(c).replace("|", "\\|") for c in row) + " |" for row in self.rows]
        return "\n".join([*lines, "", *self.notes]).rstrip() + "\n"

    def html(self) -> str:
        kinds = [" class='prose'" if prose else "" for prose in self.prose()]
        wide = [" style='min-width:12rem'" if len(c) > TEXT_LENGTH else "" for c in self.columns]
        head = "".join(f"<th{k}{w}>{escape(c)}</th>" for k, w, c in zip(kinds, wide, self.columns, strict=True))
        cells = ["".join(f"<td{k}>{escape(show(c))}</td>" for k, c in zip(kinds, row, strict=True)) for row in self.rows]
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        notes = "".join(f"<p class='note'>{escape(n)}</p>" for n in self.notes)
        caption = f"<caption><span>{escape(self.title)}</span></caption>"
        return f"<div class='scroll' tabindex='0'><table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{notes}"

    def rich(self) -> RichTable:
        table = RichTable(
            title=self.title, caption="\n".join(self.notes) or None, caption_justify="left",
            collapse_padding=True, pad_edge=False, show_edge=False,  # so that seven columns of figures fit into 80 characters
        )  # fmt: skip
        for i, (name, prose) in enumerate(zip(self.columns, self.prose(), strict=True)):
            # In a narrow terminal cells are folded, never cut. A short first column, which names the row, stays whole.
            short = i == 0 and all(len(show(row[0])) <= TEXT_LENGTH for row in self.rows)
            table.add_column(name, justify="left" if prose else "right", overflow="fold", no_wrap=short)
        for row in self.rows:
            table.add_row(*(show(c) for c in row))
        return table
