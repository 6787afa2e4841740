"""Write docs/data.js: the models, words and questions of docs/index.html, the page that thinks.

    python docs/export.py                           # of the default runs, seed 0, in out/
    python docs/export.py CKPT CKPT CKPT CKPT       # best.pt of four runs of coconut.py, any order

The four are Coconut and --method cot, each on chains (or chains-mixed) and on prosqa-mini; for the
last the small model of soft_thinking.py will do (out/soft-prosqa-mini-0/cot.pt). Weights become
float16, which changes logits a little: by how much, and whether an answer changed, is
measured here on the questions that the page ships, and written next to them. So are the accuracy of
the final model at each stage of the curriculum and, of Coconut on prosqa-mini, the values of nodes
that probe.py gives for the checkpoint itself.
"""

import argparse
import base64
import json
import os
import sys
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import coconut
import data_prep
import probe
from common import evaluation, puzzles, rollouts, runtime, staged
from common.experiment import Setup
from common.files import write_text
from common.frontier import name_ids
from common.runtime import UserError, count
from common.text import COCONUT_MARK, SPECIAL, Tokenizer
from gpt2 import GPT2, GPT2Config

RUNS = {                             # what the page calls a model -> the run that makes it
    "chains-coconut": "python coconut.py",
    "chains-cot": "python coconut.py --method cot",
    "prosqa-coconut": "python coconut.py --data prosqa-mini",
    "prosqa-cot": "python coconut.py --data prosqa-mini --method cot",
}
DEFAULTS = ["out/chains-mixed-coconut-0/best.pt", "out/chains-mixed-cot-0/best.pt",
            "out/prosqa-mini-coconut-0/best.pt", "out/prosqa-mini-cot-0/best.pt"]
PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data.js")


class Subject(NamedTuple):
    """One of the four models."""
    path: str
    s: Setup
    stage: int
    items: list              # all test items
    shipped: list            # those that go into the page


# ---------------------------------------------------------------- what is opened

def opened(paths, n):
    """{name in RUNS: Subject} of four checkpoints. Raises UserError if one of RUNS is missing or
    there twice. n: how many test items are shipped."""
    found = {}
    for path in paths:
        s, stage = coconut.trained_model(path, dict(device="cpu", compile=False))
        family = os.path.basename(os.path.normpath(s.flags.data)).split("-")[0]
        name = f"{family}-{s.flags.method}"
        if name not in RUNS:
            raise UserError(f"{path} is of --method {s.flags.method} on {s.flags.data}, which the "
                            "page does not show; it shows " + ", ".join(RUNS) + ".")
        if name in found:
            raise UserError(f"{found[name].path} and {path} are both {name}; give one of them.")
        items = data_prep.load(s.flags.data, need=("test",))["test"]
        found[name] = Subject(path, s, stage, items, items[:n])
    for name, command in RUNS.items():
        if name not in found:
            raise UserError(f"no checkpoint of {name}; train one ({command}) and give its best.pt.")
    return found


# ---------------------------------------------------------------- weights

def packed(model):
    """All weights of a model: [[name, numbers in it], ..], and their float16 as base64."""
    state = {k: v.detach() for k, v in model.named_parameters()}
    halves = [v.cpu().numpy().astype("<f2").ravel() for v in state.values()]
    content = base64.b64encode(np.concatenate(halves).tobytes()).decode()
    return [[name, v.numel()] for name, v in state.items()], content


def unpacked(spec):
    """The model and the tokenizer that the page has, from an entry of its data's `models`."""
    model = GPT2(GPT2Config(**spec["config"]))
    content = np.frombuffer(base64.b64decode(spec["weights"]), "<f2").astype(np.float32)
    shapes, start = dict(model.named_parameters()), 0
    for name, size in spec["tensors"]:
        values = torch.from_numpy(content[start:start + size])
        shapes[name].data = values.reshape(shapes[name].shape).clone()
        start += size
    return model.eval(), Tokenizer.from_state(spec)


def setup_of(spec):
    """The Setup of a model of the page, for the functions of coconut.py and probe.py."""
    model, tok = unpacked(spec)
    flags = SimpleNamespace(**spec["flags"], max_new=None, calculator=False, switch="fixed",
                            plain_stage_0=spec["plain_stage_0"], data=spec["data"])
    return Setup(flags, runtime.Machine("cpu", "float32"), model, tok)


# ---------------------------------------------------------------- what is measured

@torch.no_grad()
def answers(s, stage, items, examples):
    """The texts that a model gives as answers at a stage, its thoughts (n, k, C), and the logits
    (n, V) of the first token that it says."""
    s = evaluation.with_limit(s, examples)
    sequences = coconut.sequences_of(examples, stage, s)
    found = evaluation.answer_all(s, items, sequences, coconut.think_and_answer)
    batch = evaluation.given(s, sequences)
    cache = evaluation.new_cache(s, batch)
    x, keep, _ = coconut.think(s.model, cache, batch.prompt, batch.keep, batch.latent)
    h = coconut.read_on(s.model, cache, x, keep, batch.language)[:, -1]
    return [found.texts[i] for i in range(len(items))], found.thoughts, s.model.head(h)


@torch.no_grad()
def described(name, x):
    """What the page's data says of a model: an entry of `models`."""
    s, flags = x.s, x.s.flags
    tensors, content = packed(s.model)
    config = {k: v for k, v in vars(s.model.config).items() if isinstance(v, int) and k != "switch"}
    example = coconut.examples_of(s, "test", x.shipped[:1])[0]
    kept = dict(method=flags.method, c=flags.c, stage_max=flags.stage_max, seed=flags.seed)
    command = RUNS[name]
    if flags.method == "cot" and flags.stage_max == 0:       # as soft_thinking.train_small has it
        command = "python soft_thinking.py"
    elif flags.data not in ("chains-mixed", "prosqa-mini"):
        command += f" --data {flags.data}"
    spec = dict(command=f"{command} --seed {flags.seed}", updates=s.state["at"]["done"],
                data=flags.data, flags=kept, plain_stage_0=flags.plain_stage_0,
                config=config, **s.tok.state(),
                special=SPECIAL, eos=s.tok.eos, bot=s.tok.bot, eot=s.tok.eot,
                mark=rollouts.prompt_tokens([example.answer], s.tok, COCONUT_MARK),
                tensors=tensors, weights=content)
    spec["config"]["dropout"] = 0.0

    ours = setup_of(spec)
    examples = coconut.examples_of(s, "test", x.shipped)
    before, after = (answers(one, x.stage, x.shipped, examples) for one in (s, ours))
    spec["rounding"] = dict(
        logits=float((before[2] - after[2]).abs().max()), largest=float(before[2].abs().max()),
        answers=sum(a != b for a, b in zip(before[0], after[0])), n=len(x.shipped))

    spec["stages"] = []
    for stage in range(flags.stage_max + 1 if flags.method == "coconut" else 1):
        sequence, = coconut.sequences_of([example], stage, s)
        row = staged.test_row(ours, x.items, stage, coconut.sequences_of, coconut.think_and_answer)
        spec["stages"].append(dict(
            marks=s.tok.bot in sequence.prompt, thoughts=sequence.n_latent, n=row["n"],
            accuracy=row["accuracy"], tokens=row["tokens"]))
        print(f"{name}, stage {stage}: {100 * row['accuracy']:.1f} %, {row['tokens']:.1f} tokens")
    if flags.method == "coconut":
        thoughts = evaluation.answer_all(
            ours, x.items, coconut.sequences_of(coconut.examples_of(s, "test", x.items), x.stage,
                                                ours), coconut.think_and_answer).thoughts
        spec["mean"] = [[round(v, 4) for v in row] for row in thoughts.mean(0).tolist()]
    r = spec["rounding"]
    print(f"{name}: {r['answers']} of {r['n']} answers change by float16; logits by at most "
          f"{r['logits']:.4f} (the largest is {r['largest']:.1f})")
    return spec


@torch.no_grad()
def probed(x):
    """{k: the values of all nodes of each shipped item}, by probe.py, of the checkpoint itself."""
    flags, found = x.s.flags, {}
    examples = coconut.examples_of(x.s, "test", x.shipped)
    for depth in range(1, flags.stage_max + 1):
        k = depth * flags.c
        values = probe.node_values(x.s, x.shipped, examples, k)
        found[k] = [[round(v, 5) for v in row] for row in values]
    return found


# ---------------------------------------------------------------- main

def main(argv=None):
    p = argparse.ArgumentParser(usage="python docs/export.py [CKPT ..] [flags]",
                                description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("checkpoints", metavar="CKPT", nargs="*", default=DEFAULTS,
        help="best.pt of coconut.py (default: those of the default runs, seed 0, in out/)")
    add("--n", type=count(1), default=200, help="test questions of each data set (default 200)")
    add("--out", default=PAGE, help="the file that is written (default: docs/data.js)")
    args = p.parse_args(argv)
    subjects = opened(args.checkpoints, args.n)
    models = {name: described(name, subjects[name]) for name in RUNS}
    graphs = subjects["prosqa-coconut"]
    names = sorted({name for item in graphs.shipped for name in item["idx_to_symbol"]})
    data = dict(
        models=models,
        chains=subjects["chains-coconut"].shipped, prosqa=graphs.shipped,
        people=puzzles.PEOPLE, things=puzzles.THINGS,
        names={name: name_ids(graphs.s.tok, name) for name in names}, probe=probed(graphs))
    lines = [f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'), ensure_ascii=True)}"
             for key, value in data.items()]
    content = "// Written by docs/export.py: do not edit.\nglobalThis.DATA = {\n"
    write_text(args.out, content + ",\n".join(lines) + "\n};\n")
    print(f"wrote {args.out}, {os.path.getsize(args.out) / 1e6:.2f} MB")


if __name__ == "__main__":
    runtime.run_main(main)
