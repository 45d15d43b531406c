"""The common runtime of offline jobs. It may import config, records and the single modules.

A job is defined by its settings: running the same command again completes it, and different settings are refused with a
message that names the differences (settings.py). Locks record which process works on which task (lock.py), complete
files and journals record what is finished (journal.py), and a line on the terminal and a file per task show the
progress (progress.py, folder.py). One command runs as many tasks: processes on this machine, a SLURM job array or Ray
(run.py). workers.py and ordered_workers.py distribute the work of one process. Example of a job:
tests/jobs/word_counts.py.
"""
