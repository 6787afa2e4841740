"""Plumbing of a run: device, processes, checkpoint files, metrics, progress, stopping.

No trainer lives here: the training loop is visible in each method. What the loop needs besides
mathematics is one object, `Run`.
"""

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

# torchrun starts a script as processes of RANK 0 .. WORLD - 1; only rank 0 prints and writes files
RANK, WORLD = 0, 1
if dist.is_torchelastic_launched():
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


# ---------------------------------------------------------------- errors and the command line


class UserError(Exception):
    """Something the user can fix: one sentence on what is wrong, where, and what to do."""


def run_main(main):
    """Run a script. UserError and OSError end it with one sentence and exit code 2."""
    try:
        with contextlib.redirect_stdout(sys.stdout if RANK == 0 else open(os.devnull, "w")):
            sys.exit(main())
    except (UserError, OSError) as error:
        for bar in list(tqdm._instances):        # or the sentence would follow the progress line
            bar.close()
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        sys.exit(2)


def first_line(error):
    """The first line of an exception's message, or its name if it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def count(least):
    """argparse type: a whole number of at least `least`."""
    def number(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least {least}")
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

    def __init__(self, device="auto", dtype="auto", width=768):
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
                self.device.type == "cpu" and faster_cpu_dtype(width) == "bfloat16"))
            of_rank_0 = self.sum(self.rank == 0 and fast)
            dtype = "bfloat16" if any(of_rank_0) else "float32"
        self.dtype_name, self.dtype = dtype, getattr(torch, dtype)

    def share(self, rows, parts=1):
        """This rank's share of a batch's rows, in `parts` parts; empty parts are left out."""
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


def matmul_flops(device, dtype, width, repeats=3):
    """FLOP/s of a (1024, width) x (width, 4 width) product here: the ceiling for MFU."""
    a = torch.ones(1024, width, device=device, dtype=dtype)     # not random: seeds stay
    b = torch.ones(width, 4 * width, device=device, dtype=dtype)
    best = math.inf
    for _ in range(repeats + 1):
        start = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * a.size(0) * b.numel() / best


def faster_cpu_dtype(width):
    """bfloat16 where the processor multiplies it faster (AMX), else float32; it is measured."""
    bfloat16 = matmul_flops("cpu", torch.bfloat16, width)
    return "bfloat16" if bfloat16 > 1.5 * matmul_flops("cpu", torch.float32, width) else "float32"


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
        raise UserError(f"{path}: cannot be written ({first_line(error)}); "
                        f"{kept}free some space and continue with --resume.") from None


RENAMED = {"pause-multipass": "pause-as-thought"}    # a method of old checkpoints; it was the same


def load_checkpoint(path):
    """Read a checkpoint of this project; only tensors and plain values (weights_only), no code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train one first, "
                        "or check the path.") from None
    except Exception as error:       # whatever the unpickler meets in another kind of file
        raise UserError(f"{path}: not a checkpoint of this project "
                        f"({first_line(error)}).") from None
    if not isinstance(state, dict) or not {"config", "model", "tokenizer", "flags"} <= state.keys():
        raise UserError(f"{path}: not a checkpoint of this project "
                        "(no config, model, tokenizer or flags).")
    method = state["flags"].get("method")
    if method in RENAMED:
        state["flags"]["method"] = RENAMED[method]
    return state


# ---------------------------------------------------------------- what a training loop calls


class Run:
    """A training run next to its mathematics: where it is, its files, progress line and stopping.

    out: folder. header: what every checkpoint of the run holds (config, tokenizer, flags). modules:
    {name: module}, saved too, among them the model. at: a dict, where the run is, with the updates
    `done`; that of `resumed`, a checkpoint, if the run goes on. total: updates in all. bar: the
    progress bar of a larger whole (--table). every: updates between training losses in
    metrics.jsonl.
    """

    def __init__(self, out, header, modules, at, total, machine, resumed=None, bar=None, every=50):
        os.makedirs(out, exist_ok=True)
        self.out, self.header, self.modules = out, header, modules
        self.machine, self.resumed, self.every, self.stop = machine, resumed, every, Stop()
        self.at = dict(loss=0.0, logged=0, seconds=0.0) | (resumed["at"] if resumed else at)
        keep = resumed["metrics_bytes"] if resumed else 0
        self.metrics = Metrics(os.path.join(out, "metrics.jsonl"), keep)
        self.bar = progress_bar(total, self.at["done"]) if bar is None else bar
        self.say, self.own_bar = self.bar.write, bar is None
        self.positions = self.flops = 0
        self.start, self.before = time.perf_counter(), self.at["seconds"]

    def resume(self, optimizers):
        """The optimizers, with the state they had at the checkpoint if the run is resumed."""
        for optimizer, state in zip(optimizers, self.resumed["optimizers"] if self.resumed else ()):
            try:
                optimizer.load_state_dict(state)
            except ValueError as error:
                raise UserError(f"{self.out}/last.pt: its optimizers are not those of this version "
                                f"({first_line(error)}); start again with --overwrite.") from None
        return optimizers

    def step(self, loss, sequences, end, **where):
        """One update is done: its loss (a tensor, not synchronised here) and the Sequences read.
        end: the last update of its part. where: stage=1, say."""
        at = self.at
        at["done"] += 1
        at["loss"] = at["loss"] + loss.detach()
        at["logged"] += 1
        positions = sum(len(q.prompt) + q.n_latent + len(q.language) for q in sequences)
        self.positions += positions
        self.flops += positions * self.modules["model"].flops_per_token(positions / len(sequences))
        self.bar.update()
        if at["done"] % self.every == 0 or end:
            mean = float(at["loss"]) / at["logged"]
            at["loss"], at["logged"] = 0.0, 0
            self.log("train", **where, update=at["done"], loss=mean)
            place = "".join(f"{name} {value}, " for name, value in where.items())
            rate = self.positions / (self.seconds() - self.before)
            self.bar.set_postfix_str(f"{place}loss {mean:.3f}, {rate:,.0f} tok/s", refresh=False)

    def log(self, event, **values):
        """A line of metrics.jsonl."""
        self.metrics.write(event=event, **values)

    def valid(self, v, losses={}, **where):
        """Log and say a validation: v, what evaluate returned; where: stage=1, say."""
        done = self.at["done"]
        self.log("valid", **where, update=done, accuracy=v["accuracy"], n=v["n"], **losses)
        place = "".join(f"{name} {value}  " for name, value in where.items())
        parts = "".join(f"  {name} {value:.3f}" for name, value in losses.items())
        self.say(f"update {done:>5}  {place}validation {100 * v['accuracy']:5.1f} %{parts}")

    def is_best(self, v):
        """Is this validation the best so far? Remembered in at["best"]."""
        better = v["accuracy"] > self.at["best"]
        self.at["best"] = max(self.at["best"], v["accuracy"])
        return better

    def save(self, name, optimizers, **states):
        """Write the checkpoint `name`: all modules and optimizers. states: instead of a module's
        own."""
        self.at["loss"], self.at["seconds"] = float(self.at["loss"]), self.seconds()
        own = {key: module.state_dict() for key, module in self.modules.items()}
        state = self.header | own | states | dict(
            optimizers=[optimizer.state_dict() for optimizer in optimizers],
            at=self.at, metrics_bytes=self.metrics.size())
        with self.machine.rank_0_first():
            if self.machine.rank == 0:
                save_checkpoint(os.path.join(self.out, name), state)

    def pause(self, optimizers, every, end):
        """Save last.pt at every so many updates, and when a rank has been asked to stop. Returns
        whether one has. end: the last update of its part, after which the loop saves."""
        stopping = any(self.machine.sum(self.stop.asked))    # all ranks ask after the same update
        if stopping or (self.at["done"] % every == 0 and not end):
            self.save("last.pt", optimizers)
        return stopping

    def seconds(self):
        """Seconds of the whole run, resumed or not."""
        return self.before + time.perf_counter() - self.start

    def close(self):
        """The run is over: print its time, and its speed next to that of a matrix product."""
        if not self.own_bar:
            return
        self.bar.close()
        if self.flops:
            width = self.modules["model"].config.n_embd
            speed = self.flops / (self.seconds() - self.before) / self.machine.world
            ceiling = matmul_flops(self.machine.device, self.machine.dtype, width)
            print(f"{self.at['seconds']:.0f} s; {speed / 1e9:,.0f} GFLOP/s, evaluation included: "
                  f"MFU {100 * speed / ceiling:.0f} % of the {ceiling / 1e9:,.0f} GFLOP/s that a "
                  "matrix product of this width reaches here")


class Metrics:
    """metrics.jsonl: one JSON object a line, appended and flushed. keep_bytes: how much of an
    existing file stays (what it had at the checkpoint)."""

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
    return tqdm(total=total, initial=done, unit="upd", ncols=100, disable=RANK > 0,
                mininterval=0.2 if sys.stderr.isatty() else 30)


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
