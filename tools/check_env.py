"""Show which parts are installed and active here, and what each missing part costs.

python tools/check_env.py [--gpus]
"""

import sys

try:
    from megatron_tpt.config.cli import parse, run
    from megatron_tpt.environment import CheckOptions, check_environment
except ModuleNotFoundError as error:
    print(f"error: {error.name} is not installed; run `make setup` and use .venv/bin/python", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    check_environment(parse(CheckOptions, description=__doc__))


if __name__ == "__main__":
    run(main)
