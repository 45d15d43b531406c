"""The runtime of offline jobs, the same for all of them. It may import config, records and the single modules.

A job is its settings: the same command again does what is missing, and other settings are refused with the difference
(settings.py). Who works on what is told by locks (lock.py), what is finished by whole files and journals (journal.py),
how far it is by a line on the terminal and a file for each task (progress.py, folder.py). One command runs as many
tasks: processes of this machine, a SLURM job array or Ray (run.py); work within one process is spread by workers.py and
ordered_workers.py. A job that is written with it: tests/jobs/word_counts.py.
"""
