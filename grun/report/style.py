"""Style sheet of report.html: one column, readable from 320 px on, light and dark."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --soft: #57606a; --ground: #ffffff; --card: #f4f6f8; --line: #d0d7de;
  --link: #0550ae; --good: #116329; --bad: #a40e26; --open: #6e4a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #a3adb8; --ground: #12161c; --card: #1c222a;
  --line: #3a434e; --link: #79b8ff; --good: #6fdd8b; --bad: #ff9492; --open: #f0c674; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
header, main { max-width: 76rem; margin: 0 auto; padding: 0 1rem; }
main { padding-bottom: 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1.2rem 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 0; display: inline; overflow-wrap: anywhere; }
h4 { font-size: 1rem; margin: 0 0 .4rem; overflow-wrap: anywhere; white-space: pre-wrap; }
a { color: var(--link); }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 0; padding: 0; }
nav a { display: inline-block; padding: .3rem 0; }
.verdict { margin: .6rem 0; padding: .6rem .8rem; background: var(--card); border-left: 5px solid var(--open);
  border-radius: 4px; max-width: 60rem; overflow-wrap: anywhere; }
.verdict.reached { border-color: var(--good); } .verdict.missed { border-color: var(--bad); }
.mark { font-weight: 600; color: var(--open); }
.reached .mark { color: var(--good); } .missed .mark { color: var(--bad); }
.scroll { overflow-x: auto; max-width: 100%; border: 1px solid var(--line); border-radius: 4px; }
.scroll:focus-visible { outline: 3px solid var(--link); outline-offset: 1px; }
table { border-collapse: separate; border-spacing: 0; font-size: 15px; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: right; vertical-align: bottom; }
thead th { min-width: 6.2rem; font-weight: 600; line-height: 1.25; }
th:first-child { position: sticky; left: 0; background: var(--ground); text-align: left; min-width: 7rem;
  max-width: 11rem; border-right: 1px solid var(--line); overflow-wrap: anywhere; }
thead span, tbody td { white-space: nowrap; }
tbody th, tbody td { border-top: 1px solid var(--line); }
tr.good td, tr.good th { font-size: 14px; font-weight: 400; color: var(--soft); line-height: 1.25;
  vertical-align: top; }
tbody tr.retain_only th, tbody tr.retain_only td { background: var(--card); font-weight: 600; }
figure { margin: 1.2rem 0 2rem; }
.picture { background: #ffffff; }
.picture img { display: block; margin: 0 auto; height: auto; max-width: none; }
@media (min-width: 60rem) { .picture img:not(.wide) { max-width: 100%; } }
figcaption { margin-top: .4rem; color: var(--soft); max-width: 60rem; }
figcaption strong { color: var(--ink); }
details { margin: .6rem 0; }
summary { cursor: pointer; padding: .4rem 0; color: var(--ink); }
details.set { border-bottom: 1px solid var(--line); margin: 0; }
article { background: var(--card); border-radius: 4px; padding: .7rem .8rem; margin: .6rem 0; }
dl { margin: .3rem 0; }
dl > div { display: grid; grid-template-columns: 11rem minmax(0, 1fr); gap: 0 1rem; padding: .2rem 0; }
dt { color: var(--soft); overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; unicode-bidi: isolate; }
article dl > div { border-top: 1px solid var(--line); }
pre { margin: 0; padding: .6rem .8rem; font: 14px/1.5 ui-monospace, monospace; }
@media (max-width: 40rem) {
  dl > div { grid-template-columns: minmax(0, 1fr); }
  dt { font-size: 14px; }
  th:first-child { max-width: 8rem; min-width: 6rem; }
}
@media print { .scroll { overflow: visible; border: 0; } details { display: block; } }
"""
