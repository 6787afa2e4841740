"""Plumbing of a run that the methods share: device, processes, checkpoints, metrics, stopping. No trainer lives
here: the training loop stands, visible, in each method."""

import argparse
import contextlib
import datetime
import io
import json
import math
import os
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

# torchrun starts a script as processes of RANK 0 .. WORLD - 1, of which rank 0 alone prints and writes files
RANK, WORLD = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")) if dist.is_torchelastic_launched() else (0, 1)


class UserError(Exception):
    """What the user can mend: one sentence saying what is wrong, where, and what to do."""


def run_main(main, *mendable):
    """Run a script: UserError, OSError and the `mendable` exceptions end it with a sentence and exit code 2."""
    try:
        with contextlib.redirect_stdout(sys.stdout if RANK == 0 else open(os.devnull, "w")):
            sys.exit(main())
    except (UserError, OSError, *mendable) as error:
        for bar in list(tqdm._instances):        # or the sentence would stand behind the progress line
            bar.close()
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        sys.exit(2)


def first_line(error):
    """What an exception says, in a line; its name if it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


class Machine:
    """Where a run computes: device, dtype of matrix products, and which `rank` of `world` processes this is.

    Every rank knows the whole batch of an update, reads its share of the rows and adds its gradients to those of
    the others, so that weights stay alike. What ranks must agree on goes through `sum`, where each waits for all.
    """

    def __init__(self, device="auto", dtype="auto", width=768):
        self.rank, self.world = RANK, WORLD
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            self.device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and self.world > 1 else device)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {device} cannot be used here ({first_line(error)}); try --device cpu.") from None
        if self.world > 1 and not dist.is_initialized():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            # numbers go by gloo, also beside nccl: to agree on them no GPU is waited for
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
                                    timeout=datetime.timedelta(minutes=20))
        if dtype == "auto":
            dtype = {"cuda": "bfloat16", "cpu": faster_cpu_dtype(width)}.get(self.device.type, "float32")
            dtype = "bfloat16" if any(self.sum(self.rank == 0 and dtype == "bfloat16")) else "float32"      # rank 0's
        self.dtype = getattr(torch, dtype)

    def share(self, rows, parts=1):
        """This rank's share of a batch's rows, in `parts` parts; those without a row are left out."""
        cuts = [len(rows) * (self.rank * parts + i) // (self.world * parts) for i in range(parts + 1)]
        return [rows[a:b] for a, b in zip(cuts, cuts[1:]) if a < b]

    def sum_(self, tensor):
        """A tensor summed over all ranks, in place."""
        try:
            if self.world > 1:
                dist.all_reduce(tensor)
        except RuntimeError as error:
            raise UserError(f"rank {self.rank} has lost another, whose message says why ({first_line(error)}).") from None
        return tensor

    def sum(self, *numbers):
        """The list of these numbers, each summed over all ranks."""
        return self.sum_(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def sum_gradients(self, parameters, loss):
        """Sum all ranks' gradients, and their losses (any shape), which are returned.

        Not DistributedDataParallel, which takes a mean over ranks and wants one forward of a module per backward.
        Here a loss is already a part of the whole batch's, a share may have no row at all, and the model is
        called once per thought. What is lost: sending gradients while backward still runs.
        """
        if self.world > 1:                       # a gradient that no rank has stays None, as it would with one rank
            parameters = list(parameters)
            used = [p for p, n in zip(parameters, self.sum(*(p.grad is not None for p in parameters))) if n]
            own = [loss.clone(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in used)]
            flat = self.sum_(torch.cat([t.flatten() for t in own]))
            for tensor, total in zip(own, flat.split([t.numel() for t in own])):
                tensor.copy_(total.view_as(tensor))
            for p, tensor in zip(used, own[1:]):
                p.grad = tensor
            loss = own[0]
        return loss

    @contextlib.contextmanager
    def rank_0_first(self):
        """What rank 0 makes in here (data, caches, a checkpoint), the others find made."""
        if self.rank > 0:
            self.sum(0)
        yield
        if self.rank == 0:
            self.sum(0)

    def seed(self, *key):
        """Seed dropout by the key and the rank alone, so that resuming need not know its state."""
        torch.manual_seed(int(generator(*key, self.rank).integers(2 ** 62)))

    def autocast(self):
        """Matrix products in self.dtype; weights, norms and the loss stay float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def __str__(self):
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else f"{torch.get_num_threads()} threads"
        processes = f"{self.world} processes on " if self.world > 1 else ""
        return f"{processes}{self.device.type} ({name}), {str(self.dtype).removeprefix('torch.')}"


def matmul_flops(device, dtype, width, repeats=3):
    """FLOP/s that a (1024, width) x (width, 4 width) product reaches here: the ceiling for MFU."""
    a = torch.randn(1024, width, device=device, dtype=dtype)
    b = torch.randn(width, 4 * width, device=device, dtype=dtype)
    best = math.inf
    for _ in range(repeats + 1):
        start = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * a.size(0) * b.numel() / best


def faster_cpu_dtype(width):
    """bfloat16 where the processor multiplies it faster (AMX), else float32; measured, as it varies."""
    speed = {name: matmul_flops("cpu", getattr(torch, name), width) for name in ("float32", "bfloat16")}
    return "bfloat16" if speed["bfloat16"] > 1.5 * speed["float32"] else "float32"


def learning_rate(update, total, peak, warmup=0, decay=0.0):
    """Rate at `update` of 0..total-1: linear warm-up, constant, linear to 0 over the last `decay` (0..1)."""
    rate = peak * min(1.0, (update + 1) / max(1, warmup))
    left = (total - update) / max(1, total)
    return rate * min(1.0, left / decay) if decay else rate


def save_checkpoint(path, state):
    """Write a checkpoint that is whole or absent: temporary file, fsync, rename.

    Raises UserError if it cannot be written (disk full, say); a checkpoint already at `path` stays.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:       # torch.save turns a short write into RuntimeError
        with contextlib.suppress(OSError):
            os.remove(temporary)
        kept = "the checkpoint written before is whole; " if os.path.exists(path) else ""
        raise UserError(f"{path}: cannot be written ({first_line(error)}); "
                        f"{kept}free some space and continue with --resume.") from None


def load_checkpoint(path):
    """Read a checkpoint of ours; tensors and plain values only (weights_only), no code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train one first, or check the path.") from None
    except Exception as error:
        raise UserError(f"{path}: not a checkpoint of this project ({first_line(error)}).") from None
    if not isinstance(state, dict) or not {"config", "model", "tokenizer", "flags"} <= state.keys():
        raise UserError(f"{path}: not a checkpoint of this project (no config, model, tokenizer or flags).")
    return state


def open_run(flags, typed, defaults, free):
    """How a run begins: (flags, None) in a fresh folder, or with --resume the flags and the checkpoint
    of the run in it. `free`: flags that may differ from that run's. Raises UserError if --out holds a
    run already, has none to resume, or one with other flags than those typed."""
    last = os.path.join(flags.out, "last.pt")
    if "resume" not in typed:
        if os.path.exists(os.path.join(flags.out, "metrics.jsonl")) and "overwrite" not in typed:
            raise UserError(f"{flags.out} holds a run already; --resume continues it, --overwrite starts again, "
                            "--out names another folder.")
        return flags, None
    if os.path.isdir(flags.out) and not os.path.exists(last):
        raise UserError(f"{flags.out} has no last.pt: the run ended before its first checkpoint; start again with --overwrite.")
    state = load_checkpoint(last)
    for name in typed.keys() - set(free):
        if state["flags"].get(name) != typed[name]:
            raise UserError(f"--{name.replace('_', '-')} {typed[name]} differs from the run in {flags.out} "
                            f"({state['flags'].get(name)}); leave it out, or choose another --out.")
    kept = {k: typed[k] for k in ("device", "compile", "accumulate") if k in typed}
    return argparse.Namespace(**defaults | state["flags"] | kept | dict(out=flags.out)), state


class Metrics:
    """metrics.jsonl: one JSON object a line, appended and flushed. keep_bytes: keep that much of an existing
    file (what stood there at the checkpoint)."""

    def __init__(self, path, keep_bytes=0):
        self.f = open(path, "ab") if RANK == 0 else io.BytesIO()
        self.f.truncate(min(keep_bytes, self.f.tell()))
        self.f.seek(0, os.SEEK_END)

    def write(self, **values):
        self.f.write((json.dumps(values) + "\n").encode())
        self.f.flush()

    def size(self):
        return self.f.tell()


def progress_bar(total, done=0):
    """tqdm over updates; in a log file a line now and then."""
    return tqdm(total=total, initial=done, unit="upd", mininterval=0.2 if sys.stderr.isatty() else 30, ncols=100,
                disable=RANK > 0)


class Progress:
    """The progress line, and the mean training loss in metrics.jsonl every `every` updates.

    at: the run's position, a dict that the checkpoint carries; `loss`, `logged` and `seconds` in it are ours.
    bar: the progress bar of a larger whole (--table).
    """

    def __init__(self, total, at, metrics, every=50, bar=None):
        self.at, self.metrics, self.every, self.alone = at, metrics, every, bar is None
        self.positions, self.flops, self.start, self.before = 0, 0, time.perf_counter(), at["seconds"]
        self.bar = progress_bar(total, at["done"]) if self.alone else bar

    def step(self, loss, positions, flops, end, **where):
        """One update is done: its loss (a tensor: no synchronisation here), its positions; where: stage=1, say."""
        at = self.at
        at["loss"], at["logged"] = at["loss"] + loss.detach(), at["logged"] + 1
        self.positions, self.flops = self.positions + positions, self.flops + flops
        self.bar.update()
        if at["done"] % self.every == 0 or end:
            mean, rate = float(at["loss"]) / at["logged"], self.positions / (self.seconds() - self.before)
            at["loss"], at["logged"] = 0.0, 0
            self.metrics.write(event="train", **where, update=at["done"], loss=mean)
            stage = "".join(f"{name} {value}, " for name, value in where.items())
            self.bar.set_postfix_str(f"{stage}loss {mean:.3f}, {rate:,.0f} tok/s", refresh=False)

    def seconds(self):
        """Of the whole run, resumed or not."""
        return self.before + time.perf_counter() - self.start

    def position(self):
        """`at` as it is now, for a checkpoint."""
        self.at["loss"], self.at["seconds"] = float(self.at["loss"]), self.seconds()
        return self.at

    def close(self, machine, width):
        """The run is over: its time, and its speed beside that of a matrix product of the model's width."""
        if not self.alone:
            return
        self.bar.close()
        if self.flops:
            speed = self.flops / (self.seconds() - self.before) / machine.world
            ceiling = matmul_flops(machine.device, machine.dtype, width)
            print(f"{self.at['seconds']:.0f} s; {speed / 1e9:,.0f} GFLOP/s, evaluation included: MFU {100 * speed / ceiling:.0f} % "
                  f"of the {ceiling / 1e9:,.0f} GFLOP/s that a matrix product of this width reaches here")


class Stop:
    """Ctrl-C and SIGTERM ask the loop to save and end; a second Ctrl-C ends at once."""

    def __init__(self):
        self.asked = False
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self._ask)

    def _ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def generator(*key):
    """numpy generator that depends on the given integers alone."""
    return np.random.default_rng(list(key))
