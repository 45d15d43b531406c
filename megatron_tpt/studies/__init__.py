"""Studies: steps with every combination of the factors of an experiment, each run once, and the report over all.

study.py reads the file, expand.py makes the graph, folders.py gives each step its folder, run.py runs what is missing
(step.py is one step), table.py collects the figures, comparison.py compares them, pages.py reports.
May import recipes, thinking and evaluation for costs and provenance, jobs, config and the single modules: what a study
runs it knows by files alone. commands.py, results.py and report.py also serve the examples.
"""
