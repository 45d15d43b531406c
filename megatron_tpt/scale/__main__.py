"""`python -m megatron_tpt.scale`: one task under supervision, see `megatron_tpt.scale.task`."""

import sys

from megatron_tpt.scale.task import main

if __name__ == "__main__":
    sys.exit(main())
