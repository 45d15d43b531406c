"""Show which parts are installed and active here, and what each missing part costs.

python tools/check_env.py [--gpus]
"""

from megatron_tpt.config.cli import parse, program
from megatron_tpt.environment import CheckOptions, check_environment


def main() -> None:
    check_environment(parse(CheckOptions, description=__doc__))


command = program(main)

if __name__ == "__main__":
    command()
