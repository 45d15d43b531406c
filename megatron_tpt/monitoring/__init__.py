"""What runs and jobs are doing, read from their folders by whoever wants to know: nothing is asked of the processes.

status.py finds runs and jobs in folders, run_status.py and job_status.py read one, page.py shows them on a terminal.
report.py writes a page for browsers about runs: run_files.py reads one, charts.py draws.
May import training (its modules without torch), indexing, jobs, config and the single modules; only the tools import
it.
"""
