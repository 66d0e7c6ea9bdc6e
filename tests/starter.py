"""Starts scripts in processes that have the slow imports behind them.

Importing torch, SpeechBrain and transformers takes longer than all that a
test does with them. So one process imports them, and a copy of it (a fork)
runs each script, as ``python SCRIPT ARGUMENTS`` would.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment(**changes: str) -> dict[str, str]:
    """Variables of a process that finds the project and uses one core.

    Arguments
    ---------
    **changes
        More variables.

    Returns
    -------
    dict
    """
    path = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    return {
        **os.environ,
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **changes,
    }


@dataclass(frozen=True)
class Finished:
    """What a process left behind.

    Arguments
    ---------
    code : int
        Its exit status; the signal's number below zero if one ended it.
    out, err : str
        What it wrote.
    """

    code: int
    out: str
    err: str


class Process:
    """A script that runs.

    Arguments
    ---------
    starter : Starter
        Who started it.
    pid : int
        Its number.
    logs : tuple of Path
        Its two streams.
    """

    def __init__(self, starter: "Starter", pid: int, logs: tuple):
        self.starter = starter
        self.pid = pid
        self.logs = logs

    def wait(self) -> Finished:
        """Waits for its end."""
        code = self.starter.ask({"wait": self.pid})
        out, err = (
            log.read_text(encoding="utf-8", errors="replace")
            for log in self.logs
        )
        return Finished(code, out, err)


class Starter:
    """The process with the imports.

    Arguments
    ---------
    folder : Path
        For the streams of the processes.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.number = 0
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            text=True,
        )

    def ask(self, question: dict) -> int:
        """One question, one answer."""
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("the process that starts others has ended")
        return json.loads(answer)

    def start(self, *argv: object, cwd: Path, **variables: str) -> Process:
        """Starts a script.

        Arguments
        ---------
        *argv
            The script and its arguments.
        cwd : Path
            Where it runs.
        **variables
            Of its environment.

        Returns
        -------
        Process
        """
        self.number += 1
        logs = tuple(
            self.folder / f"{self.number}.{stream}" for stream in ("out", "err")
        )
        question = {
            "argv": [str(part) for part in argv],
            "cwd": str(cwd),
            "variables": variables,
            "logs": [str(log) for log in logs],
        }
        return Process(self, self.ask(question), logs)

    def run(self, *argv: object, cwd: Path, **variables: str) -> Finished:
        """Starts a script and waits for its end."""
        return self.start(*argv, cwd=cwd, **variables).wait()

    def close(self) -> None:
        """Ends the process with the imports."""
        self.process.stdin.close()
        self.process.wait()


def _run(question: dict) -> None:
    """In the copy: becomes the script, and never returns."""
    code = 1
    try:
        for number, log in enumerate(question["logs"], start=1):
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(question["cwd"])
        os.environ.update(question["variables"])
        sys.argv = question["argv"]
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
        # As a new process would; the rest of it is there already.
        path = question["variables"].get("PYTHONPATH")
        sys.path[1:1] = path.split(os.pathsep) if path else []
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        # SpeechBrain replaces it: the user sees what it writes.
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Answers questions until there are no more."""
    # What every script here imports; the package itself is left to them.
    import matplotlib.pyplot  # noqa: F401
    import speechbrain.integrations.huggingface.wav2vec2
    import speechbrain.lobes.models.VanillaNN  # noqa: F401
    from transformers import Wav2Vec2Model  # noqa: F401

    # What a shell starts in the background ignores it, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            _, status = os.waitpid(question["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                _run(question)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
