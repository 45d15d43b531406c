"""What tools/*.py and the console scripts `tpt-*` run; the docstring of each says how it is called.

A tool parses its options, a dataclass of the package that does the work, and calls that package; nothing else is done
here, and the work is imported after the options are parsed, so that `--help` is quick.
May import everything; nothing imports a tool.
"""

import megatron_tpt.interrupts  # noqa: F401
