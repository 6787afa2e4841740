"""Errors, the command line, device and processes, checkpoint files."""

import argparse
import contextlib
import datetime
import io
import math
import os
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

# torchrun starts a script as processes of RANK 0 .. WORLD - 1; only rank 0 prints and writes files
RANK, WORLD = 0, 1
if dist.is_torchelastic_launched():
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


# ---------------------------------------------------------------- errors and the command line


class UserError(Exception):
    """Something the user can fix: one sentence on what is wrong, where, and what to do."""


def run_main(main):
    """Run a script. UserError, OSError and too little memory end it with one sentence and exit
    code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):         # a character that cannot be printed here
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with contextlib.redirect_stdout(sys.stdout if RANK == 0 else open(os.devnull, "w")):
            sys.exit(main())
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not of_memory(error):
            raise
        for bar in list(tqdm._instances):        # or the sentence would follow the progress line
            bar.close()
        if isinstance(error, (MemoryError, RuntimeError)):
            error = (f"not enough memory ({first_line(error)}); make the model or --batch-size "
                     "smaller, or raise --accumulate.")
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        sys.exit(2)


def of_memory(error):
    """Is this RuntimeError what torch raises for too little memory, on a CPU or a GPU?"""
    return any(words in str(error) for words in ("allocate memory", "out of memory"))


def first_line(error):
    """The first line of an exception's message, or its name if it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def count(least, most=10 ** 9):
    """argparse type: a whole number from `least` to `most`."""
    def number(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        if int(text) > most:
            raise argparse.ArgumentTypeError(f"{text} is larger than {most:,}")
        return int(text)
    return number


def real(low=0.0, high=1e9):
    """argparse type: a number from `low` to `high`."""
    def number(text):
        if not low <= float(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return float(text)
    return number


def generator(*key):
    """numpy generator that depends only on the given integers."""
    return np.random.default_rng(list(key))


# ---------------------------------------------------------------- device and processes

SMALL = 512      # width below which --dtype auto is float32: bfloat16 costs small models accuracy


class Machine:
    """Where a run computes: device, dtype of matrix products, `rank` of `world` processes.

    Every rank knows the whole batch of an update, reads its share of the rows and adds its
    gradients to those of the others, so the weights stay equal. What ranks must agree on goes
    through `sum`, where each waits for all.
    """

    def __init__(self, device="auto", dtype="auto", width=768, rows=1024):
        """width, rows: of what is multiplied with the weights, which decides what auto means."""
        self.rank, self.world = RANK, WORLD
        if device == "auto":
            device = "cpu"
            if torch.cuda.is_available():
                device = "cuda"
            elif torch.backends.mps.is_available():
                device = "mps"
        name = device
        if device == "cuda" and self.world > 1:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        try:
            self.device = torch.device(name)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {device} cannot be used here ({first_line(error)}); "
                            "try --device cpu.") from None
        if self.world > 1 and not dist.is_initialized():
            backend = "gloo"
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
                backend = "cpu:gloo,cuda:nccl"   # counts go by gloo: they need not wait for a GPU
            dist.init_process_group(backend, timeout=datetime.timedelta(minutes=20))
        if dtype == "auto":
            fast = width >= SMALL and (self.device.type == "cuda" or (
                self.device.type == "cpu" and faster_cpu_dtype(width, rows) == "bfloat16"))
            of_rank_0 = self.sum(self.rank == 0 and fast)
            dtype = "bfloat16" if any(of_rank_0) else "float32"
        self.dtype_name, self.dtype = dtype, getattr(torch, dtype)

    def share(self, rows, parts=1):
        """This rank's share of a batch's rows, in `parts` parts; empty parts are left out."""
        parts = max(1, min(parts, len(rows)))
        n = self.world * parts
        cuts = [len(rows) * (self.rank * parts + i) // n for i in range(parts + 1)]
        return [rows[a:b] for a, b in zip(cuts, cuts[1:]) if a < b]

    def sum_(self, tensor):
        """A tensor summed over all ranks, in place."""
        try:
            if self.world > 1:
                dist.all_reduce(tensor)
        except RuntimeError as error:
            raise UserError(f"rank {self.rank} has lost another, whose message says why "
                            f"({first_line(error)}).") from None
        return tensor

    def sum(self, *numbers):
        """The list of these numbers, each summed over all ranks."""
        return self.sum_(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def sum_gradients(self, parameters, loss):
        """Sum the gradients of all ranks, and their losses (any shape), which are returned.

        Not DistributedDataParallel, which takes a mean over ranks and needs one forward of a
        module per backward. Here a loss is already a part of the whole batch's, a share may have
        no row at all, and the model is called once per thought. The price: gradients are not sent
        while backward still runs.
        """
        if self.world == 1:
            return loss
        parameters = list(parameters)
        has_gradient = self.sum(*(p.grad is not None for p in parameters))
        used = [p for p, n in zip(parameters, has_gradient) if n]    # none on any rank: stays None
        own = [loss.clone()]
        own += [torch.zeros_like(p) if p.grad is None else p.grad for p in used]
        flat = self.sum_(torch.cat([t.flatten() for t in own]))
        for tensor, total in zip(own, flat.split([t.numel() for t in own])):
            tensor.copy_(total.view_as(tensor))
        for p, tensor in zip(used, own[1:]):
            p.grad = tensor
        return own[0]

    @contextlib.contextmanager
    def rank_0_first(self):
        """What rank 0 makes in here (data, caches, a checkpoint), the others find made."""
        if self.rank > 0:
            self.sum(0)
        yield
        if self.rank == 0:
            self.sum(0)

    def seed(self, *key):
        """Seed dropout by key and rank only, so that resuming need not know its state."""
        torch.manual_seed(int(generator(*key, self.rank).integers(2 ** 62)))

    def autocast(self):
        """Matrix products in self.dtype; weights, norms and the loss stay float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def __str__(self):
        name = f"{torch.get_num_threads()} threads"
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name()
        processes = f"{self.world} processes on " if self.world > 1 else ""
        return f"{processes}{self.device.type} ({name}), {self.dtype_name}"


def matmul_flops(device, dtype, width, repeats=3, rows=1024):
    """FLOP/s of a (rows, width) x (width, 4 width) product here; of 1024: the ceiling for MFU."""
    a = torch.ones(rows, width, device=device, dtype=dtype)     # not random: seeds stay
    b = torch.ones(width, 4 * width, device=device, dtype=dtype)
    best = math.inf
    for _ in range(repeats + 1):
        start = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * a.size(0) * b.numel() / best


def faster_cpu_dtype(width, rows=1024):
    """bfloat16 where the processor multiplies it faster (AMX), else float32; it is measured. With
    few rows, as in decoding, the weights are read but once, and bfloat16 may gain nothing."""
    repeats = 3 if rows > 64 else 20
    bfloat16, float32 = (matmul_flops("cpu", dtype, width, repeats, rows)
                         for dtype in (torch.bfloat16, torch.float32))
    return "bfloat16" if bfloat16 > 1.5 * float32 else "float32"


# ---------------------------------------------------------------- checkpoint files


def save_checkpoint(path, state):
    """Write a checkpoint that is whole or absent: temporary file, fsync, rename.

    Raises UserError if it cannot be written (disk full, say); an older one at `path` stays.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:     # torch.save turns a short write into RuntimeError
        with contextlib.suppress(OSError):
            os.remove(temporary)
        kept = "the checkpoint written before is whole; " if os.path.exists(path) else ""
        again = "start again with --overwrite"
        if os.path.exists(os.path.join(os.path.dirname(path), "last.pt")):
            again = "continue with --resume"
        raise UserError(f"{path}: cannot be written ({first_line(error)}); "
                        f"{kept}free some space and {again}.") from None


def not_finite(module):
    """The name of the first parameter with a value that is not finite, or None."""
    for name, p in module.named_parameters():
        if not p.isfinite().all():
            return name
