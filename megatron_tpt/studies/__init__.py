"""Studies: the arms of an experiment side by side, over several seeds, as a table and a picture.

A study runs commands (study.py, commands.py), reads the points that they write (results.py) and reports means with
intervals (report.py).
May import jobs, config and the single modules: what it runs it knows by files alone.
"""
