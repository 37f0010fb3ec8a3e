"""A process that has imported everything and run nothing, from which each run of a comparison is forked.

Every run needs a process of its own: its peak memory must be its own, a crash or the kernel's out-of-memory killer
must take only that run, and nothing that an earlier one left (caches, allocator, random state) may reach it.
Importing torch and transformers takes several seconds, which twenty-one runs would pay twenty-one times. So they are
imported once, here, and every run is a fork of this process.

Forking a process that has used OpenMP or CUDA hangs or crashes the child. That is why this process is a fresh
interpreter rather than the user's (a notebook has trained something, most likely), and why it does nothing with what
it imports: the thread pools of torch and of the tokenizers start in the child at their first use. Measured: four
steps of MiniLM took the same time in a fork and in a fresh process, with memory within one percent
(`evaluation/peak_memory.py`), and training gives the same bytes (`tests/experiments/test_compare.py`).

Where there is no safe fork (macOS, Windows) the process does one job itself and ends; the next job gets a new one.

The protocol is JSON lines: a job on stdin; ``started``, ``event``..., ``done`` or ``error``, ``ended`` on stdout.
When stdin ends, whoever started us is gone: the run at work is asked to save (SIGTERM), and all ends.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

from graftwerk.sanitize import clean
from graftwerk.training.forked_workers import end_with_parent
from graftwerk.training.num_processes import ENVIRONMENT
from graftwerk.training.signals import SIGNALS, StopSignals, held_back

CAN_FORK = sys.platform == "linux"
LOOK_SECONDS = 0.2
PRELOADED = (
    "accelerate",
    "safetensors.torch",
    "scipy.special",
    "torch.utils.tensorboard",
    "transformers.models.bert.modeling_bert",  # what it imports, all models import
    "graftwerk.experiments.jobs",
    "graftwerk.experiments.preflight",
    "graftwerk.evaluation.cost",
    "graftwerk.evaluation.evaluate",
    "graftwerk.evaluation.results_io",
    "graftwerk.models.load",
    "graftwerk.reporting.html",
    "graftwerk.serialization.folder",
    "graftwerk.tasks.registry",
    "graftwerk.training.finalize",
    "graftwerk.training.trainer",
    "graftwerk.training.manifest",
    "graftwerk.training.train",
)


def main() -> int:
    """Serve jobs until stdin ends."""
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print goes to the log
    if CAN_FORK:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _import_everything()
    buffered = b""
    while True:
        line, newline, buffered = buffered.partition(b"\n")
        if not newline:
            more = os.read(0, 1 << 16)
            if not more:
                return 0
            buffered = line + more
            continue
        job = json.loads(line)
        if not CAN_FORK:
            _send(out, {"started": os.getpid()})
            _send(out, {"ended": _work(job, out)})
            return 0
        with held_back():  # what is sent as soon as `started` is said waits for the child's handlers
            child = os.fork()
            if child == 0:
                os._exit(_as_child(job, out))
        _send(out, {"started": child})
        orphaned, status = _watch(child)
        if orphaned:
            return 0
        _send(out, {"ended": os.waitstatus_to_exitcode(status)})


def _import_everything() -> None:
    """Import modules only: no tensor is computed, no thread started."""
    for module in PRELOADED:
        import_module(module)
    transformers = import_module("transformers")
    # Transformers imports its own modules at the first mention of what is in them.
    for name in ("AutoConfig", "AutoModelForSequenceClassification", "AutoTokenizer"):
        getattr(transformers, name)
    with suppress(ImportError, AttributeError):  # a table of a thousand patterns, else built by every run: 0.7 s
        import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("bert")


def _as_child(job: Mapping[str, Any], out: int) -> int:
    end_with_parent(signal.SIGTERM)
    os.environ.setdefault(ENVIRONMENT, "1")  # methods' costs are compared: all of them alike
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    return _work(job, out)


def _work(job: Mapping[str, Any], out: int) -> int:
    """Do one job and say how it went; 0 where it went well."""
    from graftwerk.errors import ErrorReport
    from graftwerk.experiments.jobs import perform

    def send(message: dict[str, Any]) -> None:
        _send(out, message)

    try:
        with StopSignals().installed():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            result = perform(job, send)
        send({"done": result})
        return 0
    except ErrorReport as error:
        send({"error": error.as_dict()})
        return error.exit_code
    except BaseException as error:  # a defect must reach whoever waits, too
        print(clean(traceback.format_exc()), file=sys.stderr)
        text = " ".join(str(error).split())[:500]
        send({"error": {"error": "error", "exit_code": 1, "what": f"{type(error).__name__}: {text}"}})
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _watch(child: int) -> tuple[bool, int]:
    """Wait for the child; when stdin ends before, ask it to save and wait all the same.

    Returns:
        True if stdin has ended, so that nobody waits for us any more; and the child's status.
    """
    orphaned = False
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return orphaned, status
        if not orphaned and select.select([0], [], [], LOOK_SECONDS)[0] and not os.read(0, 1):
            orphaned = True
            os.kill(child, signal.SIGTERM)
        elif orphaned:
            return True, os.waitpid(child, 0)[1]


def _send(out: int, message: dict[str, Any]) -> None:
    """One line; child and parent share the pipe, and never write at once."""
    line = (json.dumps(message, ensure_ascii=False, default=str) + "\n").encode()
    while line:  # a signal may cut the write of a long one short
        line = line[os.write(out, line) :]


if __name__ == "__main__":
    os._exit(main())  # at once: taking an interpreter with torch in it down in order takes a second
