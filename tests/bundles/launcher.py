"""Runs `python -m monai.bundle …` commands in forks of one process that has imported everything already.

Each run is a process of its own with its own output, exit code and working directory, and can be killed as such; only
the ten seconds of imports are shared. Jobs come as JSON lines on standard input, answers go to standard output.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import sys
import traceback
import warnings

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import monai.bundle.__main__  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import lorkd_monai.engines
import lorkd_monai.handlers  # noqa: F401


def run(job: dict) -> None:
    """What the interpreter does with `python -m MODULE ARGUMENTS`; does not return."""
    for stream, path in ((1, job["out"]), (2, job["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    sys.argv = ["-m", *job["argv"]]
    code = 1
    try:
        exec(job["before"], {})
        runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    atexit._run_exitfuncs()  # which os._exit leaves out
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    """Run one job after the other."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                run(job)
            except BaseException:
                traceback.print_exc()
            os._exit(99)
        _, status = os.waitpid(pid, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()


if __name__ == "__main__":
    serve()
