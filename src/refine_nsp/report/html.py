"""One self-contained page: everything inline, readable in light and dark, nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink:#1c1f23; --paper:#ffffff; --line:#d9dde2; --soft:#f4f6f8; --dim:#5c6670; --link:#0072B2; }
@media (prefers-color-scheme: dark) {
  :root { --ink:#e6e9ec; --paper:#15181c; --line:#343a41; --soft:#1e2329; --dim:#9aa5b1; --link:#56B4E9; }
}
* { box-sizing: border-box; }
body { margin:0 auto; max-width:72rem; padding:2rem 1.25rem 4rem; color:var(--ink); background:var(--paper);
  font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif; }
h1 { font-size:1.6rem; margin:0 0 .25rem; } h2 { font-size:1.15rem; margin:2.2rem 0 .6rem; }
p.note { color:var(--dim); margin:.3rem 0; font-size:.9rem; }
.scroll { overflow-x:auto; } table { border-collapse:collapse; margin:.6rem 0; font-variant-numeric:tabular-nums; font-size:.88rem; }
caption { text-align:left; font-weight:600; padding:.3rem 0; }
th,td { border-bottom:1px solid var(--line); padding:.3rem .7rem; text-align:right; white-space:nowrap; }
th.prose,td.prose { text-align:left; } thead th { border-bottom:2px solid var(--line); }
.plots { display:grid; grid-template-columns:repeat(auto-fill,minmax(22rem,1fr)); gap:1rem; }
.plots svg { width:100%; height:auto; background:#fff; border:1px solid var(--line); border-radius:6px; }
pre { background:var(--soft); border:1px solid var(--line); border-radius:6px; padding:.8rem; overflow-x:auto; font-size:.82rem; }
details { margin:.5rem 0; } summary { cursor:pointer; color:var(--link); }
.text { white-space:pre-wrap; overflow-wrap:anywhere; font-family:ui-monospace,Menlo,Consolas,monospace; font-size:.84rem; line-height:1.9;
  background:var(--soft); border:1px solid var(--line); border-radius:6px; padding:.9rem; }
"""


@dataclass(frozen=True)
class Section:
    """A heading and ready HTML under it."""

    title: str
    html: str


def plots(*svgs: str) -> str:
    """Plots side by side where there is room."""
    return f"<div class='plots'>{''.join(svgs)}</div>"


def preformatted(title: str, text: str) -> str:
    """Long text, folded away."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """A whole HTML document."""
    body = "".join(f"<h2>{escape(s.title)}</h2>{s.html}" for s in sections)
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width,initial-scale=1'><style>{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1><p class='note'>{escape(lead)}</p>{body}</body></html>\n"
    )
