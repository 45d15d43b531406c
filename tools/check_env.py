"""`tpt-check-env` from a checkout: see megatron_tpt/tools/check_env.py."""

import sys

try:
    from megatron_tpt.tools.check_env import command
except ModuleNotFoundError as error:
    print(f"error: {error.name} is not installed; run `make setup` and use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    command()
