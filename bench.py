"""What it costs: training steps, decoding, memory and data; see common/measure.py.

Two limits are measured in the same run: a matrix product of the model's width (a training step
reaches a share of its speed: MFU), and a copy that no processor cache holds (a step of decoding has
to read all weights and the cache once: the bandwidth bound). The naive loops compute the same
without a cache: everything before is read again for each thought and each token. They must give the
same losses and tokens before anything is timed. Weights and token ids are random.
    python bench.py --preset tiny
"""

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import coconut
import codi
from common import experiment, optim, puzzles, runtime, schedule, weights
from common.files import write_json, write_jsons
from common.measure import (agree, bandwidth, decided, forward_backward, graphs, machine_of,
                            markdown, matrix_product, one_token, peak, race, row, seconds_of, timed,
                            until_written)
from common.text import COCONUT_MARK, Sequence, batches, collate
from gpt2 import GPT2, GPT2Config, GrowingCache, StaticCache
from llama import PRESETS as LLAMAS, Llama, LlamaConfig

PRESETS = {     # shapes; question, words (the steps) and answer in tokens
    "tiny": dict(n_layer=2, n_head=8, n_embd=128, vocab=512, block_size=256, batch=32, question=40,
                 words=32, answer=8, repeats=5,
                 llama=dict(n_layer=2, n_head=8, n_kv_head=4, n_embd=128, n_hidden=256,
                            vocab_size=512, block_size=256)),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, vocab=50260, block_size=1024, batch=8,
                 question=128, words=32, answer=8, repeats=3, llama=LLAMAS["smollm2"]),
}
THOUGHTS, K = (0, 2, 4, 6), 6        # K: where compared with the naive loops
LONG = 128                           # tokens of the question where compared with the naive loops
BATCHES = (1, 8, 64, 256)            # questions decoded at a time
NEW, ROLLOUTS = 16, 8                # tokens decoded where caches are compared; rollouts
TARGETS = (      # section, row, figure, at least (1) or at most (-1), value, device, least width
    ("train", f"question {LONG}, {K} thoughts", "times_naive", 1, 3, "any", 0),
    ("decode", f"question {LONG}, batch 64, static cache", "times_naive", 1, 10, "any", 0),
    ("train", f"question {LONG}, {K} thoughts", "mfu", 1, 60, "cpu", 768),
    ("train", f"question {LONG}, {K} thoughts, compiled", "mfu", 1, 40, "cuda", 768),
    ("decode", "one token, batch 1, compiled", "bound", 1, 60, "cuda", 768),
    ("decode", "one token, batch 1, eager", "bound", 1, 60, "cpu", 768),
    ("decode", "one token, batch 1, Llama", "bound", 1, 60, "cpu", 768),
    ("data", "first update of the default run", "seconds", -1, 10, "any", 0),
    ("data", "batches of the default run", "padding", -1, 10, "any", 0))


# ---------------------------------------------------------------- plain references

def naive_think(model, batch, project=torch.nn.Identity()):
    """Prompt and thoughts as inputs x (B, T + k, C) and keep (B, T + k)."""
    x, keep = model.wte(batch.prompt), batch.keep
    for i in range(batch.latent.size(1)):
        thought = project(model(embeds=x, keep=keep)[:, -1:])           # (B, T + i, C) -> (B, 1, C)
        x, keep = torch.cat([x, thought], 1), torch.cat([keep, batch.latent[:, i:i + 1]], 1)
    return x, keep


def naive_read(model, x, keep, language):
    """The states of all layers, (B, T, C) each, of language (B, T) read after x."""
    T = language.size(1)
    x, keep = torch.cat([x, model.wte(language)], 1), F.pad(keep, (0, T), value=True)
    return [h[:, -T:] for h in model(embeds=x, keep=keep, all_states=True)]


def naive_coconut(model, batch):
    """Coconut's loss without a cache."""
    states = naive_read(model, *naive_think(model, batch), batch.language)
    return codi.cross_entropy(model, states[-1], batch)


def naive_codi(model, projection, student, teacher, colon, flags):
    """CODI's loss without a cache; the teacher reads the question for itself."""
    said = naive_read(model, *naive_think(model, student, projection), student.language)
    words = naive_read(model, model.wte(teacher.prompt), teacher.keep, teacher.language)
    rows = torch.arange(len(colon), device=colon.device)
    at_student = torch.stack([h[rows, student.n_language - colon] for h in said])   # (L + 1, B, C)
    at_teacher = torch.stack([h[rows, teacher.n_language - colon] for h in words])
    return (flags.alpha * codi.cross_entropy(model, said[-1], student)
            + flags.beta * codi.distance(at_student, at_teacher, flags.kd, flags.kd_normalize)
            + flags.gamma * codi.cross_entropy(model, words[-1], teacher))


@torch.no_grad()
def naive_decode(model, batch, n):
    """Think and decode n tokens greedily without a cache. Returns lists of ids."""
    x, keep = naive_think(model, batch)
    token, out = batch.language[:, :1], []                              # <eot>
    for _ in range(n):
        x, keep = torch.cat([x, model.wte(token)], 1), F.pad(keep, (0, 1), value=True)
        token = model.head(model(embeds=x, keep=keep)[:, -1:]).argmax(-1)           # (B, 1)
        out.append(token)
    return torch.cat(out, 1).tolist()


@torch.no_grad()
def decode_with(cache, model, batch, n, times=1):
    """The same with a cache of ours. times: rollouts of each question, which share its prefill."""
    x, keep, _ = coconut.think(model, cache, batch.prompt, batch.keep, batch.latent)
    h = coconut.read_on(model, cache, x, keep, batch.language[:, :1])[:, -1]
    if times > 1:
        cache, h = cache.repeat(times), h.repeat_interleave(times, 0)
    return model.decode(cache, h, n, eos=-1)


def sequences(s, B, question, k, n_language=0):
    """B Sequences of random tokens: question <bot>, k thoughts, <eot> and n_language more."""
    ids = np.random.default_rng(0).integers(s.vocab - 4, size=(B, question + n_language)).tolist()
    return [Sequence(row[:question] + [s.tok.bot], k, [s.tok.eot] + row[question:]) for row in ids]


def without_thoughts(sequences, words=()):
    """The same questions, each followed by `words` and its language, without <bot> and <eot>."""
    return [Sequence(q.prompt[:-2], 0, [q.prompt[-2], *words, *q.language[1:]]) for q in sequences]


def batch_of(sequences, s):
    return collate(sequences, 0, s.machine.device)


# ---------------------------------------------------------------- training and memory

class Case(NamedTuple):
    """A loss at one shape: ours, the naive loop's, and the work there is."""
    ours: Callable               # () -> loss
    naive: Callable
    positions: int               # that have to be read once, thoughts among them
    labels: int
    T: float                     # length that attention sees


def coconut_case(s, B, question, k, model=None):
    model = s.model if model is None else model
    batch = batch_of(sequences(s, B, question, k, s.words), s)
    return Case(lambda: coconut.coconut_loss(model, batch)[0], lambda: naive_coconut(model, batch),
                batch.positions, len(batch.labels), batch.positions / B)


def codi_case(s, B, question, k, model=None):
    """The teacher writes s.words tokens before the answer; states are compared in its middle."""
    students = sequences(s, B, question, k, s.answer)
    student = batch_of(students, s)
    teacher = batch_of(without_thoughts(students, [1] * s.words), s)
    colon = torch.full((B,), 1 + s.answer - s.answer // 2, device=s.machine.device)
    args = (s.model if model is None else model, s.projection, student, teacher, colon,
            SimpleNamespace(**codi.DEFAULTS))
    return Case(lambda: codi.codi_loss(*args)[0], lambda: naive_codi(*args),
                teacher.positions + student.positions - B * (question - 1),    # question: once
                len(student.labels) + len(teacher.labels), teacher.positions / B)


def training(section, case, s):
    """The step with 0 to K thoughts, with K the naive loop's too, at two lengths of question."""
    none, most = "0 thoughts", f"{K} thoughts"
    for question in sorted({s.question, LONG}):
        with torch.no_grad():
            small = case(s, 2, question, K)
            agree(f"{section}, question of {question} tokens, loss", small.ours().item(),
                  small.naive().item())
        thoughts = THOUGHTS if question == s.question else (0, K)
        cases = {f"{k} thoughts": case(s, s.batch, question, k) for k in thoughts}
        fns = {name: partial(forward_backward, s, c.ours) for name, c in cases.items()}
        fns[f"{most}, naive"] = partial(forward_backward, s, cases[most].naive)
        if s.compile:
            compiled = case(s, s.batch, question, K, torch.compile(s.model, dynamic=True))
            fns[f"{most}, compiled"] = partial(forward_backward, s, compiled.ours)
            fns[f"{most}, compiled"]()                       # compiles
        runs, median = race(fns, s)
        s.ceiling = max(s.ceiling, matrix_product(s))
        thought = (median[most] - median[none]) / K
        for name in fns:
            c = cases.get(name, cases[most])
            flops = c.positions * s.model.flops_per_token(c.T) + 6 * s.n_embd * s.vocab * c.labels
            further = dict(tokens_per_s=c.positions / median[name],
                           mfu=100 * flops / median[name] / s.ceiling)
            if name == most:
                further |= dict(ms_per_thought=1000 * thought,
                                share_per_thought=100 * thought / median[none],
                                times_naive=median[f"{most}, naive"] / median[most])
            elif name.endswith("compiled"):
                further |= dict(times_eager=median[most] / median[name], graphs=graphs())
            yield row(section, f"question {question}, {name}", runs[name], **further)


def train(s):
    yield from training("train", coconut_case, s)
    flags = SimpleNamespace(optimizer="adamw", lr=1e-9, weight_decay=0.0, beta2=0.95)
    optimizer, = optim.new_optimizers(flags, s.model)
    for p in s.model.parameters():
        p.grad = torch.ones_like(p)
    yield row("train", "AdamW's update, comes to each", timed(optimizer.step, s)[0])
    s.model.zero_grad(set_to_none=True)


def memory(s):
    """Each training setting, and how it grows with thoughts and with the batch."""
    for name, case in (("coconut", coconut_case), ("codi", codi_case)):
        settings = [(k, s.batch) for k in THOUGHTS] + [(K, max(1, s.batch // 2)), (K, 2 * s.batch)]
        found = {(k, B): peak(s, case(s, B, s.question, k).ours) for k, B in settings}
        for (k, B), MiB in found.items():
            further = {}
            if k and (0, B) in found:
                further["MiB_per_thought"] = (MiB - found[0, B]) / k
            yield row("memory", f"{name}, {k} thoughts, batch {B}", [MiB], "MiB",
                      per_question=MiB / B, **further)
        naive = peak(s, case(s, s.batch, s.question, K).naive)
        yield row("memory", f"{name}, {K} thoughts, batch {s.batch}, naive", [naive], "MiB",
                  per_question=naive / s.batch)


# ---------------------------------------------------------------- decoding

def decoding(s):
    """From ids to ids: K thoughts, s.words tokens in words, or neither, and then the answer."""
    methods = {              # script, tokens that are written, whether it thinks
        "coconut": (coconut, s.answer, True), "cot": (coconut, s.words + s.answer, False),
        "no-cot": (coconut, s.answer, False), "codi": (codi, s.answer, True)}
    seen = {name: [(-1, 0.0), (0, 0.0)] for name in methods}                 # (batch, seconds)
    for B in BATCHES:
        asked, line, fns = sequences(s, B, s.question, K), {}, {}
        for name, (script, n, thinks) in methods.items():
            flags = SimpleNamespace(**script.DEFAULTS | dict(max_new=n))
            setup = experiment.Setup(flags, s.machine, s.model, s.tok, s.projection)
            (b0, t0), (b1, t1) = seen[name][-2:]
            line[name] = t1 + (t1 - t0) / (b1 - b0) * (B - b1)      # seconds, if it goes on so
            if line[name] <= s.limit:
                fns[name] = partial(script.think_and_answer, setup,
                                    asked if thinks else without_thoughts(asked))
        runs, median = race(fns, s)
        for name in methods:
            further = dict(note=f"left out: some {line[name]:.0f} s, more than --limit")
            if name in runs:
                seen[name].append((B, median[name]))
                further = dict(questions_per_s=B / median[name])
            yield row("decode", f"{name}, question {s.question}, batch {B}", runs.get(name, []),
                      **further)


def new_cache(s, B, dtype=None):
    size = LONG + 1 + K + 1 + NEW
    return StaticCache(s.model.config, B, size, s.machine.device, dtype or s.machine.dtype)


def caches(s):
    """Thoughts and NEW tokens with the static cache, the growing one, or none (the naive loop)."""
    two = batch_of(sequences(s, 2, LONG, K), s)
    for cache in (new_cache(s, 2, torch.float32), GrowingCache()):
        agree(f"decode, {type(cache).__name__}, tokens", decode_with(cache, s.model, two, 4),
              naive_decode(s.model, two, 4))
    per_question, passes = 0.0, K + NEW
    for B in (1, 64):
        batch = batch_of(sequences(s, B, LONG, K), s)

        @torch.no_grad()
        def ends():                              # the first and the last pass of the naive loop
            for more in (0, passes):
                x = F.pad(s.model.wte(batch.prompt), (0, 0, 0, more))
                keep = F.pad(batch.keep, (0, more), value=True)
                s.model.head(s.model(embeds=x, keep=keep)[:, -1])

        whole = per_question * B <= s.limit
        fns = {"static cache": lambda: decode_with(new_cache(s, B), s.model, batch, NEW),
               "growing cache": lambda: decode_with(GrowingCache(), s.model, batch, NEW),
               "no cache": partial(naive_decode, s.model, batch, NEW) if whole else ends}
        with s.machine.autocast():
            runs, median = race(fns, s)
        further = {name: {} for name in fns}
        if not whole:
            runs["no cache"] = [r * passes / 2 for r in runs["no cache"]]
            further["no cache"]["note"] = f"from the first and the last of its {passes} passes"
        naive = np.median(runs["no cache"])
        median["no cache"], per_question = naive, naive / B
        further["static cache"] = dict(
            times_naive=naive / median["static cache"],
            times_growing=median["growing cache"] / median["static cache"])
        for name in fns:
            yield row("decode", f"question {LONG}, batch {B}, {name}", runs[name],
                      questions_per_s=B / median[name], **further[name])


def tokens(s):
    """One token for each row of a full cache, against reading the weights and the cache: of the
    model, and at batch 1 of a Llama."""
    def of(model, B, eager, compiled):
        forms = {eager: model}
        if s.compile:                            # for this batch only, not for any
            torch._dynamo.reset()
            forms[compiled] = torch.compile(model.forward)
        return one_token(s, model, B, LONG + 1 + K + 1 + NEW, forms)

    s.bandwidth = bandwidth(s)
    for B in BATCHES:
        yield from of(s.model, B, "eager", "compiled")
    llama = Llama(LlamaConfig(**s.llama)).to(s.machine.device)
    yield from of(llama, 1, "Llama", "Llama, compiled")


def rollouts(s):
    """ROLLOUTS continuations of one question: read once for all, or by each for itself."""
    def run(B):
        batch = batch_of(sequences(s, 1, LONG, K) * B, s)
        return decode_with(new_cache(s, B), s.model, batch, NEW, ROLLOUTS // B)

    with s.machine.autocast():
        runs, median = race({"read once": partial(run, 1), "read apart": partial(run, ROLLOUTS)}, s)
    faster = dict(times_apart=median["read apart"] / median["read once"])
    for name, further in (("read once", faster), ("read apart", {})):
        yield row("decode", f"question {LONG}, {ROLLOUTS} rollouts, {name}", runs[name], **further)


# ---------------------------------------------------------------- data

def data(s):
    """The default run's data, and the way from the command to the first update."""
    flags, splits, examples = coconut.parse_flags([])[0], {}, {}
    runs, making = timed(lambda: splits.update(puzzles.chains(s.sizes)), s)
    yield row("data", "chains generated", runs, items_per_s=sum(s.sizes) / making)
    model, tok = weights.new_model(flags, splits["train"], COCONUT_MARK)
    setup = experiment.Setup(flags, s.machine, model, tok)

    def tokenize_all():
        for split, items in splits.items():
            examples[split] = coconut.examples_of(setup, split, items)
    runs, median = timed(tokenize_all, s)
    yield row("data", "chains tokenized", runs, items_per_s=sum(s.sizes) / median)
    real, columns, seconds, training = 0, 0, [], examples["train"]
    for stage in range(flags.stage_max + 1):     # as coconut.train does it, 200 updates of each
        order = batches(coconut.lengths(training, stage, flags), flags.batch_size,
                        runtime.generator(flags.seed, stage, 0))
        for k, chosen in enumerate(order[:200]):
            start, rng = time.perf_counter(), runtime.generator(flags.seed, stage, 0, k)
            drawn = [coconut.training_sequence(training[i], stage, flags, tok, rng)
                     for i in chosen]
            parts = [collate(part, tok.eos) for part in schedule.alike([drawn])]
            seconds.append(time.perf_counter() - start)
            for batch in parts:
                real += batch.positions
                columns += sum(x.numel() for x in (batch.prompt, batch.latent, batch.language))
    yield row("data", "batches of the default run", seconds, padding=100 * (1 - real / columns))
    with tempfile.TemporaryDirectory() as folder:
        paths = {os.path.join(folder, "data", flags.data, f"{split}.json"): items
                 for split, items in splits.items()}
        making += seconds_of(lambda: write_jsons(paths), s)
        runs, median = timed(partial(first_update, folder, s), s)
    yield row("data", "first update of the default run", runs, seconds=median, note="data at hand")
    yield row("data", "first update, data made before", [r + making for r in runs],
              seconds=median + making, note="the line above, generating and writing")


def first_update(folder, s):
    """From the command to the first line in metrics.jsonl, which is written after one update."""
    out = tempfile.mkdtemp(dir=folder)
    command = [sys.executable, coconut.__file__, "--steps-stage-0", "1", "--device",
               str(s.machine.device), "--out", out]
    until_written(command, os.path.join(out, "metrics.jsonl"), folder)


# ---------------------------------------------------------------- main

SECTIONS = dict(train=(train,), codi=(partial(training, "codi", codi_case),),
                decode=(decoding, caches, tokens, rollouts), memory=(memory,), data=(data,))


def parse_flags(argv=None):
    p = argparse.ArgumentParser(usage="python bench.py [flags], --help lists them",
                                description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--preset", choices=PRESETS, default="tiny", help="tiny (default): 2 layers of 128 "
        "channels, questions of 40 tokens; gpt2: GPT-2 small, questions of 128 tokens")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of matrix products; auto: what is fast here")
    add("--only", default=",".join(SECTIONS), help="sections, with commas (default: %(default)s)")
    add("--compile", action="store_true", help="also torch.compile (slow to start on a CPU)")
    add("--repeats", type=runtime.count(1), help="runs of each setting (default 5; gpt2: 3)")
    add("--limit", type=runtime.real(), default=30.0, help="seconds that the runs of one setting "
        "may take together: it has fewer then, but at least one, and batches of which one would "
        "take longer are left out (default 30)")
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
    """All that the sections read: shapes, flags, machine, limits, modules with random weights."""
    typed = {name: value for name, value in vars(flags).items() if value is not None}
    s = SimpleNamespace(**dict(sizes=puzzles.CHAINS_SIZES, bandwidth=0.0) | shape | typed)
    s.machine = runtime.Machine(flags.device, flags.dtype, s.n_embd)
    torch.manual_seed(0)
    config = GPT2Config(s.block_size, s.vocab, s.n_layer, s.n_head, s.n_embd)
    s.model = GPT2(config).to(s.machine.device)
    s.projection = codi.make_projection(SimpleNamespace(**codi.DEFAULTS), s.n_embd)
    s.projection.to(s.machine.device)
    # eos is never written, so all rows are equally long
    s.tok = SimpleNamespace(eos=-1, bot=s.vocab - 3, eot=s.vocab - 2)
    s.ceiling = matrix_product(s)
    return s


def main(argv=None, shape=None):
    """shape: another than that of --preset."""
    flags, start, rows = parse_flags(argv), time.perf_counter(), []
    s = setting(flags, shape or PRESETS[flags.preset])
    for name in flags.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        for part in SECTIONS[name]:
            rows += part(s)
    machine, targets = machine_of(s), list(decided(rows, TARGETS, s))
    print(f"preset {flags.preset}, {s.model.n_params() / 1e6:.1f} M parameters, "
          f"{time.perf_counter() - start:.0f} s; "
          + "; ".join(f"{name} {value}" for name, value in machine.items() if value))
    print("\n".join(markdown(rows)) + "\n")
    for t in targets:
        print(f"{'met' if t['met'] else 'NOT MET'}: {t['target']}; measured {t['measured']:.1f}")
    used = vars(flags) | dict(repeats=s.repeats)
    write_json(flags.out, dict(preset=flags.preset, machine=machine, flags=used, rows=rows,
                               targets=targets))
    return 0


if __name__ == "__main__":
    runtime.run_main(main)
