"""Style of a report, for light and dark screens and for paper. Most people can tell the colours of curves apart."""

from __future__ import annotations

LIGHT = ("#2f6db5", "#d9622b", "#2a8f68", "#9a4fb0", "#a87b00", "#c2385a", "#3d8796", "#70757d")
DARK = ("#6ea8ea", "#f08d5c", "#5cc79a", "#c88ade", "#dcb545", "#ef7d97", "#74bfcd", "#a3a8b0")
PAPER = "--ground:#fff;--card:#fff;--ink:#22262c;--dim:#6a7078;--rule:#dfe2e6;--on:#fff;"
NIGHT = "--ground:#15181c;--card:#1d2126;--ink:#e6e8eb;--dim:#9aa1a9;--rule:#343a41;--on:#101214;"


def _palette(colours: tuple[str, ...]) -> str:
    return "".join(f"--c{i}:{c};" for i, c in enumerate(colours))


def style() -> str:
    coloured = "".join(
        f".c{i}{{stroke:var(--c{i})}}.fill-c{i}{{fill:var(--c{i})}}.back-c{i}{{background:var(--c{i})}}"
        f".stroke-c{i}{{stroke:var(--c{i})}}\n"
        for i in range(len(LIGHT))
    )
    return f"""
:root{{color-scheme:light dark;{PAPER}--ground:#f6f7f8;{_palette(LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{{NIGHT}{_palette(DARK)}}}}}
@media print{{:root{{color-scheme:light;{PAPER}{_palette(LIGHT)}}}body{{margin:0;max-width:none}}
section{{border:0!important;padding:0!important}}svg,tr,figure,blockquote{{break-inside:avoid}}h2,.legend{{break-after:avoid}}
.wide{{overflow:visible!important}}*{{print-color-adjust:exact;-webkit-print-color-adjust:exact}}}}
*{{box-sizing:border-box}}
body{{margin:2rem auto;max-width:1120px;padding:0 1rem;background:var(--ground);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:break-word}}
h1{{font-size:1.7rem;margin:0 0 .2rem}}h2{{font-size:1.1rem;margin:0 0 .7rem}}
h3{{font-size:.95rem;margin:.9rem 0 .3rem}}
section{{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:1.1rem 1.3rem;margin:1.1rem 0}}
p{{margin:.3rem 0}}.dim{{color:var(--dim)}}
svg{{display:block;width:100%;height:auto;font-size:12px;overflow:hidden}}
svg text{{fill:var(--ink);font-variant-numeric:tabular-nums}}svg text.dim{{fill:var(--dim)}}
svg text.on{{fill:var(--on);font-weight:600}}
.grid{{stroke:var(--rule);stroke-width:1}}
.line{{fill:none;stroke-width:2;stroke-linejoin:round}}
.thin{{stroke-width:1.3}}.faint{{stroke-width:1;opacity:.32}}.dots{{stroke-width:1.3;stroke-dasharray:5 3}}
.dot{{stroke:var(--card);stroke-width:1.2}}.box{{fill:none;stroke-width:1.2;opacity:.8}}
.arrow{{fill:none;stroke:var(--dim);stroke-width:1.3}}
.event{{stroke-width:1.2;stroke-dasharray:2 3;fill:none}}
svg text.cross{{font-size:15px;font-weight:700}}
{coloured}
.legend{{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;font-size:.87rem;margin:.2rem 0 .6rem}}
.key{{display:inline-block;width:.8em;height:.8em;border-radius:3px;margin-right:.45em;vertical-align:-.05em}}
.legend span{{overflow-wrap:anywhere}}.wide{{overflow-x:auto}}.wide>svg{{min-width:min(640px,160vw)}}
@media (max-width:600px){{body{{margin:1rem auto;padding:0 .5rem}}section{{padding:.8rem;overflow-x:auto}}
svg{{font-size:15px}}figure>svg{{overflow:visible}}tbody th{{min-width:7em}}}}
table{{border-collapse:collapse;width:100%;font-size:.87rem;font-variant-numeric:tabular-nums}}
th,td{{text-align:left;padding:.34rem .8rem .34rem 0;border-bottom:1px solid var(--rule);vertical-align:top}}
thead th{{color:var(--dim);font-weight:500;vertical-align:bottom}}tbody th{{font-weight:600}}
tbody tr:last-child>*{{border-bottom:0}}
td{{overflow-wrap:anywhere;min-width:5em}}tbody th{{min-width:11em}}.run{{overflow-wrap:anywhere}}
.short td{{white-space:nowrap}}td small{{color:var(--dim);display:block;white-space:normal}}
.two{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(400px,100%),1fr));gap:1.1rem 1.8rem}}
figure{{margin:0}}.whole{{grid-column:1/-1}}figcaption{{font-size:.87rem;color:var(--dim);margin-bottom:.2rem}}
blockquote{{margin:.4rem 0 .9rem;padding:.1rem 0 .1rem .9rem;border-left:3px solid var(--rule);white-space:pre-wrap}}
blockquote b{{font-weight:400;color:var(--dim)}}
"""
