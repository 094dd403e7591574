"""The style sheet of a report, for screens of any width, light and dark."""

STYLE = """
:root{color-scheme:light dark;--paper:#fcfcfa;--card:#fff;--ink:#17202b;--muted:#5b6675;--line:#e3e6ea;
--a:#2b66b1;--b:#b4541a;--c:#a8326a;--d:#8b95a3;--e:#2c7d55;--f:#7a55b0;--good:#2c7d55;--bad:#b3383a}
@media(prefers-color-scheme:dark){:root{--paper:#12161b;--card:#191f26;--ink:#e6e9ed;--muted:#9aa5b3;--line:#2c343e;
--a:#6fa8ee;--b:#e8965a;--c:#e277ae;--d:#7d8896;--e:#5cbf8f;--f:#b391ea;--good:#5cbf8f;--bad:#ee7f80}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;
font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:1160px;margin:0 auto;padding:2.5rem 1.5rem 4rem}
header p{margin:0;color:var(--muted)}
.over{font-size:.8rem;letter-spacing:.12em;text-transform:uppercase}
h1{font-size:2.2rem;line-height:1.15;letter-spacing:-.02em;margin:.15rem 0 .6rem}
h2{font-size:1.2rem;letter-spacing:-.01em;margin:3rem 0 .25rem}
h2+p,.note{color:var(--muted);margin:0 0 1rem;max-width:46rem}
code{font:.9em ui-monospace,SFMono-Regular,Menlo,monospace;overflow-wrap:anywhere}
figure{margin:0}
.facts{display:flex;flex-wrap:wrap;gap:.35rem 1.6rem;margin:.9rem 0 0;padding:0;list-style:none;font-size:.95rem}
.facts span{color:var(--muted);margin-right:.4em}
.lead{display:grid;grid-template-columns:minmax(0,5fr) minmax(0,6fr);gap:1rem;margin-top:2rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:1.1rem 1.3rem}
.score b{font-size:3.4rem;line-height:1;letter-spacing:-.03em;font-weight:650}
.score p{margin:.2rem 0 1rem;color:var(--muted)}
.compare{display:grid;grid-template-columns:auto 1fr auto;gap:.35rem .7rem;align-items:center;font-size:.9rem}
.compare div{height:.7rem;border-radius:4px;background:var(--line);overflow:hidden}
.compare div span{display:block;height:100%;background:var(--e)}.compare .before span{background:var(--d)}
.numbers{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));padding:0;overflow:hidden}
.numbers div{padding:.9rem 1.1rem;line-height:1.25;border:0 solid var(--line);border-width:0 1px 1px 0;
margin:0 -1px -1px 0}
.numbers b{display:block;font-size:1.35rem;font-weight:600;letter-spacing:-.01em}
.numbers span{color:var(--muted);font-size:.85rem}
.charts{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:1rem;margin-top:1rem}
.chart{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:.8rem .9rem .4rem}
.chart figcaption{display:flex;justify-content:space-between;align-items:baseline;gap:.6rem;font-size:.95rem;
font-weight:600;margin-bottom:.3rem}
.chart small{font-weight:400;color:var(--muted);margin-left:.45em;font-size:.8rem}
.chart b{font-weight:600;white-space:nowrap}
.legend{font-size:.75rem;color:var(--muted);margin:.1rem 0 .3rem;text-align:center}
.chart svg{display:block;width:100%;height:auto;overflow:visible}
.chart text{font-size:11px;fill:var(--muted);font-family:inherit}
.grid{stroke:var(--line);stroke-width:1}.level{stroke:var(--muted);stroke-width:1;stroke-dasharray:4 3}
.bold{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.fine{fill:none;stroke-width:1;opacity:.35}
path.a{stroke:var(--a)}path.b{stroke:var(--b)}path.c{stroke:var(--c)}path.e{stroke:var(--e)}
circle.a,polygon.a{fill:var(--a)}circle.b,polygon.b{fill:var(--b)}circle.c,polygon.c{fill:var(--c)}
polygon.d{fill:var(--d)}polygon.e{fill:var(--e)}polygon.f{fill:var(--f)}circle.e{fill:var(--e)}
.a,.b,.c,.d,.e,.f{--tone:var(--d)}.a{--tone:var(--a)}.b{--tone:var(--b)}.c{--tone:var(--c)}.e{--tone:var(--e)}
.f{--tone:var(--f)}
i{display:inline-block;width:.7em;height:.7em;border-radius:2px;background:var(--tone);margin:0 .35em 0 .5em}
.none{background:repeating-linear-gradient(135deg,var(--line) 0 3px,transparent 3px 6px)}
.timeline{display:grid;grid-template-columns:auto 1fr;gap:.5rem .9rem;align-items:center;font-size:.9rem;
margin-bottom:1rem}
.timeline b{font-weight:500}
.bar{display:flex;height:1.7rem;border-radius:6px;overflow:hidden;background:var(--line)}
.bar span{background:var(--tone);min-width:2px}
.bar span+span{border-left:1px solid var(--card)}.bar .none{
background:repeating-linear-gradient(135deg,var(--line) 0 3px,var(--card) 3px 6px)}
.split{display:grid;grid-template-columns:minmax(0,6fr) minmax(0,5fr);gap:1rem 2.5rem}
table.phases{max-width:46rem}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th{font-weight:500;color:var(--muted);text-align:left}
th,td{border-bottom:1px solid var(--line);padding:.4rem .8rem .4rem 0;vertical-align:top}
.phases th+th,.phases td+td{text-align:right;padding-right:0;white-space:nowrap}
.phases tr:last-child td{border-bottom:0}.phases .sum td{font-weight:600}.phases i{margin-left:0}
.settings td:first-child{color:var(--muted);white-space:nowrap;padding-right:1.5rem}
.settings td+td{overflow-wrap:anywhere}
.events{margin:.5rem 0 0;padding:0;list-style:none}
.events li{border-left:3px solid var(--b);padding:.1rem 0 .1rem .8rem;margin:.5rem 0}
.events span{color:var(--muted);margin-right:.6em}
img{display:block;width:100%;height:auto;border-radius:4px}img.small{image-rendering:pixelated}
.strips{display:grid;grid-template-columns:5.5rem repeat(10,minmax(0,1fr));gap:.4rem;margin-top:1rem}
.strip,.names{display:grid;gap:.4rem;grid-auto-rows:1fr}
.names{color:var(--muted);font-size:.85rem}.names span{align-self:center}
.queries{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:1.3rem 2.4rem;margin-top:1rem}
.neighbours{display:grid;grid-template-columns:repeat(6,minmax(0,1fr));gap:.6rem;align-items:start}
.neighbours figcaption{font-size:.72rem;line-height:1.25;margin-top:.25rem;color:var(--muted);overflow:hidden;
text-overflow:ellipsis;white-space:nowrap}
.query{position:relative}
.query::after{content:"";position:absolute;right:-.35rem;top:0;bottom:0;border-right:1px solid var(--line)}
.neighbours .query figcaption{color:var(--ink);font-weight:600}
.same img{outline:2px solid var(--good);outline-offset:1px}.other img{outline:2px dashed var(--bad);outline-offset:1px}
.neighbours .same figcaption{color:var(--good)}.neighbours .other figcaption{color:var(--bad)}
footer{margin-top:3rem;border-top:1px solid var(--line);padding-top:.8rem;color:var(--muted);font-size:.85rem}
@media(max-width:900px){.charts{grid-template-columns:repeat(2,minmax(0,1fr))}.lead,.split{grid-template-columns:1fr}}
@media(max-width:600px){main{padding:1.4rem 1rem 3rem}h1{font-size:1.8rem}h2{margin-top:2.2rem}
.charts,.queries{grid-template-columns:minmax(0,1fr)}.numbers{grid-template-columns:repeat(2,minmax(0,1fr))}
.strips{grid-template-columns:repeat(5,minmax(0,1fr))}.names{display:none}.strip{margin-bottom:.6rem}
.neighbours{gap:.45rem}.neighbours figcaption{font-size:.65rem}
.settings td{display:block;border:0;padding:0}.settings td:first-child{padding-top:.5rem;font-size:.85rem}}
@media print{body{background:#fff}.card,.chart,.strip,.neighbours{break-inside:avoid}}
"""
