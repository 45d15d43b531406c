"""`tpt-build-cache` from a checkout: see megatron_tpt/tools/build_cache.py."""

from megatron_tpt.tools.build_cache import command

if __name__ == "__main__":
    command()
