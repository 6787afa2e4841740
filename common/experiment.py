"""An experiment around a method: its settings, how it starts, what its script does.

A setting is one line: (name, default, kind, sentence). `kind` is what turns a typed text into a
value: a function (str, count(1), real()), choices as a tuple or as a dict with their meanings, bool
for --x and --no-x, or SWITCH for a flag without a value. A default of None: not there until typed.
"""

import argparse
import os
from typing import NamedTuple

import torch

from common import battery, evaluation, optim, runtime, text, weights
from common.run import Run
from common.runtime import UserError, count, real
from gpt2 import GPT2, PRESETS

SWITCH = "switch"
MOST = "settings that most runs need"
SHARED = {
    MOST: [
        ("data", None, str, "data set: a name under data/ (embedded ones are made), or a folder"),
        ("init", "scratch", str, f"scratch, {', '.join(PRESETS)}, a pytorch_model.bin, or a "
                                 "checkpoint of this project"),
        ("seed", 0, count(0), "of weights, data order and dropout"),
        ("out", None, str, "folder of checkpoints and metrics (default: out/DATA-METHOD-SEED)"),
        ("resume", None, SWITCH, "continue the run in --out with its own settings"),
        ("eval_only", None, str, "no training: evaluate this checkpoint on --data's test split"),
        ("ask", None, str, "no training: answer this question with --eval-only's model"),
        ("table", None, SWITCH, "train every row for every seed, as far as --out does not hold "
                                "them already, and print the paper's table"),
    ],
    "model, from scratch": [
        ("n_layer", 2, count(1), "layers"),
        ("n_head", 8, count(1), "attention heads"),
        ("n_embd", 128, count(1), "width"),
        ("block_size", 128, count(8), "most positions in a sequence"),
        ("tokenizer", None, (*text.COMPACT, "gpt2"),
         "compact (the default): built from the data, numbers apart from spaces; compact-gpt2: the "
         "same with GPT-2's split; compact-is-a: with ' is a' joined to the word before"),
        ("embd_std", 0.1, real(), "initial spread of the embeddings (GPT-2: 0.02)"),
        ("state_std", 0.1, real(), "initial spread of the last states: gain of ln_f (GPT-2: 1)"),
    ],
    "learning": [
        ("batch_size", 32, count(1), "questions per update, those of all processes together"),
        ("accumulate", 1, count(1), "parts in which a process reads its share, to save memory"),
        ("optimizer", "muon", ("adamw", "muon"),
         "muon: Muon for the blocks' matrices, AdamW for the rest"),
        ("lr", 2e-3, real(), "peak learning rate"),
        ("weight_decay", 0.1, real(), "weight decay, of matrices only"),
        ("beta2", 0.95, real(0, 1), "AdamW's beta 2"),
        ("grad_clip", 1.0, real(), "largest gradient norm (0: no clipping)"),
        ("dropout", 0.0, real(0, 1), "dropout, everywhere that GPT-2 has it"),
    ],
    "evaluation and files": [
        *battery.SETTINGS,
        ("eval_every", 200, count(0), "updates between validations (0: once per epoch)"),
        ("eval_items", 200, count(1), "validation items used"),
        ("max_new", None, count(1), "most tokens decoded per answer (default: 64, or those of the "
                                    "longest steps and answer of the data)"),
        ("save_every", 500, count(1), "updates between checkpoints"),
        ("overwrite", None, SWITCH, "start again in an --out that holds a run"),
        ("seeds", None, count(1), "--table: how many seeds, from --seed up"),
        ("beside", None, str, "--table: table.json files, with commas, whose rows are added"),
    ],
    "machine": [
        ("device", "auto", str, "auto, cpu, cuda, cuda:1, mps"),
        ("dtype", "auto", ("auto", "float32", "bfloat16"),
         "of matrix products; auto: bfloat16 where it is fast, but float32 below width 512"),
        ("compile", False, bool, "torch.compile (slow start, fast run)"),
    ],
}
FROM_SCRATCH = tuple(name for name, *_ in SHARED["model, from scratch"])
NEEDS = {"lora_alpha": "lora_r", "lora_dropout": "lora_r", "stage_mix": "uniform_prob"}
OF_TABLE = ("seeds", "beside")                   # only with --table, and no part of what a run is
FREE = ("resume", "out", "device", "compile", "accumulate", "overwrite", "recipe", "table",
        *OF_TABLE)                               # may differ from those of a run that is resumed


# ---------------------------------------------------------------- settings


def together(own, recipes, shared=SHARED):
    """{heading: settings}, a method's own before the shared ones, and --recipe, which chooses one
    of {name: settings}."""
    recipe = ("recipe", None, tuple(recipes), "a set of defaults (default: that of --data's name)")
    own = own | {MOST: own[MOST] + [recipe]}
    headings = dict.fromkeys([MOST, *own, *shared])
    return {heading: own.get(heading, []) + shared.get(heading, []) for heading in headings}


def defaults(settings, **changed):
    """{name: default} of {heading: settings}, with a method's own defaults for shared ones."""
    return {name: default for lines in settings.values() for name, default, *_ in lines} | changed


def parser(script, doc, settings, values):
    """The argparse parser of {heading: settings}; values: {name: default}, shown by --help. What
    is not typed is None."""
    p = argparse.ArgumentParser(
        usage=f"python {script} [flags], --help lists them", description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="A recipe (--recipe, or --data of that name) changes defaults; each run prints its "
               "settings.")
    for heading, lines in settings.items():
        group = p.add_argument_group(heading)
        for name, _, kind, sentence in lines:
            if isinstance(kind, dict):
                sentence += ": " + "; ".join(f"{key}: {what}" for key, what in kind.items())
            if values[name] is not None and values[name] is not False:
                sentence += f" (default {values[name]})"
            options = dict(help=sentence.replace("%", "%%"))
            if kind is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif kind == SWITCH:
                options |= dict(action="store_true", default=None)
            elif isinstance(kind, (tuple, dict)):
                options["choices"] = tuple(kind)
            else:
                options |= dict(type=kind, metavar=name.upper())
            group.add_argument("--" + name.replace("_", "-"), **options)
    return p


def parse(argv, script, doc, settings, values, recipes, rows, either=()):
    """Settings of a run: defaults < recipe < what was typed.

    rows: (name of the setting that chooses the rows of --table, all that there are, the default).
    either: pairs (steps, epochs) that exclude each other; epochs count unless steps were typed.
    Returns a Namespace of all settings, the typed ones as a dict, and the function that refuses.
    """
    p = parser(script, doc, settings, values)
    typed = {k: v for k, v in vars(p.parse_args(argv)).items() if v is not None}
    recipe = recipes.get(typed.get("recipe", typed.get("data")), {})
    flags = argparse.Namespace(**values | recipe | typed)
    for steps, epochs in either:
        if steps in typed and epochs in typed:
            p.error(f"--{steps} and --{epochs} exclude each other: give one".replace("_", "-"))
        if steps in typed:
            setattr(flags, epochs, None)
    if flags.init == "scratch" and flags.n_embd % flags.n_head:
        p.error(f"--n-embd {flags.n_embd} is not a multiple of --n-head {flags.n_head}: change "
                "one of them")
    refuse_without_effect(flags, typed, p.error)
    if flags.tokenizer is None:
        flags.tokenizer = "compact" if flags.init == "scratch" else "gpt2"
    if flags.ask is not None and not (flags.eval_only and flags.ask.strip()):
        p.error("--ask needs a question and a trained model: add --eval-only CKPT")
    if flags.table and typed.keys() & {"resume", "method", "eval_only", "teacher"}:
        p.error("--table goes on by itself and chooses its rows: leave out --resume, --method, "
                "--teacher and --eval-only")
    battery.check(flags, typed, p.error)
    rows_of, known, default = rows
    for name in typed.keys() & {*OF_TABLE, rows_of}:
        if not flags.table:
            p.error(f"--{name} is a setting of --table: add --table, or leave it out")
    if flags.table:
        names = typed[rows_of].split(",") if rows_of in typed else list(default)
        for name in names:
            if name not in known:
                p.error(f"--{rows_of}: there is no {name!r}; choose among {', '.join(known)}")
        setattr(flags, rows_of, names)
    return flags, typed, p.error


def as_typed(name):
    """A setting's name as it is typed."""
    return "--" + name.replace("_", "-")


def refuse_without_effect(flags, typed, error):
    """Refuse what was typed for a new run but would do nothing next to its other settings."""
    if "resume" in typed and "overwrite" in typed:
        error("--resume goes on with a run and --overwrite starts again: give one")
    if "resume" in typed or "eval_only" in typed:
        return                           # what is typed is then compared with the run's settings
    for name in FROM_SCRATCH:
        if name in typed and flags.init != "scratch":
            error(f"{as_typed(name)} is for a model from scratch, --init {flags.init} has its own: "
                  f"leave out {as_typed(name)}, or give --init scratch")
    for name, other in NEEDS.items():
        if name in typed and not getattr(flags, other):
            error(f"{as_typed(name)} does nothing, as {as_typed(other)} is 0: raise "
                  f"{as_typed(other)}, or leave out {as_typed(name)}")
    if getattr(flags, "lora_r", 0) and flags.optimizer == "muon":
        error("--lora-r needs --optimizer adamw: Muon is for whole matrices")


def out_folder(flags, name):
    """--out, or the folder of a run by its data and name."""
    data = os.path.basename(os.path.normpath(flags.data))
    return flags.out or os.path.join("out", f"{data}-{name}")


# ---------------------------------------------------------------- start


class Setup(NamedTuple):
    """What a run, or the evaluation of a trained model, works with; `s` in the methods."""
    flags: argparse.Namespace
    machine: runtime.Machine
    model: GPT2
    tok: text.Tokenizer
    projection: torch.nn.Module = None   # CODI's, between a state and the thought it becomes
    data: dict = None                    # {split: items}
    state: dict = None                   # the checkpoint of --init or --eval-only; or {}
    resumed: dict = None                 # the checkpoint that --resume goes on from, or None


def open_run(flags, typed, values, free=()):
    """How a run begins: (flags, None) in a fresh folder, or with --resume the settings and the
    checkpoint of the run in it. free: a method's settings that may differ from those of that run.

    Raises UserError if --out holds a run already, has none to resume, or one with other settings
    than those typed."""
    last = os.path.join(flags.out, "last.pt")
    if not typed.get("resume"):
        if os.path.exists(os.path.join(flags.out, "metrics.jsonl")) and not typed.get("overwrite"):
            resume = "--resume continues it, " if os.path.exists(last) else ""
            raise UserError(f"{flags.out} holds a run already; {resume}--overwrite starts again, "
                            "--out names another folder.")
        return flags, None
    if os.path.isdir(flags.out) and not os.path.exists(last):
        raise UserError(f"{flags.out} has no last.pt: the run ended before its first checkpoint; "
                        "start again with --overwrite.")
    state = weights.load_checkpoint(last)
    for name in sorted(typed.keys() - {*FREE, *free}):
        if (values | state["flags"]).get(name) != typed[name]:
            raise UserError(f"{as_typed(name)} {typed[name]} differs from the run in {flags.out} "
                            f"({state['flags'].get(name)}); leave it out, or choose another --out.")
    kept = {k: typed[k] for k in ("device", "compile", "accumulate") if k in typed}
    return argparse.Namespace(**values | state["flags"] | kept | dict(out=flags.out)), state


def start(flags, resumed, load, mark):
    """The Setup of a run that begins or goes on, on the CPU; see place. load: data_prep.load.
    mark: what comes before an answer."""
    with runtime.Machine(flags.device, "float32").rank_0_first():
        data, state = load(flags.data), {}
        torch.manual_seed(flags.seed)
        if resumed:
            model, tok = weights.load_model(resumed, flags.dropout, flags.out)
        elif flags.init == "scratch":
            model, tok = weights.new_model(flags, data["train"], mark)
        else:
            model, tok, state = weights.open_weights("--init", flags.init, flags.dropout)
            given = dict(tokenizer="gpt2") | state.get("flags", {}) | vars(model.config)
            flags = argparse.Namespace(**vars(flags) | {name: given[name] for name in FROM_SCRATCH})
    machine = runtime.Machine(flags.device, flags.dtype, model.config.n_embd)
    flags = argparse.Namespace(**vars(flags) | dict(dtype=machine.dtype_name))    # chosen once
    return Setup(flags, machine, model, tok, None, data, state, resumed)


def place(s):
    """Put model and projection on the machine's device, the model compiled with --compile."""
    s.model.to(s.machine.device)
    if s.projection is not None:
        s.projection.to(s.machine.device)
    return s._replace(model=s.model.compiled()) if s.flags.compile else s


def new_run(s, at, total, bar=None, **more):
    """The Run of a Setup. more: settings to keep in its checkpoints next to its flags."""
    flags = {k: v for k, v in vars(s.flags).items() if v is not None}
    header = dict(config=vars(s.model.config), tokenizer=s.tok.state(), flags=flags | more)
    modules = dict(model=s.model)
    if s.projection is not None:
        modules["projection"] = s.projection
    return Run(s.flags.out, header, modules, at, total, s.machine, s.resumed, bar)


def load_best(s):
    """Give the model of a run the weights of its best.pt."""
    path = os.path.join(s.flags.out, "best.pt")
    s.model.load_state_dict(weights.load_checkpoint(path)["model"])


def describe(s, bar):
    """Print what a run is and where it writes, unless it is one of --table."""
    if bar is not None:
        return
    own = [] if s.projection is None else list(s.projection.parameters())
    if s.state.get("projection") and not own:
        print(f"{s.flags.init}: CODI's projection is left out: there is none here")
    n, learned = sum(p.numel() for p in [*s.model.parameters(), *own] if p.requires_grad), ""
    if n != s.model.n_params():
        learned = f", {n / 1e6:.2f} M learn" + (" with the projection's" if own else "")
    print(f"{s.machine}; {s.model.n_params() / 1e6:.2f} M parameters{learned}, vocabulary "
          f"{s.tok.n_vocab:,}; {len(s.data['train']):,} training items; writing to {s.flags.out}")
    print(" ".join(f"{k}={v}" for k, v in sorted(vars(s.flags).items()) if v is not None))


def open_checkpoint(path, values, changed):
    """The Setup of a trained model, without data, some settings of its run changed."""
    state = weights.load_checkpoint(path)
    model, tok = weights.load_model(state, where=path)
    flags = values | state["flags"] | changed
    if flags.get("max_new") == evaluation.LIMIT and "max_new" not in changed:
        flags["max_new"] = None                  # it was the default, whatever the data
    return setup_of(model, tok, state, flags)


def setup_of(model, tok, state, flags):
    """The Setup of a model that is trained already. flags: a dict."""
    flags = argparse.Namespace(**flags)
    machine = runtime.Machine(flags.device, flags.dtype, model.config.n_embd)
    return Setup(flags, machine, model.eval(), tok, state=state)


def open_any(flag, name, flags, changed):
    """The Setup of whatever file, or released weights, a flag names. `state` is the checkpoint of
    this project, and its settings count, some of them changed; or {}, and `flags` count."""
    model, tok, state = weights.open_weights(flag, name)
    return setup_of(model, tok, state, state["flags"] | changed if state else vars(flags))


def load_first(flags, load):
    """The data of a run, loaded by rank 0 before the others. load: data_prep.load."""
    with runtime.Machine(flags.device, "float32").rank_0_first():
        return load(flags.data)


def examples_of(s, items, where, n_extra, mark):
    """Examples of the items of a file, `where`, each with room for n_extra positions: thoughts and
    their marks."""
    with s.machine.rank_0_first():
        return text.tokenize(items, s.tok, s.model.config.block_size, n_extra, where, mark,
                             room(s))


def room(s):
    """What helps where an item is too long for the model of a Setup."""
    if s.data is None or s.resumed:
        return "the trained model has no more, so remove the item"
    if s.flags.init == "scratch":
        return "raise --block-size or remove the item"
    return f"--init {s.flags.init} has no more, so remove the item or train from scratch"


def test_sets(s, load):
    """{name: items}: the test split of --data, then those of --ood. load: data_prep.load."""
    ood = getattr(s.flags, "ood", None) or "none"
    others = [name for name in ood.split(",") if name not in ("", "none")]
    with s.machine.rank_0_first():
        return {name: load(name, need=("test",))["test"] for name in [s.flags.data, *others]}


def frozen_teacher(s, path):
    """The model of a checkpoint, frozen, as a teacher for s. Raises UserError if its states cannot
    be compared with those of s.model."""
    state = weights.load_checkpoint(path)
    own = vars(s.model.config)
    same = [state["config"].get(name) == own[name] for name in ("n_layer", "n_embd")]
    if state["tokenizer"] != s.tok.state() or not all(same):
        same = "--data, --tokenizer, --n-layer and --n-embd"
        if s.flags.init != "scratch":
            same = "--init"
        raise UserError(f"--teacher {path}: has another tokenizer, depth or width than the "
                        f"student; train both with the same {same}.")
    model, tok = weights.load_model(state, where=path)
    return place(Setup(s.flags, s.machine, model.requires_grad_(False).eval(), tok)).model


# ---------------------------------------------------------------- main


def refuse_training(flags, typed, used):
    """Raises UserError if something was typed with --eval-only that it does not use and that is not
    what the checkpoint was trained with."""
    others = sorted(typed.keys() - used)
    own = weights.load_checkpoint(flags.eval_only)["flags"] if others else {}
    for name in others:
        if name not in own or own[name] != typed[name]:
            raise UserError(f"{as_typed(name)} does nothing with --eval-only, which takes the "
                            f"settings of {flags.eval_only} ({own.get(name)}); leave it out.")


def main(script, flags, typed, run, print_table, evaluate, table, also=()):
    """What a script does: train one run, or with --table all rows, or with --eval-only evaluate a
    checkpoint, some settings of its run changed (also: those of the method). Returns the exit
    code."""
    if flags.eval_only:
        names = ("data", "max_new", "device", "dtype", "compile", *battery.FLAGS, *also)
        refuse_training(flags, typed, {*names, "eval_only", "ask"})
        changed = {name: typed[name] for name in names if name in typed}
        if "data" in typed and "ood" in names:
            changed["ood"] = flags.ood           # other data has other test sets
        evaluate(flags, changed)
        return 0
    rows = table(flags) if flags.table else run(flags, typed)
    if rows is None:
        again = f"continue with: python {script} --resume --out {flags.out}"
        print("stopped; " + ("the same command goes on" if flags.table else again))
        return 130
    if not flags.table:
        print_table(rows, flags)
    return 0
