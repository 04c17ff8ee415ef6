"""The HTML page around tables and charts: one file, no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

from html import escape

STYLE = """
:root{color-scheme:light dark;--bg:#f7f7f5;--card:#fff;--line:#e3e3df;--grid:#ecece8;--text:#1d2024;
--muted:#62686f;--best:#eceff1;--accent:#0072b2;--s0:#6b7480;--s1:#d55e00;--s2:#0072b2;--s3:#009e73;--s4:#cc79a7;
--s5:#e69f00;--s6:#56b4e9}
@media (prefers-color-scheme:dark){:root{--bg:#121417;--card:#1a1d21;--line:#2c3036;--grid:#282c31;
--text:#e7e8ea;--muted:#9aa1a9;--best:#30363d;--accent:#5cb3ea;--s0:#98a1ac;--s1:#f28444;--s2:#5cb3ea;--s3:#2fc39a;
--s4:#e2a3c6;--s5:#f3bd52;--s6:#9ad4f5}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);-webkit-text-size-adjust:100%;
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1160px;margin:0 auto;padding:40px 20px 56px}
h1{font-size:27px;line-height:1.2;letter-spacing:-.015em;margin:0 0 10px}
h2{font-size:19px;letter-spacing:-.01em;margin:44px 0 6px}
h3{font-size:14.5px;margin:0 0 8px}
p{margin:0 0 12px;max-width:76ch}
.lead{font-size:16.5px}
.note,figcaption{color:var(--muted);font-size:13.5px;line-height:1.5}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;
margin:22px 0 0}
.tile b{display:block;font-size:25px;font-weight:650;letter-spacing:-.02em;line-height:1.25}
.tile span{font-size:13px;color:var(--muted)}
.tile i{display:inline-block;width:9px;height:9px;border-radius:50%;margin-right:6px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14.5px}
.card .note{margin:12px 0 0;max-width:110ch}
th,td{padding:7px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{font-weight:600;font-size:13px;color:var(--muted)}
th:first-child,td:first-child{text-align:left;color:var(--text);padding-left:2px}
tr.total td{border-top:2px solid var(--line);font-weight:600}
tr.total+tr td{border-bottom:0}
td small{color:var(--muted);font-size:12.5px;font-weight:400}
td b{font-weight:680}
td.best b{background:var(--best);border-radius:4px;padding:2px 5px;margin:0 -5px}
figure{margin:0}
.card+.card{margin-top:14px}
.tiles .card{margin:0}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(310px,100%),1fr));
gap:20px 26px}
.charts.two{grid-template-columns:repeat(auto-fit,minmax(min(400px,100%),1fr))}
.charts svg{width:100%;height:auto;max-width:460px;display:block}
figcaption{margin-top:12px;max-width:110ch}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:0 0 12px;font-size:13.5px}
.legend span{display:inline-flex;align-items:center;gap:6px}
.legend svg{width:26px;height:12px}
.ramp{display:inline-block;width:84px;height:9px;border:1px solid var(--line);
background:linear-gradient(to right,transparent,var(--accent))}
dl{display:grid;grid-template-columns:max-content 1fr;gap:5px 22px;margin:0;font-size:14px}
dt{color:var(--muted)}
dd{margin:0;overflow-wrap:anywhere}
svg text{fill:var(--muted);font-size:10.5px;font-family:inherit}
svg text.title{fill:var(--text);font-size:12.5px;font-weight:650}
svg text.label{fill:var(--text);font-size:10.5px}
svg text.heading{font-size:10.5px;font-weight:650;fill:var(--muted)}
svg text.strong{font-weight:700}
.grid{stroke:var(--grid);fill:none}
.panel{fill:none;stroke:var(--line);stroke-width:.8}
.reference{stroke:var(--muted);stroke-dasharray:2 3;fill:none}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.line.l0{stroke-dasharray:5 4}
.whisker{fill:none;stroke-width:1.6;stroke-opacity:.55}
.dot{fill-opacity:.5}
.band{fill-opacity:.15}
.mark{stroke:var(--card);stroke-width:1}
.heat{fill:var(--accent)}
.gallery img{width:72px;height:72px;image-rendering:pixelated;display:block;border-radius:4px}
.gallery td{vertical-align:middle;text-align:left}.gallery th{text-align:left}
.gallery .bar{display:inline-block;height:9px;margin-left:8px;background:var(--accent)}
@media (max-width:640px){main{padding:24px 12px 40px}.card{padding:12px}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:8px}th,td{padding:6px 8px}}
@media print{:root{--bg:#fff}body{font-size:11pt}main{max-width:none;padding:0}
.tile,tr,.charts svg{break-inside:avoid}h2,h3{break-after:avoid}
.scroll{overflow:visible}table{font-size:9pt}th{font-size:8pt}th,td{padding:3px 6px}
.charts,.charts.two{grid-template-columns:1fr 1fr}}
""" + "".join(
    f".l{i}{{stroke:var(--s{i})}}.f{i}{{fill:var(--s{i})}}.b{i}{{background:var(--s{i})}}\n"
    for i in range(7)
)


def page(title: str, body: str) -> str:
    """A whole HTML document around a body that is already escaped."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
