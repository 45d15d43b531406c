"""The style of the report: readable on a phone and on a desktop, by day and by night, for the colour-blind."""

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), black replaced by grey.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#888888", "#b5a800")
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 80rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; border-bottom: 1px solid #8886; }
h3 { font-size: 1rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: .5rem 0; }
td, th { border: 1px solid #8886; padding: .15rem .5rem; text-align: left; vertical-align: top; }
td { min-width: 6rem; } td + td { font-variant-numeric: tabular-nums; } td + td:last-child { min-width: 12rem; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; min-width: 0; } figcaption { font-weight: 600; }
figure > svg { width: 100%; height: auto; display: block; } svg text { font-size: 12px; fill: currentColor; }
svg path { fill: none; stroke: var(--own); stroke-width: 1.6; stroke-linejoin: round; }
svg circle { fill: var(--own); } svg .grid { stroke: currentColor; stroke-opacity: .13; }
.legend { list-style: none; margin: .3rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem 1rem; }
.legend li { font-size: 13px; overflow-wrap: anywhere; display: flex; align-items: baseline; gap: .4em; }
.legend b { flex: none; }
.legend i { display: inline-block; width: .8em; height: .8em; background: var(--own); flex: none; }
.legend .sign { width: 24px; height: 8px; flex: none; }
.bar { display: flex; height: 1.2rem; } .bar span { background: var(--own); min-width: 1px; }
.warnings li { color: #d55e00; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #8881; padding: .5rem; margin: .3rem 0; }
pre.thinking { border-left: 4px solid #0072b2; } pre.learned { border-left: 4px solid #009e73; }
details { margin: .3rem 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
""" + "".join(f".c{number} {{ --own: {colour}; }}\n" for number, colour in enumerate(_COLOURS))
