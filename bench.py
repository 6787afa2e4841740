"""What it costs: training steps, decoding, memory and data, beside a plain reference and the machine's limits.

Every time is the median of several runs after one that warms up; its spread is the fastest and the
slowest of them. What is compared takes turns, run by run, so that whatever else the machine does
falls on all alike. The limits are measured in the same run: a matrix product of the model's width (of
its speed a training step reaches a share: MFU), and a copy that no processor cache holds (a step of
decoding has to read all weights and the cache once: the bandwidth bound).

The naive loops compute the same without a cache: all that stands before is read again for each thought
and each token. They must give the same losses and tokens before anything is timed. Weights and token
ids are random; nothing is downloaded.
    python bench.py --preset tiny
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import codi
import coconut
import data_prep
import runtime
from data_prep import Sequence
from gpt2 import GPT2, GPT2Config, GrowingCache, StaticCache, sample

PRESETS = {     # shapes; question, words (the steps) and answer in tokens
    "tiny": dict(n_layer=2, n_head=8, n_embd=128, vocab=512, block_size=256, batch=32, question=40, words=32, answer=8,
                 repeats=5),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, vocab=50260, block_size=1024, batch=8, question=128, words=32, answer=8,
                 repeats=3),
}
THOUGHTS, K = (0, 2, 4, 6), 6        # K: where compared with the naive loops
LONG = 128                           # tokens of the question where ours and the naive loops are compared
BATCHES = (1, 8, 64, 256)            # questions decoded at a time
NEW, ROLLOUTS = 16, 8                # tokens decoded where caches are compared; continuations of one question
FIGURES = dict(                      # what a row may say further, as the table writes it
    tokens_per_s="{:,.0f} tokens/s", questions_per_s="{:,.1f} questions/s", items_per_s="{:,.0f} items/s",
    mfu="MFU {:.0f} %", bound="{:.0f} % of the bandwidth bound", times_naive="{:.1f}x as fast as naive",
    times_growing="{:.2f}x as fast as growing", times_eager="{:.2f}x as fast as eager",
    times_apart="{:.2f}x as fast as apart", ms_per_thought="{:.1f} ms for each thought",
    share_per_thought="{:.1f} % of the step without", per_question="{:.2f} MiB a question",
    MiB_per_thought="{:.2f} MiB for each thought", padding="{:.1f} % padding", seconds="{:.1f} s",
    graphs="{} graphs compiled so far", note="{}")
TARGETS = (                          # section, row, figure, at least (1) or at most (-1), value, device, least width
    ("train", f"question {LONG}, {K} thoughts", "times_naive", 1, 3, "any", 0),
    ("decode", f"question {LONG}, batch 64, static cache", "times_naive", 1, 10, "any", 0),
    ("train", f"question {LONG}, {K} thoughts", "mfu", 1, 60, "cpu", 768),
    ("train", f"question {LONG}, {K} thoughts, compiled", "mfu", 1, 40, "cuda", 768),
    ("decode", "one token, batch 1, compiled", "bound", 1, 60, "cuda", 768),
    ("data", "first update of the default run", "seconds", -1, 10, "any", 0),
    ("data", "batches of the default run", "padding", -1, 10, "any", 0))

# ---------------------------------------------------------------- plain references


def naive_think(model, batch, project=lambda state: state):
    """Prompt and thoughts as inputs x (B, T + k, C) and keep (B, T + k): all that stands before is read for each thought."""
    x, keep = model.wte(batch.prompt), batch.keep
    for i in range(batch.latent.size(1)):
        thought = project(model(embeds=x, keep=keep)[:, -1:])                # (B, T + i, C) -> (B, 1, C)
        x, keep = torch.cat([x, thought], 1), torch.cat([keep, batch.latent[:, i:i + 1]], 1)
    return x, keep


def naive_read(model, x, keep, language):
    """The states of all layers, (B, T, C) each, of language (B, T) read after x."""
    T = language.size(1)
    x, keep = torch.cat([x, model.wte(language)], 1), F.pad(keep, (0, T), value=True)
    return [h[:, -T:] for h in model(embeds=x, keep=keep, all_states=True)]


def naive_coconut(model, batch):
    """Coconut's loss without a cache."""
    return codi.cross_entropy(model, naive_read(model, *naive_think(model, batch), batch.language)[-1], batch)


def naive_codi(model, projection, student, teacher, colon, flags):
    """CODI's loss without a cache; the teacher reads the question for itself."""
    answer = naive_read(model, *naive_think(model, student, projection), student.language)
    words = naive_read(model, model.wte(teacher.prompt), teacher.keep, teacher.language)
    rows = torch.arange(len(student.prompt), device=student.prompt.device)
    states = [torch.stack([h[rows, at] for h in side]) for side, at in zip((answer, words), colon)]      # (L + 1, B, C)
    return (flags.alpha * codi.cross_entropy(model, answer[-1], student)
            + flags.beta * codi.distance(*states, flags.kd, flags.kd_normalize)
            + flags.gamma * codi.cross_entropy(model, words[-1], teacher))


@torch.no_grad()
def naive_decode(model, batch, n):
    """Think and decode n tokens greedily without a cache, all that stands before read for each. Returns lists of ids."""
    x, keep = naive_think(model, batch)
    token, out = batch.language[:, :1], []                                   # <eot>
    for _ in range(n):
        x, keep = torch.cat([x, model.wte(token)], 1), F.pad(keep, (0, 1), value=True)
        token = model.head(model(embeds=x, keep=keep)[:, -1:]).argmax(-1)    # (B, 1)
        out.append(token)
    return torch.cat(out, 1).tolist()


@torch.no_grad()
def decode_with(cache, model, batch, n, times=1):
    """The same with a cache of ours. times: rollouts of each question, which share what was read."""
    x, keep, _ = coconut.think(model, cache, batch.prompt, batch.keep, batch.latent)
    h = coconut.read_on(model, cache, x, keep, batch.language[:, :1])[:, -1]
    if times > 1:
        cache, h = cache.repeat(times), h.repeat_interleave(times, 0)
    return model.decode(cache, h, n, eos=-1)


def agree(what, ours, naive):
    """A fast path that computes something else is not worth timing."""
    if not np.allclose(ours, naive, rtol=1e-4, atol=0):
        raise runtime.UserError(f"{what}: {ours}, but the naive loop gives {naive}; nothing is timed until they agree.")


# ---------------------------------------------------------------- measuring


def race(fns, s, slow=2.0):
    """{name: fn} -> {name: seconds of its runs} and {name: their median}: s.repeats runs of each, in turns, after one
    that warms up (above `slow` seconds it counts); fewer where they would take more than s.limit seconds together."""
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
    done = torch.cuda.synchronize if s.machine.device.type == "cuda" else lambda: None
    done()
    start = time.perf_counter()
    fn()
    done()
    return time.perf_counter() - start


def row(section, what, runs, unit="ms", **further):
    """A line of the table, from runs in seconds (unit ms) or in `unit`; without runs it was left out."""
    runs = [1000 * r for r in runs] if unit == "ms" else runs
    median, low, high = (float(np.median(runs)), min(runs), max(runs)) if runs else (None, None, None)
    return dict(section=section, what=what, unit=unit, median=median, low=low, high=high, runs=len(runs)) | further


def bandwidth(s, n=2 ** 26):
    """Bytes per second, read and written, of copying n float32 (256 MiB); the best of six."""
    a, b = torch.zeros(2, n, device=s.machine.device)
    return 8 * n / min(seconds_of(lambda: b.copy_(a), s) for _ in range(6))


def graphs():
    """Graphs compiled so far, recompilations among them."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def sequences(s, B, question, k, n_language=0):
    """B Sequences of random tokens: question <bot>, k thoughts, <eot> and n_language more."""
    ids = np.random.default_rng(0).integers(s.vocab - 4, size=(B, question + n_language)).tolist()
    return [Sequence(row[:question] + [s.tok.bot], k, [s.tok.eot] + row[question:]) for row in ids]


def batch_of(rows, s):
    return data_prep.collate(rows, 0, s.machine.device)


# ---------------------------------------------------------------- training and memory


class Case(NamedTuple):
    """A loss at one shape: ours, the naive loop's, and the work there is."""
    ours: Callable               # () -> loss
    naive: Callable
    positions: int               # that have to be read once, thoughts among them
    labels: int
    T: float                     # length that attention sees


def coconut_case(s, B, question, k, model=None):
    model, batch = s.model if model is None else model, batch_of(sequences(s, B, question, k, s.words), s)
    return Case(lambda: coconut.coconut_loss(model, batch)[0], lambda: naive_coconut(model, batch),
                batch.positions, len(batch.labels), batch.positions / B)


def codi_case(s, B, question, k, model=None):
    """The teacher writes s.words tokens before the answer; states are compared in the answer's middle."""
    model, flags, words = s.model if model is None else model, SimpleNamespace(**codi.DEFAULTS), [1] * s.words
    students = sequences(s, B, question, k, s.answer)
    teachers = [Sequence(r.prompt[:-2], 0, r.prompt[-2:-1] + words + r.language[1:]) for r in students]
    student, teacher = batch_of(students, s), batch_of(teachers, s)
    colon = torch.tensor([[s.answer // 2], [s.words + s.answer // 2]], device=s.machine.device).expand(2, B)
    return Case(lambda: codi.codi_loss(model, s.projection, student, teacher, colon, flags)[0],
                lambda: naive_codi(model, s.projection, student, teacher, colon, flags),
                teacher.positions + student.positions - B * (question - 1),  # the question is read once
                len(student.labels) + len(teacher.labels), teacher.positions / B)


def step(s, loss):
    """Forward and backward. The optimizer's update, the same for all, stands in a row of its own."""
    with s.machine.autocast():
        value = loss()
    value.backward()
    s.model.zero_grad(set_to_none=True), s.projection.zero_grad(set_to_none=True)


def training(section, case, s):
    """The step with 0 to 6 thoughts, with 6 the naive loop's beside it, at the preset's question and at LONG."""
    none, most = "0 thoughts", f"{K} thoughts"
    for question in sorted({s.question, LONG}):
        with torch.no_grad():
            small = case(s, 2, question, K)
            agree(f"{section}, question of {question} tokens, loss", small.ours().item(), small.naive().item())
        cases = {f"{k} thoughts": case(s, s.batch, question, k) for k in (THOUGHTS if question == s.question else (0, K))}
        fns = {name: partial(step, s, c.ours) for name, c in cases.items()}
        fns[f"{most}, naive"] = partial(step, s, cases[most].naive)
        if s.compile:
            compiled = case(s, s.batch, question, K, torch.compile(s.model, dynamic=True))
            fns[f"{most}, compiled"] = partial(step, s, compiled.ours)
            fns[f"{most}, compiled"]()                       # compiles
        runs, median = race(fns, s)
        s.ceiling = max(s.ceiling, runtime.matmul_flops(s.machine.device, s.machine.dtype, s.n_embd, repeats=20))
        thought = (median[most] - median[none]) / K
        for name in fns:
            c = cases.get(name, cases[most])
            flops = c.positions * s.model.flops_per_token(c.T) + 6 * s.n_embd * s.vocab * c.labels
            further = dict(tokens_per_s=c.positions / median[name], mfu=100 * flops / median[name] / s.ceiling)
            if name == most:
                further |= dict(ms_per_thought=1000 * thought, share_per_thought=100 * thought / median[none],
                                times_naive=median[f"{most}, naive"] / median[most])
            elif name.endswith("compiled"):
                further |= dict(times_eager=median[most] / median[name], graphs=graphs())
            yield row(section, f"question {question}, {name}", runs[name], **further)


def train(s):
    yield from training("train", coconut_case, s)
    flags = SimpleNamespace(optimizer="adamw", lr=1e-9, weight_decay=0.0, beta2=0.95)
    optimizer = coconut.new_optimizers(s.model, flags)[0]
    for p in s.model.parameters():
        p.grad = torch.ones_like(p)
    yield row("train", "AdamW's update, comes to each", timed(optimizer.step, s)[0])
    s.model.zero_grad(set_to_none=True)


def peak(s, loss):
    """MiB that a step needs beside weights. CUDA: the allocator's peak above what was there before; else what
    autograd keeps for the backward pass, each storage once: the same on every run and machine."""
    if s.machine.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(s, loss)
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    kept = []

    def keep(tensor):
        tensor = tensor.detach()                             # the tensor itself would keep the graph alive for ever
        kept.append(weakref.ref(tensor))                     # and some of the graph goes before its end
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), s.machine.autocast():
        value = loss()                                       # what is kept lives as long as this
    storages = [tensor.untyped_storage() for tensor in (alive() for alive in kept) if tensor is not None]
    weights = {p.untyped_storage().data_ptr() for m in (s.model, s.projection) for p in m.parameters()}
    return sum({m.data_ptr(): m.nbytes() for m in storages if m.data_ptr() not in weights}.values()) / 2 ** 20


def memory(s):
    """Each training setting, and how it grows with thoughts and with the batch."""
    for name, case in (("coconut", coconut_case), ("codi", codi_case)):
        settings = [(k, s.batch) for k in THOUGHTS] + [(K, max(1, s.batch // 2)), (K, 2 * s.batch)]
        found = {(k, B): peak(s, case(s, B, s.question, k).ours) for k, B in settings}
        for (k, B), MiB in found.items():
            further = dict(MiB_per_thought=(MiB - found[0, B]) / k) if k and (0, B) in found else {}
            yield row("memory", f"{name}, {k} thoughts, batch {B}", [MiB], "MiB", per_question=MiB / B, **further)
        naive = peak(s, case(s, s.batch, s.question, K).naive)
        yield row("memory", f"{name}, {K} thoughts, batch {s.batch}, naive", [naive], "MiB", per_question=naive / s.batch)


# ---------------------------------------------------------------- decoding


def answers(s):
    """From lists of ids to lists of ids: 6 thoughts, s.words tokens in words, or neither, and then the answer."""
    short, long = (SimpleNamespace(**coconut.DEFAULTS | dict(max_new=n)) for n in (s.answer, s.words + s.answer))

    def plain(rows):
        return [Sequence(r.prompt[:-2], 0, r.prompt[-2:-1]) for r in rows]

    methods = {"coconut": lambda rows: coconut.answer(s.model, rows, s.tok, short, s.machine),
               "cot": lambda rows: coconut.answer(s.model, plain(rows), s.tok, long, s.machine),
               "no-cot": lambda rows: coconut.answer(s.model, plain(rows), s.tok, short, s.machine),
               "codi": lambda rows: codi.answer(s.model, s.projection, rows, s.tok, short, s.machine)}
    seen = {name: [(-1, 0.0), (0, 0.0)] for name in methods}                 # (batch, seconds) so far
    for B in BATCHES:
        line = {name: t1 + (t1 - t0) / (b1 - b0) * (B - b1) for name, [*_, (b0, t0), (b1, t1)] in seen.items()}
        rows = sequences(s, B, s.question, K)
        runs, median = race({name: partial(fn, rows) for name, fn in methods.items() if line[name] <= s.limit}, s)
        for name in methods:
            further = dict(note=f"left out: some {line[name]:.0f} s, more than --limit")
            if name in runs:
                seen[name].append((B, median[name]))
                further = dict(questions_per_s=B / median[name])
            yield row("decode", f"{name}, question {s.question}, batch {B}", runs.get(name, []), **further)


def new_cache(s, B, dtype=None):
    return StaticCache(s.model.config, B, LONG + 1 + K + 1 + NEW, s.machine.device, dtype or s.machine.dtype)


def caches(s):
    """Coconut's thoughts and NEW tokens with the static cache, with the growing one, with none (the naive loop)."""
    two = batch_of(sequences(s, 2, LONG, K), s)
    for cache in (new_cache(s, 2, torch.float32), GrowingCache()):
        agree(f"decode, {type(cache).__name__}, tokens", decode_with(cache, s.model, two, 4), naive_decode(s.model, two, 4))
    one = 0.0
    for B in (1, 64):
        batch = batch_of(sequences(s, B, LONG, K), s)

        @torch.no_grad()
        def ends():
            for more in (0, K + NEW):
                x, keep = F.pad(s.model.wte(batch.prompt), (0, 0, 0, more)), F.pad(batch.keep, (0, more), value=True)
                s.model.head(s.model(embeds=x, keep=keep)[:, -1])

        whole, passes = one * B <= s.limit, K + NEW
        fns = {"static cache": lambda: decode_with(new_cache(s, B), s.model, batch, NEW),
               "growing cache": lambda: decode_with(GrowingCache(), s.model, batch, NEW),
               "no cache": (lambda: naive_decode(s.model, batch, NEW)) if whole else ends}
        with s.machine.autocast():
            runs, median = race(fns, s)
        if not whole:
            runs["no cache"] = [r * passes / 2 for r in runs["no cache"]]
        one = median["no cache"] = np.median(runs["no cache"])
        further = {"no cache": {} if whole else dict(note=f"from the first and the last of its {passes} passes"),
                   "static cache": dict(times_naive=one / median["static cache"],
                                        times_growing=median["growing cache"] / median["static cache"])}
        for name in fns:
            yield row("decode", f"question {LONG}, batch {B}, {name}", runs[name], questions_per_s=B / median[name],
                      **further.get(name, {}))


def tokens(s, several=5):
    """One token for each row of a full cache: against reading the weights (of the positions' only a row) and the cache."""
    forms = {"eager": s.model} | (dict(compiled=torch.compile(s.model.forward)) if s.compile else {})
    weights = s.model.n_params() - s.model.wpe.weight.numel()
    s.bandwidth = bandwidth(s)
    for B in BATCHES:
        cache, token = new_cache(s, B), torch.zeros(B, 1, dtype=torch.long, device=s.machine.device)
        cache.keep[:] = True
        last, keep = cache.keep.size(1) - 1, torch.ones_like(token, dtype=torch.bool)

        @torch.no_grad()
        def run(form):
            for _ in range(several):
                cache.length.fill_(last)
                sample(s.model.head(form(token, cache=cache, keep=keep)[:, -1]))

        with s.machine.autocast():                           # outside the runs: weights are cast once, as in an answer
            if s.compile:                                    # for this batch alone, not for any
                torch._dynamo.reset()
                run(forms["compiled"])
            runs, median = race({name: partial(run, form) for name, form in forms.items()}, s)
        size = weights * s.machine.dtype.itemsize + sum(kv.nbytes for kv in (*cache.k, *cache.v))
        for name, own in runs.items():
            seconds = median[name] / several
            further = dict(times_eager=median["eager"] / median[name], graphs=graphs()) if name == "compiled" else {}
            yield row("decode", f"one token, batch {B}, {name}", [r / several for r in own], tokens_per_s=B / seconds,
                      bound=100 * size / s.bandwidth / seconds, **further)


def rollouts(s):
    """ROLLOUTS continuations of one question: read once for all, or by each for itself."""
    def run(B):
        return decode_with(new_cache(s, B), s.model, batch_of(sequences(s, 1, LONG, K) * B, s), NEW, ROLLOUTS // B)

    with s.machine.autocast():
        runs, median = race({"read once": partial(run, 1), "read apart": partial(run, ROLLOUTS)}, s)
    for name in runs:
        further = dict(times_apart=median["read apart"] / median[name]) if name == "read once" else {}
        yield row("decode", f"question {LONG}, {ROLLOUTS} rollouts, {name}", runs[name], **further)


# ---------------------------------------------------------------- data


def data(s):
    """The default run's data: made, tokenized, batched, and the way from the command to the first update."""
    flags, splits, examples = coconut.parse_flags([])[0], {}, {}
    runs, making = timed(lambda: splits.update(data_prep.chains(s.sizes)), s)
    yield row("data", "chains generated", runs, items_per_s=sum(s.sizes) / making)
    model, tok = coconut.start_model(flags, splits)
    runs, median = timed(lambda: examples.update(coconut.tokenize(splits, tok, model, flags)), s)
    yield row("data", "chains tokenized", runs, items_per_s=sum(s.sizes) / median)
    real, columns, seconds = 0, 0, []
    for stage in range(flags.stage_max + 1):                 # as coconut.train does it, up to 200 updates of each stage
        order = data_prep.batches(coconut.lengths(examples["train"], stage, flags), flags.batch_size,
                                  runtime.generator(flags.seed, stage, 0))
        for k, chosen in enumerate(order[:200]):
            start, mix = time.perf_counter(), runtime.generator(flags.seed, stage, 0, k)
            rows = [coconut.training_sequence(examples["train"][i], stage, flags, tok, mix) for i in chosen]
            batch = data_prep.collate(rows, tok.eos)
            seconds.append(time.perf_counter() - start)
            real += batch.positions
            columns += len(chosen) * sum(part.size(1) for part in (batch.prompt, batch.latent, batch.language))
    yield row("data", "batches of the default run", seconds, padding=100 * (1 - real / columns))
    with tempfile.TemporaryDirectory() as folder:
        paths = {os.path.join(folder, "data", flags.data, f"{split}.json"): items for split, items in splits.items()}
        making += seconds_of(lambda: data_prep.write_jsons(paths), s)
        runs, median = timed(partial(first_update, folder, s), s)
    yield row("data", "first update of the default run", runs, seconds=median, note="data at hand")
    yield row("data", "first update, data made before", [r + making for r in runs], seconds=median + making,
              note="the line above, generating and writing")


def first_update(folder, s):
    """From the command to the first line in metrics.jsonl, which a stage of one update writes after it."""
    out = tempfile.mkdtemp(dir=folder)
    metrics = os.path.join(out, "metrics.jsonl")
    command = [sys.executable, coconut.__file__, "--steps-stage-0", "1", "--device", str(s.machine.device), "--out", out]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (os.path.exists(metrics) and os.path.getsize(metrics)):
            if process.poll() is not None:
                raise runtime.UserError(f"data: '{' '.join(command)}' ended before its first update; run it to see why.")
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()


# ---------------------------------------------------------------- main

SECTIONS = dict(train=(train,), codi=(partial(training, "codi", codi_case),), decode=(answers, caches, tokens, rollouts),
                memory=(memory,), data=(data,))


def parse_flags(argv=None):
    p = argparse.ArgumentParser(usage="python bench.py [flags], --help lists them", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--preset", choices=PRESETS, default="tiny", help="tiny (default): 2 layers of 128 channels, batch 32, questions of "
        "40 tokens; gpt2: GPT-2 small, batch 8, questions of 128 tokens")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of matrix products; auto: what is fast here")
    add("--only", default=",".join(SECTIONS), help=f"sections, with commas (default: {','.join(SECTIONS)})")
    add("--compile", action="store_true", help="also torch.compile, in training and decoding (slow to start on a CPU)")
    add("--repeats", type=data_prep.at_least(1), help="runs of each setting (default 5; gpt2: 3)")
    add("--limit", type=data_prep.real(), default=30.0, help="seconds that the runs of one setting may take together: it "
        "has fewer then, but one at least, and batches of which one would take longer are left out (default 30)")
    add("--out", default="bench.json", help="the figures as JSON, overwritten (default bench.json)")
    flags = p.parse_args(argv)
    flags.only = flags.only.split(",")
    for name in flags.only:
        if name not in SECTIONS:
            p.error(f"--only: there is no section {name!r}; choose among {', '.join(SECTIONS)}")
    if os.path.isdir(flags.out) or not os.path.isdir(os.path.dirname(flags.out) or "."):
        p.error(f"--out {flags.out}: name a file in a folder that exists")
    return flags


def setting(flags, shape):
    """All that the sections read: shapes, flags, machine, limits, a model and a projection with random weights."""
    typed = {name: value for name, value in vars(flags).items() if value is not None}
    s = SimpleNamespace(**dict(sizes=data_prep.CHAINS_SIZES, bandwidth=0.0) | shape | typed)
    s.machine = runtime.Machine(flags.device, flags.dtype, s.n_embd)
    torch.manual_seed(0)
    s.model = GPT2(GPT2Config(s.block_size, s.vocab, s.n_layer, s.n_head, s.n_embd)).to(s.machine.device)
    s.projection = codi.make_projection(SimpleNamespace(**codi.DEFAULTS), s.n_embd).to(s.machine.device)
    s.tok = SimpleNamespace(eos=-1, bot=s.vocab - 3, eot=s.vocab - 2)        # eos is never written: all rows are as long
    s.ceiling = runtime.matmul_flops(s.machine.device, s.machine.dtype, s.n_embd, repeats=20)
    return s


def machine_of(s):
    """What the figures hold for: device, processor, versions, limits."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            name = next((line.split(": ")[1].strip() for line in f if line.startswith("model name")), name)
    return {"device": str(s.machine), "processor": name, "cores": os.cpu_count(), "torch": torch.__version__,
            "Python": platform.python_version(), "matrix product, GFLOP/s": round(s.ceiling / 1e9, 1),
            "copy, GB/s": round(s.bandwidth / 1e9, 1) or None}


def decided(rows, s):
    """The targets that these rows decide, met or not."""
    found = {(r["section"], r["what"]): r for r in rows}
    for section, what, figure, sign, value, device, width in TARGETS:
        measured = found.get((section, what), {}).get(figure)
        if measured is not None and device in ("any", s.machine.device.type) and s.n_embd >= width:
            target = f"{section}, {what}: {'at least' if sign > 0 else 'at most'} {FIGURES[figure].format(value)}"
            yield dict(target=target, measured=measured, met=bool(sign * measured >= sign * value))


def table(rows):
    """The rows as lines of Markdown, a table for each section."""
    def number(v):
        return f"{v:,.0f}" if v >= 100 else f"{v:.1f}" if v >= 10 else f"{v:.2f}"

    lines, section = [], None
    for r in rows:
        if r["section"] != section:
            section = r["section"]
            lines += ["", f"| {section} | median | fastest to slowest | runs | |", "|---|---|---|---|---|"]
        times = f"{number(r['median'])} {r['unit']} | {number(r['low'])} to {number(r['high'])}" if r["runs"] else " | "
        further = "; ".join(text.format(r[name]) for name, text in FIGURES.items() if name in r)
        lines.append(f"| {r['what']} | {times} | {r['runs']} | {further} |")
    return lines


def main(argv=None, shape=None):
    """shape: another than that of --preset."""
    flags, start, rows = parse_flags(argv), time.perf_counter(), []
    s = setting(flags, shape or PRESETS[flags.preset])
    for name in flags.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows += [row for part in SECTIONS[name] for row in part(s)]
    machine, targets = machine_of(s), list(decided(rows, s))
    print(f"preset {flags.preset}, {s.model.n_params() / 1e6:.1f} M parameters, {time.perf_counter() - start:.0f} s; "
          + "; ".join(f"{name} {value}" for name, value in machine.items() if value))
    print("\n".join(table(rows)) + "\n")
    for t in targets:
        print(f"{'met' if t['met'] else 'NOT MET'}: {t['target']}; measured {t['measured']:.1f}")
    used = vars(flags) | dict(repeats=s.repeats)
    data_prep.write_json(flags.out, dict(preset=flags.preset, machine=machine, flags=used, rows=rows, targets=targets))
    return 0


if __name__ == "__main__":
    runtime.run_main(main, data_prep.DataError)
