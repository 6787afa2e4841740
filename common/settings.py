"""Settings: what a script takes from its command line, and what a checkpoint remembers of it.

A setting is one line: (name, default, kind, sentence). `kind` is what turns a typed text into a
value: a function (str, count(1), real()), choices as a tuple or as a dict with their meanings, bool
for --x and --no-x, or SWITCH for a flag without a value. A default of None: not there until typed.
"""

import argparse
import os
import reprlib

from common import battery, text
from common.runtime import UserError, count, real
from gpt2 import PRESETS

SWITCH = "switch"
MOST = "settings that most runs need"
PLAIN = {                                        # of every script that trains
    MOST: [
        ("data", None, str, "data set: a name under data/ (embedded ones are made), or a folder"),
        ("init", "scratch", str, f"scratch, {', '.join(PRESETS)}, smollm2, a checkpoint of this "
                                 "project, or the path of a GPT-2 or a Llama: a pytorch_model.bin, "
                                 "a folder of Hugging Face, a .gguf"),
        ("seed", 0, count(0), "of weights, data order and dropout"),
        ("out", None, str, "folder of checkpoints and metrics (default: out/DATA-METHOD-SEED)"),
        ("resume", None, SWITCH, "continue the run in --out with its own settings"),
        ("eval_only", None, str, "no training: evaluate this checkpoint on --data's test split"),
        ("ask", None, str, "no training: answer this question with --eval-only's model"),
        ("table", None, SWITCH, "train every row for every seed, as far as --out does not hold "
                                "them already, and print the paper's table"),
    ],
    "model, from scratch": [
        ("n_layer", 2, count(1, 1000), "layers"),
        ("n_head", 4, count(1), "attention heads"),
        ("n_embd", 128, count(1, 10 ** 6), "width"),
        ("block_size", 128, count(8), "most positions in a sequence"),
        ("tokenizer", None, (*text.COMPACT, "gpt2"),
         "compact (the default): built from the data, numbers apart from spaces; compact-gpt2: the "
         "same with GPT-2's split; compact-is-a: with ' is a' joined to the word before"),
        ("embd_std", 0.1, real(), "initial spread of the token embeddings (GPT-2: 0.02)"),
        ("pos_std", 0.1, real(), "initial spread of the position embeddings (GPT-2: 0.02)"),
        ("state_std", 0.1, real(), "initial spread of the last states: gain of ln_f (GPT-2: 1)"),
    ],
    "learning": [
        ("batch_size", 32, count(1), "questions per update, those of all processes together"),
        ("accumulate", 1, count(1), "parts in which a process reads its share, to save memory"),
        ("optimizer", "muon", ("adamw", "muon"),
         "muon: Muon for matrices, those of embeddings excepted; AdamW for the rest"),
        ("lr", 2e-3, real(), "peak learning rate"),
        ("weight_decay", 0.1, real(), "weight decay, of matrices only"),
        ("momentum", 0.9, real(0, 1), "Muon's momentum (Jordan: 0.95)"),
        ("beta2", 0.95, real(0, 1), "AdamW's beta 2"),
        ("grad_clip", 1.0, real(), "largest gradient norm (0: no clipping)"),
        ("dropout", 0.0, real(0, 1), "dropout, everywhere that GPT-2 has it"),
    ],
    "evaluation and files": [
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
FILES = "evaluation and files"
SHARED = PLAIN | {FILES: battery.SETTINGS + PLAIN[FILES]}          # where thoughts can be replaced
FROM_SCRATCH = tuple(name for name, *_ in PLAIN["model, from scratch"])
AS_GPT2 = dict(init="gpt2", embd_std=0.02, pos_std=0.02, state_std=1.0)     # how GPT-2 began
NEEDS = {"lora_alpha": "lora_r", "lora_dropout": "lora_r", "stage_mix": "uniform_prob",
         "decoder_layers": "step_weight"}
OF_TABLE = ("seeds", "beside", "methods", "rows")      # only with --table, no part of what a run is
FREE = ("resume", "out", "device", "compile", "accumulate", "overwrite", "table", "ood",
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
        formatter_class=argparse.RawDescriptionHelpFormatter)
    if "recipe" in values:
        p.epilog = ("A recipe (--recipe, or --data of that name) changes defaults; each run prints "
                    "its settings.")
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
    if typed.get("explain") and not flags.eval_only:
        p.error("--explain needs a trained model: add --eval-only CKPT")
    if typed.get("explain") and "thoughts" in typed and flags.ask is None:
        p.error("--explain and --thoughts are two tables: give one of them, or --ask")
    if flags.table and typed.keys() & {"resume", "method", "eval_only", "teacher"}:
        p.error("--table goes on by itself and chooses its rows: leave out --resume, --method, "
                "--teacher and --eval-only")
    if "noise_std" in values:
        battery.check(flags, typed, p.error)
    rows_of, known, default = rows
    for name in typed.keys() & set(OF_TABLE):
        if not flags.table:
            p.error(f"--{name} is a setting of --table: add --table, or leave it out")
    if flags.table:
        names = typed[rows_of].split(",") if rows_of in typed else list(default)
        for name in names:
            if name not in known:
                p.error(f"--{rows_of}: there is no {name!r}; choose among {', '.join(known)}")
        setattr(flags, rows_of, names)
        if "again" in values and "again" not in typed:
            flags.again = False              # the same updates for all rows
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
    if "momentum" in typed and flags.optimizer != "muon":
        error(f"--momentum is Muon's and does nothing with --optimizer {flags.optimizer}: leave it "
              "out, or give --optimizer muon")


def refuse_of_others(flags, typed, error, choice, of):
    """Refuse what was typed for a new run but is for another choice than flags have. of: {setting:
    value of the setting `choice` that it is for}."""
    if flags.table or flags.resume or flags.eval_only:
        return
    for name in sorted(typed.keys() & of.keys()):
        if of[name] != getattr(flags, choice):
            error(f"{as_typed(name)} does nothing with {as_typed(choice)} "
                  f"{getattr(flags, choice)}: leave it out, or give {as_typed(choice)} {of[name]}")


def out_folder(flags, name):
    """--out, or the folder of a run by its data and name."""
    data = os.path.basename(os.path.normpath(flags.data))
    return flags.out or os.path.join("out", f"{data}-{name}")


# ---------------------------------------------------------------- what a checkpoint remembers


def kinds(settings):
    """{name: kind} of {heading: settings}, those of --table left out."""
    lines = [line for lines in settings.values() for line in lines]
    return {name: kind for name, _, kind, _ in lines if name not in OF_TABLE}


def fits(value, kind):
    """Is a value one that a setting of this kind can have?"""
    if kind is bool or kind == SWITCH:
        return type(value) is bool
    if not isinstance(value, (str, int, float)):
        return False
    if isinstance(kind, (tuple, dict)):
        return value in kind
    try:
        return kind(str(value)) == value
    except (ValueError, argparse.ArgumentTypeError):
        return False


def check(values, kinds, where, needed=()):
    """Raises UserError, naming `where`, a file, unless `values` from it is a dict that has the
    names `needed`, and each value fits its kind in {name: kind}; others may be anything."""
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        wrong = [f"{shown(values)} are no named values"]
    else:
        wrong = [f"it has no {name}" for name in needed if name not in values]
        wrong += [f"its {name} is {shown(values[name])}" for name, kind in kinds.items()
                  if name in values and not fits(values[name], kind)]
    if wrong:
        raise UserError(f"{where}: damaged or of another version ({wrong[0]}); copy or download it "
                        "again, or use that version.")


def check_flags(flags, settings, where):
    """check, for the flags in a checkpoint and {heading: settings}. What was not given is not
    there, or in checkpoints of former versions None."""
    optional = [name for lines in settings.values() for name, default, *_ in lines
                if default is None]
    given = {name: value for name, value in flags.items()
             if value is not None or name not in optional}
    check(given, kinds(settings), where)


def shown(value):
    """A value from a file, in some words on one line."""
    return " ".join(reprlib.repr(value).split())
