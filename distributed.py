"""Everything that knows there may be several processes, and how a process ends. A first reading can skip this file.

The training step is written once, for one process. Some of its numbers must be those of the whole batch: the statistics of TAS, the
divisor of the loss, the logged means. For these it asks here, so that a step does not depend on how its batch was dealt out to ranks.
There are two engines, both of them torch's:

    DistributedDataParallel   each rank holds the whole model; gradients are averaged in the last backward of an update
    FSDP2 (--shard)           each rank holds 1/world of weights, gradients and Adam states; a layer is gathered when it runs
"""

import contextlib
import errno
import os
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm


def start(device="", minutes=60):
    """Join the other processes, if torchrun started us; returns this process's device: of the kind asked for, or else the GPU if there is one.

    A rank that waits `minutes` for another gives up with an error: long enough for a slow rollout, an end for a dead machine.
    Raises ValueError in one sentence if a process would have no GPU of its own.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device, True):
        raise ValueError(f"--device {device}: torch {torch.__version__} finds no such GPU here, so leave the flag out or take cpu")
    if device == "mps" and "WORLD_SIZE" in os.environ:
        raise ValueError("--device mps runs on one process, for torch cannot exchange gradients between Apple GPUs: start without torchrun")
    cuda = there["cuda"] and device in ("", "cuda")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device(device or "cpu")
    if cuda:
        here, gpus = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), device.index + 1), torch.cuda.device_count()
        if here > gpus:
            raise ValueError(f"{here} processes were started on a machine with {gpus} GPU(s): start with --nproc_per_node={gpus}")
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        store, number, ranks = next(dist.rendezvous("env://"))
        # After a restart the store may still hold the addresses of processes that are gone: a name of its own for each start.
        # Several nodes count restarts each for itself, so there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 has to do it (docs/cluster.md).
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        # gloo moves what lies in CPU memory (counts, rewards), nccl what lies on a GPU (gradients, weights).
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=ranks, timeout=timedelta(minutes=minutes))
    return device


def leave(error=None, status=1):
    """End the process: with status 0, or with a sentence on stderr and another status.

    Python's clean-up is skipped: torch's communication threads can hang or abort in it.
    """
    if error:
        if speaks():
            print(one_line(error), file=sys.stderr, flush=True)
    elif world() > 1:
        dist.barrier()  # no rank goes while another still talks to it
    if sys.stdout:
        sys.stdout.flush()
    os._exit(status if error else 0)


HELD = {}  # folder -> the lock file that this process holds open: the lock lasts as long as the file is open


def lock(folder):
    """Keep other processes out of a run's folder until this one ends, however it ends. Raises ValueError if another was faster.

    Where the system has no such locks (Windows, some network disks), nobody is kept out.
    """
    unlock(folder)
    file = open(Path(folder, ".lock"), "a+")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(0.5)  # it may have the lock since a moment ago, and then it writes its name now
        file.seek(0)
        raise ValueError(f"{folder} is in use by {file.read().strip() or 'another process'}: wait for it, or stop it") from None
    except (ImportError, OSError):
        pass
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    HELD[os.path.abspath(folder)] = file


def unlock(folder):
    """Let others into the folder again. Returns whether this process had locked it."""
    file = HELD.pop(os.path.abspath(folder), None)
    if file:
        file.close()
    return file is not None


def rank():
    """This process's number, 0 .. world() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(objects):
    """The lists of all ranks joined in rank order."""
    if world() == 1:
        return objects
    parts = [None] * world()
    dist.all_gather_object(parts, objects)
    return [item for part in parts for item in part]


def total(value):
    """The sum of a number over all ranks."""
    return sum(gather([value]))


def totals(counts):
    """A Counter of the sums over all ranks, name by name. Counter's own + would leave out sums that are not positive."""
    result = Counter()
    for of_rank in gather([counts]):
        result.update(of_rank)
    return result


def before(number):
    """The sum of a number over the ranks before this one: where this rank's share begins when all are put in a row."""
    return sum(gather([number])[: rank()])


def part_of(number):
    """How many of `number` things this rank takes when they are dealt out evenly."""
    return len(range(rank(), number, world()))


def join(values):
    """(the (n,) values of all ranks in one tensor, the slice of it that is this rank's)."""
    if world() == 1:
        return values, slice(None)
    start = before(len(values))
    everyone = torch.tensor(gather(values.tolist()), dtype=values.dtype, device=values.device)
    return everyone, slice(start, start + len(values))


# ---------------------------------------------------------------------------------------------------------------------
# The engine: what the update calls instead of the policy, so that the gradients of all ranks are added up
# ---------------------------------------------------------------------------------------------------------------------
def engine(policy, shard=False):
    """The policy, made ready for several ranks: itself (one process), wrapped by DDP, or sharded in place by FSDP2.

    One shard unit per decoder layer and vision block: the classes a transformers model itself says must not be split. Under
    bfloat16 the units gather bfloat16 weights for computing; master weights and the averaging of gradients stay float32.
    """
    if not shard:
        # Unused weights: towers with layers that nothing reads (LLaVA), and the whole tower in a batch without images.
        return DistributedDataParallel(policy, forward_sync_buffers=False, find_unused_parameters=True) if world() > 1 else policy
    precision = MixedPrecisionPolicy(param_dtype=policy.compute_dtype, reduce_dtype=torch.float32)
    for module in [m for m in policy.modules() if type(m).__name__ in (policy.model._no_split_modules or [])]:
        fully_shard(module, mp_policy=precision)
    fully_shard(policy, mp_policy=precision)
    policy.cache_in_updates = False  # a layer is gathered for its backward when a gradient reaches its output, not its cache
    policy._get_fsdp_state()._lazy_init()  # else the first unit that runs (in a rollout) would take itself for the root
    return policy


def bare(engine):
    """The policy inside the engine, which DDP keeps in its attribute `module`."""
    return getattr(engine, "module", engine)


def passes(engine, rollout, groups, tokens_per_batch, progress="update"):
    """The micro-batches of one update on some groups of a rollout, in turn: yields (prompts, rows, factor). progress: text for a bar, or None.

    All ranks get equally many, because a backward pass waits for the gradients of the other ranks. A rank that has fewer than another
    runs its first response once more, with factor = 0: its loss is multiplied by 0. Otherwise the factor is 1. DDP exchanges
    gradients in the last pass only. FSDP2 exchanges them in every pass, so that no rank ever holds all of them.
    """
    micro_batches = list(rollout.micro_batches(tokens_per_batch, groups, bare(engine).path()))
    number = max(gather([len(micro_batches)]))
    for i in tqdm(range(number), progress, leave=False, disable=None if progress and rank() == 0 else True):
        members, rows, factor = (*micro_batches[i], 1) if i < len(micro_batches) else ([0], [0], 0)
        apart = isinstance(engine, DistributedDataParallel) and i < number - 1
        with engine.no_sync() if apart else contextlib.nullcontext():
            yield [rollout.prompts[q] for q in members], rows, factor


def norm_so_far(engine, count):
    """(count, norm) of the gradient that has been added up so far in an update. count: what this rank's part of it was made from.

    FSDP2, and DDP in the last pass, have added up the gradients of all ranks, so all their counts belong to the norm. Before its last
    pass DDP has this rank's alone, which is world() times too large because the mean of the ranks will be taken.
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in engine.parameters() if p.grad is not None])
    norm = getattr(norm, "full_tensor", lambda: norm)().item()
    own = isinstance(engine, DistributedDataParallel) and not engine.require_backward_grad_sync
    return (count, norm / world()) if own else (total(count), norm)


def clip_gradients(engine, max_norm):
    """Scale the gradient of all weights, over all shards, down to `max_norm`. Returns its norm before that."""
    norm = torch.nn.utils.clip_grad_norm_(engine.parameters(), max_norm)
    return getattr(norm, "full_tensor", lambda: norm)().item()  # full_tensor: the norm of a sharded gradient


def offload(optimizer, away="cpu"):
    """Keep an optimizer's states `away` but while it takes a step, so that all else has their room on the GPU. Moving changes no number."""

    def move(places):
        for parameter, state in optimizer.state.items():
            for name in state.keys() - {"step"}:  # the two moments; sharded ones (DTensor) move shard by shard
                state[name] = state[name].to(*places(parameter))

    optimizer.register_step_pre_hook(lambda *_: move(lambda parameter: (parameter.device, parameter.dtype)))
    optimizer.register_step_post_hook(lambda *_: move(lambda _: (away,)))
    move(lambda _: (away,))


def finite(policy):
    """Whether all trained weights are finite numbers, on every rank: the largest of a shard is not if any of them is not."""
    shards = [getattr(p, "to_local", lambda p=p: p)().detach() for p in policy.parameters() if p.requires_grad]
    largest = torch.nn.utils.get_total_norm([shard for shard in shards if shard.numel()], torch.inf)
    return total(int(not largest.isfinite())) == 0


@contextlib.contextmanager
def unsharded(policy):
    """Inside, FSDP2's weights are whole, so that ranks may generate and score different numbers of times without waiting."""
    units = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False)
        unit.unshard()
    yield
    for unit in units:
        unit.set_reshard_after_forward(True)
        unit.reshard()


# ---------------------------------------------------------------------------------------------------------------------
# How train.py and eval.py end: with status 0, or with one sentence on stderr that says why
# ---------------------------------------------------------------------------------------------------------------------
LONGEST = 2000  # characters of a sentence on stderr: a message may quote what it found, and that may be megabytes


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end. Its argument is the signal's number."""


def stop(number, frame):
    """A signal handler: end from wherever the process is, through all `finally` clauses."""
    raise Stopped(number)


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
    for number in range(3):  # a stream that is closed gets a number that the next file would have: prints would end up in it
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
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
