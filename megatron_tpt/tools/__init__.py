"""What tools/*.py and the console scripts `tpt-*` run; the docstring of each says how it is called."""

import megatron_tpt.interrupts  # noqa: F401
