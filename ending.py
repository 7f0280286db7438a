"""How train.py and eval.py end: with status 0, or with one sentence on stderr that says why.

This file is imported before all others, and itself imports nothing large, so that Ctrl-C is answered with a sentence even while torch
is being loaded. It also sees to it that a reader who leaves (`train.py | head -2`) does not end a run of hours.
"""

import errno
import os
import signal
import sys
import traceback
from pathlib import Path

SCRIPT = Path(sys.argv[0]).name if sys.argv else ""
LONGEST = 2000  # characters of a sentence on stderr: a message may quote what it found, and that may be megabytes


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end. Its argument is the signal's number."""


def stop(number, frame):
    """A signal handler: end from wherever the process is, through all `finally` clauses."""
    raise Stopped(number)


def stop_at_once(number, frame):
    """A signal handler for the time of the imports, which are no place for an exception."""
    if speaks():
        os.write(2, f"{SCRIPT}: stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


for number in range(3):  # a stream that is closed gets a number that the next file would have: prints would end up in it
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)
if SCRIPT in ("train.py", "eval.py"):
    signal.signal(signal.SIGINT, stop_at_once)


def speaks():
    """Whether this process is the one to say why the run ends. Under torchrun it is the first that fails, once on each machine.

    What the others would say is the same, or that they have lost the first. torchrun gives each rank a folder for its error, side
    by side in the folder of this start. Whoever creates the file `told` beside them was first.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    told = Path(file).parents[1] / "told" if file else None
    try:
        if told:
            with open(told, "x") as note:
                note.write(str(os.getpid()))
    except FileExistsError:
        return told.read_text() == str(os.getpid())
    except OSError:
        pass
    return True


class Tolerant:
    """An output stream whose reader may leave, and whose disk may be full. From then on what is written is dropped."""

    def __init__(self, stream):
        self.stream, self.lost = stream, None  # lost: the error that ended it

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def attempt(self, action, *arguments):
        """Do it unless the stream is lost, and remember if it gets lost."""
        try:
            if self.stream is not None and self.lost is None:
                getattr(self.stream, action)(*arguments)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self.lost = error

    def write(self, text):
        """Write text; after the end of a line at once, so that a watcher sees it, and a loss is noticed."""
        self.attempt("write", text)
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self):
        """Hand over what was written."""
        self.attempt("flush")


def one_line(error):
    """An error as one line of bounded length."""
    text = " ".join(str(error).split("\n"))
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def unheard(name):
    """A sentence if what was printed went nowhere, and not because its reader had enough and left."""
    lost = getattr(sys.stdout, "lost", None)
    if isinstance(lost, OSError) and lost.errno != errno.EPIPE:
        return f"{name}: finished, but what it printed is lost ({lost.strerror})"
    return None


def run(main, name, memory_flags):
    """Run a script's main function and end the process: errors that the user can do something about as one sentence."""
    import torch  # not at the top, see there

    from distributed import leave

    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Tolerant, streams)
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        main()
    except Stopped as error:
        leave(f"{name}: stopped by {signal.Signals(error.args[0]).name}", 128 + error.args[0])
    except KeyboardInterrupt:
        leave(f"{name}: stopped by SIGINT", 128 + signal.SIGINT)
    except SystemExit as end:  # of --help
        leave(end.code or unheard(name))
    except torch.OutOfMemoryError as error:
        leave(f"{name}: out of memory: lower {memory_flags} ({str(error).splitlines()[0]})")
    except (ValueError, ImportError, OSError) as error:
        leave(f"{name}: {error}")
    except Exception:  # among them what a rank sees when another has died
        if speaks():
            traceback.print_exc()
        leave(f"{name}: stopped by the error above")
    else:
        leave(unheard(name))
    finally:  # reached in tests only, where `leave` does not end the process
        sys.stdout, sys.stderr = streams
        for number, handler in handlers.items():
            signal.signal(number, handler)
