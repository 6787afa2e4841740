"""What a training loop needs besides mathematics: one object, `Run`.

No trainer lives here: the loop is visible in each method.
"""

import contextlib
import io
import json
import math
import os
import signal
import sys
import time

from tqdm import tqdm

from common import optim
from common.runtime import RANK, UserError, first_line, matmul_flops, not_finite, save_checkpoint


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
        if not resumed and machine.rank == 0:        # of a run that --overwrite ends
            for name in ("last.pt", "best.pt", "start.pt"):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(out, name))
        self.out, self.header, self.modules = out, header, modules
        self.machine, self.resumed, self.every, self.stop = machine, resumed, every, Stop()
        self.at = dict(loss=0.0, logged=0, seconds=0.0, more=0) | (resumed["at"] if resumed else at)
        keep = resumed["metrics_bytes"] if resumed else 0
        self.metrics = Metrics(os.path.join(out, "metrics.jsonl"), keep)
        self.bar = progress_bar(total + self.at["more"], self.at["done"]) if bar is None else bar
        self.say, self.own_bar = self.bar.write, bar is None
        self.positions = self.flops = 0
        self.start, self.before = time.perf_counter(), self.at["seconds"]

    def resume(self, optimizers):
        """The optimizers, with the state they had at the checkpoint if the run is resumed."""
        if not self.resumed:
            return optimizers
        try:
            for optimizer, state in zip(optimizers, self.resumed["optimizers"], strict=True):
                optim.load_state(optimizer, state)
        except Exception as error:               # whatever a damaged one leads to
            raise UserError(f"{self.out}/last.pt: its optimizers are not those of this version "
                            f"({first_line(error)}); start again with --overwrite.") from None
        return optimizers

    def lengthen(self, updates):
        """The run takes so many updates more than was planned."""
        self.at["more"] += updates
        self.bar.total += updates

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
            self.check(mean)
            at["loss"], at["logged"], at["finite"] = 0.0, 0, mean
            self.log("train", **where, update=at["done"], loss=mean)
            place = "".join(f"{name} {value}, " for name, value in where.items())
            rate = self.positions / (self.seconds() - self.before)
            self.bar.set_postfix_str(f"{place}loss {mean:.3f}, {rate:,.0f} tok/s", refresh=False)

    def check(self, loss):
        """Raise UserError if the loss or a weight is not finite; what was saved stays."""
        at = self.at
        if not math.isfinite(loss) or any(map(not_finite, self.modules.values())):
            raise UserError(f"{self.out}: at update {at['done']} the loss or a weight is no longer "
                            f"finite (the last loss: {at.get('finite', math.nan):.3g}); try a "
                            "lower --lr, --grad-clip 1, or more --warmup.")

    def log(self, event, **values):
        """A line of metrics.jsonl."""
        self.metrics.write(event=event, **values)

    def valid(self, v, losses={}, **where):
        """Log and say a validation: v, what evaluate returned; where: stage=1, say."""
        done, self.at["valid"] = self.at["done"], v["accuracy"]
        self.log("valid", **where, update=done, accuracy=v["accuracy"], n=v["n"], **losses)
        place = "".join(f"{name} {value}  " for name, value in where.items())
        parts = "".join(f"  {name} {value:.3f}" for name, value in losses.items())
        self.say(f"update {done:>5}  {place}validation {100 * v['accuracy']:5.1f} %{parts}")

    def is_best(self, v):
        """Is this validation the best so far, or as good? Remembered in at["best"]."""
        better = v["accuracy"] >= self.at["best"]
        self.at["best"] = max(self.at["best"], v["accuracy"])
        return better

    def save(self, name, optimizers, **states):
        """Write the checkpoint `name`: all modules and optimizers. states: instead of a module's
        own."""
        self.at["loss"], self.at["seconds"] = float(self.at["loss"]), self.seconds()
        self.check(self.at["loss"])
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


def read_events(folder):
    """The events in a run's metrics.jsonl, as dicts, up to a line that is cut off; none if the
    folder has no such file."""
    events = []
    with contextlib.suppress(OSError, ValueError):
        with open(os.path.join(folder, "metrics.jsonl")) as f:
            for line in f:
                event = json.loads(line)
                if isinstance(event, dict) and "event" in event:
                    events.append(event)
    return events


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
