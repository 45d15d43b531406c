"""Runs an answer and its tests inside the sandbox: `python -I -S -c <this file>`, with the job as JSON on stdin.

The nonce arrives with the job and is printed when the tests are through; an answer that ends the process earlier
(os._exit(0)) therefore does not pass. It is in no file, argument or environment variable.
"""

import contextlib
import json
import os
import resource
import sys
import types


def main() -> None:
    job = json.loads(sys.stdin.buffer.read())
    result = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # what an answer prints goes nowhere, however much it is
        os.dup2(null, descriptor)
    for name, limit in job["limits"].items():
        hard = resource.getrlimit(getattr(resource, name))[1] % (1 << 63)  # -1 means unlimited
        # A second beyond the limit of processor time, so that SIGXCPU distinguishes it from other ways to be killed.
        beyond = 1 if name == "RLIMIT_CPU" else 0
        resource.setrlimit(getattr(resource, name), (min(limit, hard), min(limit + beyond, hard)))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # short of memory, the kernel ends this process before any other
    module = types.ModuleType("answer")  # not "__main__": demonstrations below `if __name__ == ...` are not run
    sys.modules["answer"] = module
    try:
        if job["tests"].startswith("# program\n"):
            module.__dict__["program"] = job["program"]
        else:
            exec(compile(job["program"], "<answer>", "exec"), module.__dict__)
        exec(compile(job["tests"], "<tests>", "exec"), module.__dict__)
    except BaseException as error:
        os.write(result, f"failed {type(error).__name__}: {str(error)[:300]}".encode(errors="replace"))
        os._exit(1)
    os.write(result, f"passed {job['nonce']}".encode())
    os._exit(0)


main()
