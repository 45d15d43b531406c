"""`python -m megatron_tpt.jobs`: one task under supervision, see `megatron_tpt.jobs.task`."""

import sys

from megatron_tpt.jobs.task import main

if __name__ == "__main__":
    sys.exit(main())
