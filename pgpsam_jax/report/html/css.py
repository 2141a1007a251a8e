"""The style sheet of the page, in the colors of both themes."""

from pgpsam_jax.visualization.theme import DARK, LIGHT, Theme

_MORE = {  # tint, link, notice background, notice edge, shade at a scrolled edge
    "light": ("#F6F8FA", "#0B5CAD", "#FFF6DD", "#9A6700", "#C4CCD4"),
    "dark": ("#1C2128", "#79B8FF", "#2E2510", "#D9A93B", "#4A545F"),
}


def stylesheet() -> str:
    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}"
    return f":root {{ color-scheme: light dark; {_variables(LIGHT)} }}\n{dark}\n{_RULES}"


def _variables(theme: Theme) -> str:
    names = ("surface", "text", "muted", "line", "tint", "link", "notice", "edge", "shade")
    values = (theme.surface, theme.text, theme.muted, theme.line, *_MORE[theme.name])
    return " ".join(f"--{name}: {value};" for name, value in zip(names, values, strict=True))


_RULES = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--surface); color: var(--text); overflow-wrap: break-word;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
  sans-serif; -webkit-text-size-adjust: 100%; }
main, header, footer { max-width: 70rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 2.5rem; }
footer { padding-top: 2rem; padding-bottom: 3rem; color: var(--muted); font-size: .875rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: .2rem 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.4rem; line-height: 1.3; margin: 3.25rem 0 1rem; padding-top: 1.25rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p, main ul, figcaption { max-width: 72ch; }
p { margin: .5rem 0 1rem; }
a { color: var(--link); text-underline-offset: .15em; }
.kind { margin: 0; color: var(--muted); font-size: .875rem; text-transform: uppercase;
  letter-spacing: .06em; }
.about, .missing { color: var(--muted); }
.notice { max-width: none; margin: .75rem 0; padding: .6rem .9rem; background: var(--notice);
  border-left: 4px solid var(--edge); border-radius: 0 .3rem .3rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem;
  margin: 1.5rem 0; }
.tiles div { padding: .8rem 1rem; background: var(--tint); border: 1px solid var(--line);
  border-radius: .5rem; }
.tiles dt { color: var(--muted); font-size: .875rem; }
.tiles dd { margin: 0; font-size: .875rem; }
.tiles .number { font-size: 1.9rem; line-height: 1.25; font-weight: 650;
  font-variant-numeric: tabular-nums; }
nav ul { display: flex; flex-wrap: wrap; gap: .35rem 1.1rem; margin: 0; padding: 0;
  list-style: none; }
.scroll { overflow-x: auto; margin: 1rem 0 .5rem; background:
  linear-gradient(to right, var(--surface) 40%, transparent) left / 2rem 100% no-repeat local,
  linear-gradient(to left, var(--surface) 40%, transparent) right / 2rem 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) left / .8rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), transparent) right / .8rem 100% no-repeat scroll; }
.scroll:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; font-size: .95rem; padding: .2rem 0 .5rem; }
th, td { padding: .38rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: .6rem; }
th { font-weight: 500; }
thead th { color: var(--muted); border-bottom: 2px solid var(--line); vertical-align: bottom;
  white-space: normal; }
tbody tr:hover { background: var(--tint); }
tbody th { white-space: normal; min-width: 9rem; }
.dense table { font-size: .8125rem; }
.dense th, .dense td { padding: .38rem .45rem; }
.text th, .text td { text-align: left; }
.text td { white-space: normal; min-width: 6rem; overflow-wrap: anywhere; }
.text td:last-child { min-width: 11rem; }
.set th, .set td { background: var(--tint); }
.set th { box-shadow: inset 3px 0 0 var(--link); font-weight: 600; }
.set td:nth-child(2) { font-weight: 600; }
.set td:nth-child(3) { color: var(--muted); }
.groups { columns: 19rem; column-gap: 2rem; }
.groups details { break-inside: avoid; margin: 0; padding: .35rem 0; }
.groups .scroll { margin: .25rem 0 .75rem; }
.groups table { width: 100%; }
.groups th, .groups td, .groups td:last-child { min-width: 0; padding: .3rem .5rem; }
.scroll + ul { margin: .25rem 0 2rem; padding-left: 1.1rem; color: var(--muted);
  font-size: .875rem; }
figure { margin: 1.5rem 0 2.25rem; }
figure h3 { margin: 0 0 .5rem; }
figure .scroll { margin: 0; }
img { display: block; max-width: 100%; height: auto; }
img.film { border-radius: .4rem; }
figcaption { margin-top: .5rem; color: var(--muted); font-size: .875rem; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details { margin: .75rem 0; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 44rem) {
  main, header, footer { padding-left: 1rem; padding-right: 1rem; }
  h1 { font-size: 1.6rem; }
  figure img { max-width: 40rem; }
  caption { max-width: calc(100vw - 2.5rem); }
}
@media print {
  h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  .scroll { overflow: visible; }
}
"""
