"""Measuring: seconds in turns, memory, the limits of a machine, and a table of all that.

Every time is the median of several runs after one that warms up; its spread is the fastest and the
slowest of them. What is compared takes turns, run by run, so that whatever else the machine does
falls on all alike.

`s` has what is measured and how: machine (a runtime.Machine), dtype (as typed), repeats (runs of
each setting), limit (seconds that they may take together), model, projection and n_embd.
"""

import os
import platform
import subprocess
import time
import weakref
from functools import partial

import numpy as np
import torch

from common import runtime
from gpt2 import StaticCache

FIGURES = dict(                      # what a row may say further, as the table writes it
    tokens_per_s="{:,.0f} tokens/s", questions_per_s="{:,.1f} questions/s",
    items_per_s="{:,.0f} items/s", mfu="MFU {:.0f} %", bound="{:.0f} % of the bandwidth bound",
    times_naive="{:.1f}x as fast as naive", times_growing="{:.2f}x as fast as growing",
    times_eager="{:.2f}x as fast as eager", times_apart="{:.2f}x as fast as apart",
    ms_per_thought="{:.1f} ms for each thought",
    share_per_thought="{:.1f} % of the step without", per_question="{:.2f} MiB a question",
    MiB_per_thought="{:.2f} MiB for each thought", padding="{:.1f} % padding",
    seconds="{:.1f} s", graphs="{} graphs compiled so far", note="{}")


# ---------------------------------------------------------------- time

def race(fns, s, slow=2.0):
    """{name: fn} -> {name: seconds of its runs} and {name: their median}: s.repeats runs of each,
    in turns, after one that warms up (above `slow` seconds it counts); fewer where they would take
    more than s.limit seconds together."""
    runs = {name: [] for name in fns}
    for turn in range(s.repeats + 1):
        for name, fn in fns.items():
            own = runs[name]
            if len(own) < s.repeats and (not own or sum(own) + own[-1] <= s.limit):
                own.append(seconds_of(fn, s))
                if turn == 0 and own[0] < slow:
                    own.clear()
    return runs, {name: float(np.median(own)) for name, own in runs.items()}


def timed(fn, s):
    """The same of one fn."""
    runs, median = race({"it": fn}, s)
    return runs["it"], median["it"]


def seconds_of(fn, s):
    on_gpu = s.machine.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    fn()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def row(section, what, runs, unit="ms", **further):
    """A line of the table, from runs in seconds (unit ms) or in `unit`; without runs it was left
    out."""
    runs = [1000 * r for r in runs] if unit == "ms" else runs
    median, low, high = (float(np.median(runs)), min(runs), max(runs)) if runs else [None] * 3
    return dict(section=section, what=what, unit=unit, median=median, low=low, high=high,
                runs=len(runs)) | further


def agree(what, ours, naive):
    """A fast path that computes something else is not worth timing."""
    if not np.allclose(ours, naive, rtol=1e-4, atol=0):
        raise runtime.UserError(f"{what}: {ours}, but the naive loop gives {naive}; nothing is "
                                "timed until they agree.")


def bandwidth(s, n=2 ** 26):
    """Bytes per second, read and written, of copying n float32 (256 MiB); the best of six."""
    a, b = torch.zeros(2, n, device=s.machine.device)
    return 8 * n / min(seconds_of(lambda: b.copy_(a), s) for _ in range(6))


def matrix_product(s):
    """FLOP/s of a matrix product of the model's width, s.n_embd: the ceiling of a training step."""
    return runtime.matmul_flops(s.machine.device, s.machine.dtype, s.n_embd, repeats=20)


def graphs():
    """Graphs compiled so far, recompilations among them."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def until_written(command, path, folder):
    """Start a training run in a folder, and end it when there is something in its file `path`.
    Raises UserError if it ends by itself before."""
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        while not (os.path.exists(path) and os.path.getsize(path)):
            if process.poll() is not None:
                raise runtime.UserError(f"data: '{' '.join(command)}' ended before its first "
                                        "update; run it to see why.")
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()


def one_token(s, model, B, size, forms, several=5):
    """Rows: a token for each of B rows of a cache of `size` columns, all of them filled, in float32
    or bfloat16, whichever --dtype auto finds faster with B rows. bound: the share of the bandwidth
    that reading the weights once, and the cache, takes. forms: {name: the model, or it compiled}.
    """
    config = model.config
    machine = runtime.Machine(str(s.machine.device), s.dtype, config.n_embd, B)
    n_weights = model.n_params()
    if hasattr(model, "wpe"):
        n_weights -= model.wpe.weight.numel()                # of the positions only a row
    cache = StaticCache(config, B, size, machine.device, machine.dtype)
    cache.keep[:] = True
    token = torch.zeros(B, 1, dtype=torch.long, device=machine.device)
    keep = torch.ones_like(token, dtype=torch.bool)

    @torch.no_grad()
    def run(form):
        for _ in range(several):
            cache.length.fill_(size - 1)
            model.head(form(token, cache=cache, keep=keep)[:, -1]).argmax(-1)

    with machine.autocast():                     # outside the runs: weights are cast once
        runs, median = race({name: partial(run, form) for name, form in forms.items()}, s)
    nbytes = n_weights * machine.dtype.itemsize + sum(kv.nbytes for kv in (*cache.k, *cache.v))
    for name, own in runs.items():
        seconds, further = median[name] / several, {}
        if name == "compiled":
            further = dict(times_eager=median["eager"] / median[name], graphs=graphs())
        yield row("decode", f"one token, batch {B}, {name}", [r / several for r in own],
                  tokens_per_s=B / seconds, bound=100 * nbytes / s.bandwidth / seconds,
                  note=machine.dtype_name, **further)


# ---------------------------------------------------------------- memory

def forward_backward(s, loss):
    """Forward and backward. The optimizer's update, the same for all, has a row of its own."""
    with s.machine.autocast():
        value = loss()
    value.backward()
    for module in (s.model, s.projection):
        module.zero_grad(set_to_none=True)


def peak(s, loss):
    """MiB that a step needs besides weights. CUDA: the allocator's peak above what was there
    before; else what autograd keeps for the backward pass, each storage once: the same on every run
    and machine."""
    if s.machine.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        forward_backward(s, loss)
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    kept = []

    def keep(tensor):
        tensor = tensor.detach()             # the tensor itself would keep the graph alive for ever
        kept.append(weakref.ref(tensor))     # and some of the graph goes before its end
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), s.machine.autocast():
        value = loss()                       # what is kept lives as long as this
    storages, alive = {}, [reference() for reference in kept]
    for tensor in alive:
        if tensor is not None:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    for module in (s.model, s.projection):
        for p in module.parameters():
            storages.pop(p.untyped_storage().data_ptr(), None)
    return sum(storages.values()) / 2 ** 20


# ---------------------------------------------------------------- what is said of it

def machine_of(s):
    """What the figures hold for: device, processor, versions, limits."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            models = [line.split(": ")[1].strip() for line in f if line.startswith("model name")]
        name = models[0] if models else name
    return {"device": str(s.machine), "processor": name, "cores": os.cpu_count(),
            "torch": torch.__version__, "Python": platform.python_version(),
            "matrix product, GFLOP/s": round(s.ceiling / 1e9, 1),
            "copy, GB/s": round(s.bandwidth / 1e9, 1) or None}


def markdown(rows):
    """The rows as lines of Markdown, a table for each section."""
    def number(v):
        if v >= 100:
            return f"{v:,.0f}"
        return f"{v:.1f}" if v >= 10 else f"{v:.2f}"

    lines, section = [], None
    for r in rows:
        if r["section"] != section:
            section = r["section"]
            lines += ["", f"| {section} | median | fastest to slowest | runs | |",
                      "|---|---|---|---|---|"]
        times = " | "
        if r["runs"]:
            times = f"{number(r['median'])} {r['unit']} | {number(r['low'])} to {number(r['high'])}"
        further = "; ".join(text.format(r[name]) for name, text in FIGURES.items() if name in r)
        lines.append(f"| {r['what']} | {times} | {r['runs']} | {further} |")
    return lines


def decided(rows, targets, s):
    """Those of the targets that these rows decide, met or not. targets: tuples (section, row,
    figure, at least (1) or at most (-1), value, device, least width)."""
    found = {(r["section"], r["what"]): r for r in rows}
    for section, what, figure, sign, value, device, width in targets:
        measured = found.get((section, what), {}).get(figure)
        if measured is None or device not in ("any", s.machine.device.type) or s.n_embd < width:
            continue
        bound = f"{'at least' if sign > 0 else 'at most'} {FIGURES[figure].format(value)}"
        yield dict(target=f"{section}, {what}: {bound}", measured=measured,
                   met=bool(sign * measured >= sign * value))
