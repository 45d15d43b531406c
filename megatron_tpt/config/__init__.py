"""Settings: the dataclasses of recipes, and one way from YAML files and command lines to them and to tools' options.

Sections of a recipe (model.py, training.py, ...), the loader (load.py), option parsing (cli.py), bounds in the
declaration (fields.py), what a run may change when it resumes (on_change.py, changes.py), and their documentation.
May import the single modules (errors, names, ...); no torch. The families of models are looked up by name in
models/ when a recipe names one (config/model.py).
"""
