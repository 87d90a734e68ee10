"""The style of the HTML report: light, dark and paper, from a telephone's width up."""

__all__ = ["STYLE"]

STYLE = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#16202c;--soft:#586474;--rule:#dfe4ea;--grid:#e6eaef;
--accent:#0f62c4;--good:#12724a;--bad:#b3261e;--warn:#8a5a00;--warnbg:#fff6e2;
--c0:#2f6fde;--c1:#d9760a;--c2:#14936c;--c3:#c63d82;--c4:#7a4fd0;--c5:#66758a}
@media (prefers-color-scheme:dark){:root{color-scheme:dark;--bg:#10151c;--card:#18202a;
--ink:#e8edf3;--soft:#a0adbc;--rule:#2d3846;--grid:#273140;--accent:#7db4ff;--good:#5fd39d;
--bad:#ff8f86;--warn:#f2c66d;--warnbg:#2b2413;
--c0:#6ea3ff;--c1:#f7a440;--c2:#4fcf9f;--c3:#f281b4;--c4:#b394ff;--c5:#97a6ba}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,"Segoe UI",Roboto,"Helvetica Neue","DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 56px}
header{margin-bottom:22px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:40px 0 4px;letter-spacing:-.005em}
h3{font-size:1rem;margin:0 0 10px}
p{margin:0 0 12px;max-width:76ch}
.soft,.note{color:var(--soft)}
.note{font-size:.9rem}
.eyebrow{color:var(--accent);font-weight:600;font-size:.85rem;letter-spacing:.04em;margin:0 0 4px}
.grid{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));
margin:14px 0}
.card{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:16px 18px;
min-width:0}
.card h3{overflow-wrap:anywhere}
.big{font-size:2.1rem;font-weight:650;line-height:1.1;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.big small{font-size:1rem;font-weight:500;color:var(--soft);letter-spacing:0}
dl{display:grid;grid-template-columns:auto 1fr;gap:2px 16px;margin:12px 0 0;font-size:.92rem}
dt{color:var(--soft)}
dd{margin:0;text-align:right;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
dl.facts dd{text-align:left}
figure{margin:0}
figcaption{font-size:.9rem;color:var(--soft);margin-top:6px}
svg{display:block;width:100%;max-width:560px;height:auto;font-family:inherit}
svg text{fill:var(--ink);font-size:13px;paint-order:stroke;stroke:var(--card);stroke-width:3px;
stroke-linejoin:round}
svg .small,svg .axis{fill:var(--soft);font-size:11.5px}
svg .label{font-weight:600}
svg .value{fill:var(--soft);font-variant-numeric:tabular-nums;font-size:12.5px}
svg .grid{stroke:var(--grid);stroke-width:1}
svg .mark{stroke:var(--ink);stroke-width:2.5}
svg .span{stroke-width:4;stroke-linecap:round;opacity:.45}
svg .curve{fill:none;stroke-width:2.4;stroke-linejoin:round}
svg .ring{stroke:var(--card);stroke-width:2}
svg .disc{fill-opacity:.75}
.s0{--s:var(--c0)}.s1{--s:var(--c1)}.s2{--s:var(--c2)}.s3{--s:var(--c3)}.s4{--s:var(--c4)}
.s5{--s:var(--c5)}
svg .fill{fill:var(--s)}
svg .span,svg .curve{stroke:var(--s)}
svg .over{fill:var(--bad);fill-opacity:.07}
svg .budget{stroke:var(--bad);stroke-width:1.5;stroke-dasharray:6 4}
svg .zero{stroke:var(--soft);stroke-width:1}
svg .front{fill:none;stroke:var(--c0);stroke-width:2;stroke-opacity:.65;stroke-linejoin:round}
svg .whisker{stroke:var(--s);stroke-width:1.5;stroke-opacity:.7}
svg .whisker.s5{stroke-opacity:.4}
svg .hollow{fill:var(--card);stroke:var(--s);stroke-width:1.5}
svg .leader{stroke:var(--soft);stroke-width:.8}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--rule);border-radius:12px;
margin:0 0 14px}.note{margin:10px 0 6px;max-width:none}
.scroll:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:7px 12px;text-align:right;white-space:nowrap;border-top:1px solid var(--rule)}
thead th{color:var(--soft);font-weight:600;border-top:0;font-size:.85rem}
th[scope=row],th.left,td.left{text-align:left;font-weight:500}
th[scope=row]{position:sticky;left:0;background:var(--card)}
td small{display:block;color:var(--soft);font-size:.78rem}
.pass{color:var(--good);font-weight:650}
.fail{color:var(--bad);font-weight:650}
.warn{background:var(--warnbg);border-left:4px solid var(--warn);border-radius:8px;
padding:12px 16px;margin:14px 0}
.warn h3{color:var(--warn);margin-bottom:4px}
.warn ul{margin:0;padding-left:20px}
.warn li{overflow-wrap:anywhere}
.nodes summary{cursor:pointer;color:var(--soft);font-size:.9rem;margin:0 0 8px}
.nodes .block th{position:static;text-align:left;color:var(--soft);font-weight:600;
font-size:.85rem;background:var(--bg);padding:5px 12px}
.nodes .block span{position:sticky;left:12px}
.nodes tbody td,.nodes tbody th{vertical-align:top}.nodes tbody th{min-width:8em}
.nodes td small{white-space:normal;min-width:9em}
.search tbody td,.search tbody th{vertical-align:top}
.search tbody th,.search td.left{white-space:normal;min-width:12em}
.search td.left:not(:nth-child(2)){min-width:0}
.chip::before{content:"";display:inline-block;width:.7em;height:.7em;margin-right:.45em;
border-radius:2px;background:var(--s)}
.bar{display:inline-block;width:7.5em;height:.8em;margin-right:.4em;background:var(--grid);
border-radius:2px;vertical-align:-.05em;overflow:hidden}
.bar i{display:block;height:100%;background:var(--s)}
footer{margin-top:40px;color:var(--soft);font-size:.88rem}
@media (max-width:560px){main{padding:18px 12px 40px}h1{font-size:1.4rem}
.card{padding:14px}th,td{padding:7px 10px}
th[scope=row],td.left{white-space:normal;overflow-wrap:anywhere;min-width:5em}
td.left{min-width:9em}
svg text{font-size:14.5px}svg .small,svg .axis{font-size:13.5px}svg .value{font-size:13.5px}}
@media print{:root{color-scheme:light;--bg:#fff;--card:#fff;--ink:#000;--soft:#444;--rule:#bbb;
--grid:#ddd;--accent:#0b4a94;--good:#0b5c3a;--bad:#9b1c15;--warn:#6b4600;--warnbg:#fff;
--c0:#2f6fde;--c1:#d9760a;--c2:#14936c;--c3:#c63d82;--c4:#7a4fd0;--c5:#66758a}
body{font-size:11pt;-webkit-print-color-adjust:exact;print-color-adjust:exact}
main{max-width:none;padding:0}.scroll{overflow:visible}figure,.card,tr{break-inside:avoid}
h2{break-after:avoid}th[scope=row]{position:static}
th,td{padding:4px 6px;font-size:9pt}.grid{grid-template-columns:1fr 1fr}}
"""
