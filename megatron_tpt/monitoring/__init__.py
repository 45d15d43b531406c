"""What runs and jobs are doing, read from their folders by whoever wants to know: nothing is asked of the processes.

status.py finds runs and jobs in folders, run_status.py and job_status.py read one, page.py shows them on a terminal.
May import training (its modules without torch), jobs, config and the single modules; only the tools import it.
"""
