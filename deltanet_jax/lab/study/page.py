"""The frame of report.html: one file, no network, light and dark."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Recall against memory</title>
<style>
:root { color-scheme: light dark; --back: #ffffff; --text: #1b1f24;
  --faint: #d9dce1; --soft: #5b636e; --good: #1a7f37; --bad: #b3261e;
  --open: #7a5c00; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a;
  --text: #e6e8eb; --faint: #343a42; --soft: #9aa3ae; --good: #57c77c;
  --bad: #ff8a80; --open: #e2c25b; } }
body { background: var(--back); color: var(--text); margin: 0 auto;
  max-width: 62rem; padding: 1.5rem 1rem 4rem;
  font: 16px/1.55 system-ui, sans-serif; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
.soft, figcaption { color: var(--soft); }
.remark { color: var(--bad); }
figure { margin: 1.5rem 0; } figcaption { margin-bottom: .3rem; }
svg { width: 100%; height: auto; } .dark { display: none; }
@media (prefers-color-scheme: dark) { .light { display: none; }
  .dark { display: block; } }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th, td { border-bottom: 1px solid var(--faint); padding: .3rem .6rem;
  text-align: left; font-variant-numeric: tabular-nums; }
td.n { white-space: nowrap; }
.holds { color: var(--good); } .violated { color: var(--bad); }
.not { color: var(--open); white-space: nowrap; }
</style></head><body>
<h1>Recall against memory</h1>
<p class="soft">Size @SIZE@. Every model has the parameters of full attention
within 2 % and begins with the same local layer. The learning rate is the best
of @RATES@ on a seed of its own; then @SEEDS@ fresh seeds, the same data for
every model of a seed, @ITEMS@ unseen sequences each. Brackets are 95 %
intervals of a bootstrap over seeds and sequences, paired where models are
compared; with so few seeds they are no more than a first look at the spread
between seeds.</p>
<h2>Verdict</h2>
<p class="soft">Accuracy at the hardest size of each task less full
attention's, which stands last: where that is low, the training was too short
for anyone, and the difference says little.</p>
@VERDICT@
<h2>What was expected</h2>
<p class="soft">An ordering holds or is violated when the whole interval lies on
one side; what is to be equal holds when the interval lies within
@MARGIN@ unless another margin stands there. Everything else is not
resolved.</p>
<div class="wide"><table>
<tr><th>expectation</th><th>rule</th><th>value</th><th>verdict</th></tr>
@FINDINGS@</table></div>
<h2>Pictures</h2>
@FIGURES@
<h2>Every task</h2>
<p class="soft">Numbers kept: of one sequence as long as the task's, states and
caches together.</p>
@TABLES@
<h2>Sizes</h2>
<p class="soft">@SIZES@</p>
</body></html>
"""
