"""The fixed parts of the HTML report: page template, style sheet, glossary."""

from string import Template

GLOSSARY = {
    "Head": "One of several attention maps that a layer computes side by side. Each looks for "
    "something else; a few carry most of the geometry.",
    "HeSS": "Head Sensitivity Score: how sharply the camera error (Cam) and the point error (PC) "
    "react to a head's query weights, as a share of its layer. Measured once per model.",
    "Block": "A tile of the attention map: some query tokens times some key tokens. Sparse "
    "attention computes only the blocks it expects to matter.",
    "Block sparsity": "Share of the blocks of patch queries that was dropped; the blocks of "
    "camera and register tokens are always kept and count.",
    "FLOP saving": "Share of all attention products that is not needed. Lower than the block "
    "sparsity, because camera and register tokens are never skipped. Products this small are "
    "not quicker to skip: the embedded model shows accuracy, not speed.",
    "Ratio ρ, CDF τ": "The two settings of the baseline. ρ: share of blocks that may be dropped. "
    "τ: share of attention probability to keep.",
    "Dense": "The model as it is, nothing skipped.",
    "Uniform": "Every head drops by the same rule (SparseVGGT). The baseline.",
    "HeSS policy": "The same number of blocks in total, but sensitive heads get more of them.",
    "Reverse": "Control: the least sensitive heads get the most blocks. If the score means "
    "something, this must hurt.",
    "Random": "Control: the scores of a layer dealt to its heads at random.",
    "AUC@30": "Camera quality, 0 to 1, higher is better: over all pairs of views, how often and "
    "by how much the larger of rotation and direction error stays below 30 degrees.",
    "ATE": "Absolute trajectory error: root mean square distance of the camera centres after the "
    "best similarity alignment. Lower is better.",
    "Accuracy, completeness": "Mean distance from predicted points to the nearest true one, and "
    "from true points to the nearest predicted one.",
    "Chamfer distance": "Mean of accuracy and completeness. Lower is better.",
    "Point error": "Mean distance between predicted and true point of the same pixel.",
    "± and Δ": "± is one standard error over scenes. Δ is the mean difference on the same scenes "
    "(paired), which cancels how hard each scene is. We call a difference clear when it is more "
    "than twice its standard error.",
}

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--text:#1c1f24;--muted:#5b626d;
--line:#e1e4e9;--accent:#b34a00;--good:#00613f;--bad:#9c2f00;--band:#fbf3ec}
@media (prefers-color-scheme:dark){:root{--bg:#121419;--card:#1b1e24;--text:#e8eaee;
--muted:#a3abb8;--line:#31363f;--accent:#ff9a52;--good:#4fd1a5;--bad:#ff9d78;--band:#272320}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main,header,footer{max-width:1240px;margin:0 auto;padding:0 20px}
header{padding-top:44px}
h1{font-size:clamp(1.6rem,4.5vw,2.3rem);line-height:1.15;margin:0 0 10px;letter-spacing:-.015em}
h2{font-size:1.3rem;margin:52px 0 6px;letter-spacing:-.01em}
p{margin:0 0 14px;max-width:74ch}.lead{font-size:1.08rem}.quiet{color:var(--muted)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(205px,1fr));gap:14px;
margin:24px 0 0;padding:0;list-style:none}
.cards li,figure,.scroll{background:var(--card);border:1px solid var(--line);border-radius:12px}
.cards li{padding:14px 16px}
.cards .what{color:var(--muted);font-size:.86rem}
.cards .value{font-size:1.45rem;font-weight:650;font-variant-numeric:tabular-nums;
letter-spacing:-.01em;white-space:nowrap}
.cards .value small{font-size:.9rem;font-weight:400;color:var(--muted)}
.better{color:var(--good)}.worse{color:var(--bad)}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:16px}
figure{margin:14px 0 0;padding:14px;overflow:hidden}
.grid figure{margin:0}.grid .full{grid-column:1/-1}
figure .wide{overflow-x:auto}
figure img{display:block;width:100%;height:auto;margin:0 auto;border-radius:6px}
figcaption{color:var(--muted);font-size:.9rem;margin-top:10px}
figcaption b{color:var(--text)}
.scroll{overflow-x:auto;margin-top:14px}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:8px 10px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
thead th{color:var(--muted);font-weight:600;vertical-align:bottom}
th[scope=row]{text-align:left;font-weight:600;position:sticky;left:0;background:var(--card)}
thead th:first-child{text-align:left;position:sticky;left:0;background:var(--card)}
th[scope=rowgroup]{text-align:left;color:var(--muted);font-weight:600;background:var(--bg)}
th[scope=rowgroup] span{position:sticky;left:12px}
tr.ours td,tr.ours th{background:var(--band)}
tbody:last-child tr:last-child>*{border-bottom:0}
.se{color:var(--muted);font-size:.86em}
.dot{display:inline-block;width:.72em;height:.72em;border-radius:50%;margin-right:.5em}
dl{display:grid;grid-template-columns:minmax(120px,190px) 1fr;gap:8px 20px;margin:14px 0 0}
dt{font-weight:600}dd{margin:0;color:var(--muted);overflow-wrap:anywhere}
footer{margin-top:56px;padding-top:22px;padding-bottom:44px;border-top:1px solid var(--line);
font-size:.88rem}
footer h2{margin-top:0;font-size:1.05rem}
code{font:.92em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
@media (max-width:560px){dl{grid-template-columns:1fr;gap:2px}dd{margin-bottom:10px}
figure{padding:8px}main,header,footer{padding-left:14px;padding-right:14px}}
@media print{body{background:#fff}figure,.cards li{break-inside:avoid}}
"""

PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="lead">$intro</p>
$cards
</header>
<main>
$sections
<section aria-labelledby="words">
<h2 id="words">What the words mean</h2>
<dl>$glossary</dl>
</section>
</main>
<footer>
<h2>Where these numbers come from</h2>
<dl>$provenance</dl>
</footer>
</body>
</html>
"""
)
