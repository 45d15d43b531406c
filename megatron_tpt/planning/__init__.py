"""Layouts on paper: memory, communication, bubble and step time of a recipe on GPUs that are not there yet.

Pure functions of a recipe and a machine, without torch; docs/planning.md has the formulas, the assumptions and the
errors against published figures.
May import training, models, config and the single modules; only the tools import it.
"""
