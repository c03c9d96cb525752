"""Make one self-contained page: everything is inline, it reads well in light and dark, and nothing is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from refine_nsp.report.plots import Plot, variables

PAGE_VARIABLES = (  # for light and for dark pages; text has a contrast of at least 4.5 on --paper and on --soft
    "--paper:#ffffff;--line:#d9dde2;--soft:#f4f6f8;--dim:#5c6670;--link:#0067a3;",
    "--paper:#15181c;--line:#343a41;--soft:#1e2329;--dim:#9aa5b1;--link:#56b4e9;",
)
STYLE = (
    f"""
:root {{ color-scheme: light dark; {PAGE_VARIABLES[0]}{variables(dark=False)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {PAGE_VARIABLES[1]}{variables(dark=True)} }} }}
"""
    + """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust:100%; }
body { margin:0 auto; max-width:72rem; padding:2rem 1.25rem 4rem; color:var(--ink); background:var(--paper); overflow-wrap:anywhere;
  font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif; }
h1 { font-size:1.6rem; line-height:1.25; margin:0 0 .25rem; } h2 { font-size:1.15rem; margin:2.2rem 0 .6rem; }
p.note { color:var(--dim); margin:.3rem 0; font-size:.9rem; }
.scroll { overflow-x:auto; margin:.6rem 0; }
table { border-collapse:collapse; font-variant-numeric:tabular-nums; font-size:.88rem; overflow-wrap:normal; }
caption { text-align:left; font-weight:600; padding:.3rem 0; overflow-wrap:anywhere; }
caption span { position:sticky; left:0; display:inline-block; max-width:calc(100vw - 2.5rem); }
th,td { border-bottom:1px solid var(--line); padding:.3rem .7rem; text-align:right; white-space:nowrap; vertical-align:top; }
th { white-space:normal; min-width:4rem; max-width:14rem; overflow-wrap:anywhere; vertical-align:bottom; }
td.prose { white-space:pre-wrap; max-width:30rem; overflow-wrap:break-word; }
th.prose,td.prose { text-align:left; } thead th { border-bottom:2px solid var(--line); }
.plots { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(22rem,100%),1fr)); gap:1rem; align-items:start; }
.plot { margin:0; min-width:0; border:1px solid var(--line); border-radius:6px; padding:.6rem; }
.plot.wide { grid-column:1/-1; }
figcaption { font-weight:600; font-size:.9rem; line-height:1.35; margin-bottom:.4rem; }
.drawing { overflow-x:auto; } .drawing > svg { display:block; width:100%; height:auto; max-height:26rem; }
.drawing text { font-family:inherit !important; }
.legend { list-style:none; display:flex; flex-wrap:wrap; gap:.15rem 1rem; margin:.4rem 0 0; padding:0; font-size:.82rem; line-height:1.4; }
.legend li { display:flex; gap:.4rem; align-items:center; min-width:0; } .legend svg { flex:none; width:40px; height:13px; }
pre { background:var(--soft); border:1px solid var(--line); border-radius:6px; padding:.8rem; overflow-x:auto; font-size:.82rem; }
details { margin:.5rem 0; } summary { cursor:pointer; color:var(--link); }
.text { white-space:pre-wrap; overflow-wrap:anywhere; font-family:ui-monospace,Menlo,Consolas,monospace; font-size:.84rem; line-height:1.9;
  background:var(--soft); border:1px solid var(--line); border-radius:6px; padding:.9rem; }
@media (max-width:40rem) {
  body { padding:1.2rem .9rem 3rem; } th,td { padding:.3rem .5rem; }
  td:first-child,th:first-child { position:sticky; left:0; background:var(--paper); white-space:normal; max-width:9.5rem; }
  td.prose { min-width:9.5rem; max-width:18rem; } td.prose:first-child { max-width:9.5rem; overflow-wrap:anywhere; }
}
"""
)

# With this policy the browser runs nothing and fetches nothing, whatever a run's files hold.
POLICY = """<meta http-equiv='Content-Security-Policy' content="default-src 'none'; style-src 'unsafe-inline'">"""


@dataclass(frozen=True)
class Section:
    """Hold a heading and the HTML under it."""

    title: str
    html: str


def plots(*drawn: Plot) -> str:
    """Lay out plots side by side where there is room."""
    return f"<div class='plots'>{''.join(plot.html() for plot in drawn)}</div>"


def preformatted(title: str, text: str) -> str:
    """Fold long text away under its title."""
    return f"<details><summary>{escape(title)}</summary><pre tabindex='0'>{escape(text)}</pre></details>"


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Write a whole HTML document."""
    body = "".join(f"<h2>{escape(s.title)}</h2>{s.html}" for s in sections)
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width,initial-scale=1'>{POLICY}<style>{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1><p class='note'>{escape(lead)}</p>{body}</body></html>\n"
    )
