"""An experiment around a method: how it starts, what its script does."""

import argparse
import math
import os
from typing import NamedTuple

import torch

from common import battery, evaluation, formats, runtime, schedule, settings, text, weights
from common.run import Run
from common.runtime import UserError, count, real
from common.settings import FREE, FROM_SCRATCH, MOST, as_typed
from gpt2 import LanguageModel


# ---------------------------------------------------------------- the checkpoint of a run

# What it holds next to weights and settings, name -> kind: where the run is, and the rows of its
# table so far. A run in stages (coconut.py) and one of two sides (codi.py) have more of each.
FINITE = real(-math.inf, math.inf)       # a loss of reinforcement may be negative
PLACE = dict(done=count(0), best=real(-1, 1), loss=FINITE, logged=count(0), finite=FINITE,
             seconds=real(), backs=count(0, schedule.MOST_AGAIN), more=count(0), valid=real(0, 1))
MAY_HAVE = dict(distance_item=real(), distance_across=real(), cut=real(0, 1))      # or None
STAGE_PLACE = PLACE | dict(part=count(0), parts=count(1), update=count(0))
ROW = dict(accuracy=real(0, 1), n=count(1), tokens=real(), seconds=real(), seconds_batch_1=real())
STAGE_ROW = ROW | dict(stage=count(0), n_latent=count(0), step_tokens=real())
WHO = ("student", "teacher", "cot", "no-cot", "before", "after")
SIDE_ROW = ROW | dict(who=WHO, data=str, rationale=real())
ROLLOUTS_ROW = SIDE_ROW | dict(soft_entropy=real(), one_hot=real(0, 1))


THE_OTHER = "give it to that one, coconut.py, codi.py, simcot.py or soft_grpo.py"


def own_checkpoint(path, own):
    """A checkpoint of a run of this script, whose settings are `own`. Raises UserError if another
    script trained it, or if what it says of its run cannot be."""
    state = weights.load_checkpoint(path)
    for name, default, *_ in own[MOST]:
        if default is not None and name not in state["flags"]:
            raise UserError(f"{path}: another script trained it, as it has no {as_typed(name)}; "
                            f"{THE_OTHER}.")
    known = settings.kinds(own)
    further = sorted(state["flags"].keys() - known.keys())
    if "method" in known and further and state["flags"].get("method") not in known["method"]:
        raise UserError(f"{path}: another script trained it, as it has {as_typed(further[0])}; "
                        f"{THE_OTHER}.")
    settings.check_flags(state["flags"], own, path)
    settings.check(state, {}, path, ("at",))
    at = state["at"]
    if "stage_max" in state["flags"]:
        settings.check(at, STAGE_PLACE, path, ("done", "best", "part", "update", "rows"))
        whole = isinstance(at["rows"], list) and len(at["rows"]) == at["part"]
        row = STAGE_ROW
    else:
        settings.check(at, PLACE, path, ("done", "best", "rows"))
        whole = at["rows"] is None or (isinstance(at["rows"], list) and at["rows"])
        row = ROLLOUTS_ROW if "draws" in state["flags"] else SIDE_ROW
    if not whole:
        raise UserError(f"{path}: damaged (the rows of its table are "
                        f"{settings.shown(at['rows'])}); {formats.AGAIN}.")
    for one in at["rows"] or ():
        settings.check(one, row, path, row)
        known = {name: value for name, value in one.items() if value is not None}
        settings.check(known, MAY_HAVE, path)
        columns = one.get("columns", {})
        settings.check(columns, {}, path)
        settings.check(columns, dict.fromkeys(columns, real(0, 1)), path)
    return state


# ---------------------------------------------------------------- start


class Setup(NamedTuple):
    """What a run, or the evaluation of a trained model, works with; `s` in the methods."""
    flags: argparse.Namespace
    machine: runtime.Machine
    model: LanguageModel
    tok: text.Tokenizer
    projection: torch.nn.Module = None   # CODI's, between a state and the thought it becomes
    data: dict = None                    # {split: items}
    state: dict = None                   # the checkpoint of --init or --eval-only; or {}
    resumed: dict = None                 # the checkpoint that --resume goes on from, or None
    decoder: torch.nn.Module = None      # SIM-CoT's, which writes the steps that thoughts hold

    def modules(self):
        """{name: module} of all that is trained and saved."""
        own = dict(model=self.model, projection=self.projection, decoder=self.decoder)
        return {name: module for name, module in own.items() if module is not None}


def open_run(flags, typed, own, values):
    """How a run begins: (flags, None) in a fresh folder, or with --resume the settings and the
    checkpoint of the run in it. own: the script's settings, {heading: settings}; values: their
    defaults.

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
    state = own_checkpoint(last, own)
    settings.check(state, dict(metrics_bytes=count(0, 10 ** 15)), last, ("metrics_bytes",))
    for name in sorted(typed.keys() - set(FREE)):
        if (values | state["flags"]).get(name) != typed[name]:
            raise UserError(f"{as_typed(name)} {typed[name]} differs from the run in {flags.out} "
                            f"({state['flags'].get(name)}); leave it out, or choose another --out.")
    kept = {k: typed[k] for k in ("device", "compile", "accumulate", "ood") if k in typed}
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
            given = dict(tokenizer=None if tok.released else "gpt2")
            given |= state.get("flags", {}) | vars(model.config)
            brought = {name: given[name] for name in FROM_SCRATCH if name in given}
            flags = argparse.Namespace(**vars(flags) | brought)
    machine = runtime.Machine(flags.device, flags.dtype, model.config.n_embd)
    flags = argparse.Namespace(**vars(flags) | dict(dtype=machine.dtype_name))    # chosen once
    return Setup(flags, machine, model, tok, None, data, state, resumed)


def place(s):
    """Put all modules on the machine's device, the model compiled with --compile."""
    for module in s.modules().values():
        module.to(s.machine.device)
    return s._replace(model=s.model.compiled()) if s.flags.compile else s


def new_run(s, at, total, bar=None, **more):
    """The Run of a Setup. more: settings to keep in its checkpoints next to its flags."""
    flags = {k: v for k, v in vars(s.flags).items() if v is not None}
    header = dict(config=vars(s.model.config), tokenizer=s.tok.state(), flags=flags | more)
    return Run(s.flags.out, header, s.modules(), at, total, s.machine, s.resumed, bar)


def load_best(s):
    """Give the modules of a run the weights of its best.pt."""
    path = os.path.join(s.flags.out, "best.pt")
    state = weights.load_checkpoint(path)
    for name, module in s.modules().items():
        weights.load_into(module, state[name], path)


def describe(s, bar):
    """Print what a run is and where it writes, unless it is one of --table."""
    if bar is not None:
        return
    others = [name for name, module in s.modules().items()
              if name != "model" and list(module.parameters())]
    if s.state.get("projection") and "projection" not in others:
        print(f"{s.flags.init}: CODI's projection is left out: there is none here")
    parameters = torch.nn.ModuleList(s.modules().values()).parameters()      # each once
    n, learned = sum(p.numel() for p in parameters if p.requires_grad), ""
    if n != s.model.n_params():
        learned = f", {n / 1e6:.2f} M learn" + "".join(f" with the {name}'s" for name in others)
    print(f"{s.machine}; {s.model.n_params() / 1e6:.2f} M parameters{learned}, vocabulary "
          f"{s.tok.n_vocab:,}; {len(s.data['train']):,} training items; writing to {s.flags.out}")
    print(" ".join(f"{k}={v}" for k, v in sorted(vars(s.flags).items()) if v is not None))


def open_checkpoint(path, own, values, changed):
    """The Setup of a trained model, without data, some settings of its run changed. own, values: as
    for open_run."""
    state = own_checkpoint(path, own)
    model, tok = weights.load_model(state, where=path)
    flags = values | state["flags"] | changed
    if flags.get("max_new") == evaluation.LIMIT and "max_new" not in changed:
        flags["max_new"] = None                  # it was the default, whatever the data
    return setup_of(model, tok, state, flags)


def setup_of(model, tok, state, flags, rows=1024):
    """The Setup of a model that is trained already. flags: a dict. rows: how many are computed at a
    time, for --dtype auto."""
    flags = argparse.Namespace(**flags)
    machine = runtime.Machine(flags.device, flags.dtype, model.config.n_embd, rows)
    return Setup(flags, machine, model.eval(), tok, state=state)


def open_any(flag, name, flags, changed, rows=1024):
    """The Setup of whatever file, or released weights, a flag names. `state` is the checkpoint of
    this project, and its settings count, some of them changed; or {}, and `flags` count. rows: as
    for setup_of."""
    model, tok, state = weights.open_weights(flag, name)
    if state:
        settings.check(state["flags"], {}, name, ("method", "data"))
    flags = state["flags"] | changed if state else vars(flags)
    return setup_of(model, tok, state, flags, rows)


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
    model, tok = weights.load_model(state, where=path)
    same = [getattr(model.config, name) == getattr(s.model.config, name)
            for name in ("n_layer", "n_embd")]
    if tok.state() != s.tok.state() or not all(same):
        same = "--data, --tokenizer, --n-layer and --n-embd"
        if s.flags.init != "scratch":
            same = "--init"
        raise UserError(f"--teacher {path}: has another tokenizer, depth or width than the "
                        f"student; train both with the same {same}.")
    return place(Setup(s.flags, s.machine, model.requires_grad_(False).eval(), tok)).model


# ---------------------------------------------------------------- main


def refuse_unused(flags, typed, used):
    """Raises UserError if something was typed with --eval-only, or with --ask, that it does not use
    and that is not what the checkpoint was trained with."""
    others = sorted(typed.keys() - used)
    own = weights.load_checkpoint(flags.eval_only)["flags"] if others else {}
    mode = "--eval-only" if flags.ask is None else "--ask"
    for name in others:
        if name not in own or own[name] != typed[name]:
            raise UserError(f"{as_typed(name)} does nothing with {mode}, which takes the settings "
                            f"of {flags.eval_only} ({own.get(name)}); leave it out.")


def main(script, flags, typed, run, print_table, evaluate, table, also=()):
    """What a script does: train one run, or with --table all rows, or with --eval-only evaluate a
    checkpoint, some settings of its run changed (also: those of the method). Returns the exit
    code."""
    if flags.eval_only:
        names = ("data", "max_new", "device", "dtype", "compile", *battery.FLAGS, *also)
        unused = () if flags.ask is None else ("data", "ood")
        refuse_unused(flags, typed, {*names, "eval_only", "ask"} - {*unused})
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
