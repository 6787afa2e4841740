"""Questions, steps, answers: where they come from, how they are checked, what they look like.

One format everywhere, that of the Coconut authors: data/NAME/{train,valid,test}.json is a JSON
list of {"question": str, "steps": [str, ...], "answer": str}. ProsQA items also carry their graph
(idx_to_symbol, edges, root, target, neg_target). Item and line numbers in messages count from 1.

    python data_prep.py chains          word problems of chained operations, the embedded default
    python data_prep.py chains-mixed    with shorter ones among train, the default of codi.py
    python data_prep.py chains-longer   a test set for chains: one operation more
    python data_prep.py chains-larger   a test set for chains: larger counts
    python data_prep.py prosqa          the official files (or --from PATH, or --generate)
    python data_prep.py prosqa-mini     the same puzzle with 11 nodes, for small models
    python data_prep.py prontoqa        true or false in a made-up ontology (or --from FILE)
    python data_prep.py gsm8k           GSM8k-Aug
    python data_prep.py gsm8k-nl        with steps in sentences, from exported files (--from PATH)
    python data_prep.py commonsense     CommonsenseQA, steps in sentences, from exported files
    python data_prep.py svamp           test sets of word problems: svamp, gsm-hard, multiarith
    python data_prep.py stats prosqa    what is in a data set, with its shortcut floors

Here: the format, data sets on disk, how released files are read, the command line. The generators
are in common/puzzles.py, downloads in common/files.py; common/text.py turns items into tensors.
"""

import argparse
import collections.abc
import functools
import hashlib
import json
import math
import os
import re
import statistics
import sys
import zlib
from decimal import Decimal
from pathlib import Path

import numpy as np

from common import text
# write_json: not for this file, for the scripts that import it
from common.files import (FILES, HUGGING_FACE, digest, given_files, released_files, write_json,
                          write_jsons)
from common.graphs import graph_stats
from common.puzzles import (CHAINS_SIZES, EMBEDDED, MINI_SIZES, PRONTOQA_SIZES, PROSQA_SIZES,
                            SPLITS, chains, generate, in_steps, prontoqa_item, prosqa_item)
from common.runtime import UserError, count

SOURCES = (__file__, text.__file__)         # the files on whose code the bytes in caches depend
TEST_SETS = ("chains-longer", "chains-larger", "svamp", "gsm-hard", "multiarith")   # only a test
OOD = {"chains": "chains-longer,chains-larger", "chains-mixed": "chains-longer,chains-larger",
       "gsm8k": "svamp,gsm-hard,multiarith", "gsm8k-nl": "svamp,gsm-hard,multiarith"}


# ---------------------------------------------------------------- the format


def require(ok, where, complaint):
    """Raise UserError about the item at `where`, unless ok."""
    if not ok:
        raise UserError(f"{where}: {complaint}; correct or remove this item")


def check_fields(record, where, *may_be_empty, **kinds):
    """Raise UserError, naming `where` (file and item) and the field, unless the record is an object
    that has fields of these types. kinds: {field: type, or tuple of types}."""
    require(isinstance(record, dict), where, f"is {type(record).__name__}, not an object")
    for field, kind in kinds.items():
        require(field in record, where, f"has no field '{field}'")
        value = record[field]
        wanted = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(k.__name__ for k in wanted)
        require(type(value) in wanted, where,
                f"field '{field}' is {type(value).__name__}, not {names}")
        require(type(value) is not float or math.isfinite(value), where,
                f"field '{field}' is {value}")
        require(type(value) is not str or value.strip() or field in may_be_empty, where,
                f"field '{field}' is empty")


def check_item(item, where):
    """Raise UserError, naming `where` (file and item) and the field, unless the item is well
    formed."""
    check_fields(item, where, question=str, steps=list, answer=str)
    for i, step in enumerate(item["steps"], 1):
        require(isinstance(step, str), where,
                f"field 'steps', step {i}, is {type(step).__name__}, not str")
    if "edges" in item:
        check_graph(item, where)


def check_graph(item, where):
    """The same for the graph of a ProsQA item."""
    names, edges = item.get("idx_to_symbol"), item["edges"]
    require(isinstance(names, list), where, "field 'idx_to_symbol' is missing or not a list")

    def is_node(v):
        return type(v) is int and 0 <= v < len(names)

    def is_edge(e):
        return isinstance(e, list) and len(e) == 2 and all(map(is_node, e))

    require(isinstance(edges, list) and all(map(is_edge, edges)), where,
            "field 'edges' is not a list of node pairs")
    for field in ("root", "target", "neg_target"):
        require(is_node(item.get(field)), where, f"field '{field}' is not the number of a node")


def validate(splits, where, released=False):
    """Check every item of {split: items}, and that no question is in two splits.

    Released files are kept as their authors made them (released=True), so that numbers stay
    comparable: there a repeated question is only counted. -> how many questions repeat.
    """
    seen, repeats = {}, 0
    for split, items in splits.items():
        for i, item in enumerate(items, 1):
            check_item(item, f"{where}/{split}.json, item {i}")
            first, j = seen.setdefault(item["question"], (split, i))
            if first == split:
                continue
            repeats += 1
            if not released:
                raise UserError(f"{where}: the question of {split}.json, item {i}, is also that of "
                                f"{first}.json, item {j}; remove it from one of the two")
    return repeats


# ---------------------------------------------------------------- data sets on disk


def read_split(path):
    """The items of one JSON file, each checked. -> list of dicts; raises UserError."""
    try:
        items = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise UserError(f"{path} is not JSON ({e}); make or download it again") from None
    if not isinstance(items, list):
        raise UserError(f"{path} holds {type(items).__name__}, not a list of items; wrap the items "
                        "in [ ]")
    for i, item in enumerate(items, 1):
        check_item(item, f"{path}, item {i}")
    return items


def write_dataset(folder, splits, released=False):
    """Validate {split: items}, then write folder/{split}.json; nothing is written if anything is
    wrong."""
    repeats = validate(splits, folder, released)
    if repeats:
        print(f"{folder}: {repeats:,} questions stand in more than one split; kept as released")
    write_jsons({Path(folder) / f"{split}.json": items for split, items in splits.items()})
    for split in SPLITS:
        if split not in splits and (Path(folder) / f"{split}.json").exists():
            print(f"{folder}/{split}.json is from an earlier run and was left as it is")
    print(f"{folder}: " + ", ".join(f"{split} {len(items):,}" for split, items in splits.items()))


def load(name, root="data", need=SPLITS):
    """{split: items} of root/NAME, or of a directory given by its path; embedded sets are made on
    the spot. Where the same files were found good before, train is Items that are not read until
    one is looked at. Raises UserError on bad data, or when a split in `need` is missing."""
    folder = Path(root) / name
    if not folder.is_dir() and Path(name).is_dir():
        folder = Path(name)
    if not folder.is_dir() and name in EMBEDDED:
        print(f"{folder} is not there yet: making it, which takes some seconds")
        write_dataset(folder, EMBEDDED[name]())
    paths = {s: folder / f"{s}.json" for s in SPLITS if (folder / f"{s}.json").is_file()}
    missing = [s for s in need if s not in paths]
    if missing or not paths:
        raise UserError(what_is_missing(folder, missing))
    digests, released = {s: digest(path) for s, path in paths.items()}, folder.name in FILES
    splits = {s: read_split(path) for s, path in paths.items() if s != "train"}
    if "train" not in paths:
        validate(splits, folder, released)
    else:       # it may be large: everything is checked once, and again when a file has changed
        train = Items(paths["train"], digests["train"])
        splits = {"train": train, **splits}

        def check():
            validate(splits, folder, released)
            return str(len(train)).encode()
        train.n = int(cached(folder / ".checked", [released, digests], check).tobytes())
    for split in need:
        if not splits[split]:
            raise UserError(f"{folder}/{split}.json has no items; put some there, or make the data "
                            "again")
    return splits


def what_is_missing(folder, missing):
    """The sentence about a folder that lacks the splits `missing` (all, if the list is empty)."""
    name = folder.name
    if name in TEST_SETS and set(missing) - {"test"}:
        return (f"{name} is a test set alone, with no train and no valid split; train on another "
                "data set and evaluate on this one")
    known = [command for command in COMMANDS if command != "stats"]
    make = f"put it there, or name one of {', '.join(known)}"
    if name in known:
        make = f"make it with 'python data_prep.py {name}'"
    files = " and no ".join(f"{split}.json" for split in missing or SPLITS)
    return f"{folder} has no {files}; {make}"


class Items(collections.abc.Sequence):
    """The items of one JSON file, which is read when the first of them is looked at. digest: of the
    file; n: how many there are, where that is known without reading."""

    def __init__(self, path, digest, n=None):
        self.path, self.digest, self.n = path, digest, n

    @functools.cached_property
    def items(self):
        return read_split(self.path)

    def cached(self, kind, settings, make):
        """The bytes that make() makes of these items with these settings; see `cached`."""
        name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        return cached(self.path.with_name(f".{kind}-{name}"), self.digest, make)

    def __len__(self):
        return len(self.items) if self.n is None else self.n

    def __getitem__(self, i):
        return self.items[i]

    def __iter__(self):
        return iter(self.items)

    def __eq__(self, other):
        return list(self) == list(other)


def cached(path, of, make):
    """The bytes that make() gives, as a uint8 array.

    The file `path` keeps them, and the next time a memory map of it gives them at once, to several
    processes together. They are made again if the file is not whole, or was made of something else
    (`of`) or by another version of SOURCES. If no file can be written, there is none.
    """
    key = json.dumps([of, [digest(source) for source in SOURCES]]).encode()

    def head(content):                  # 36 bytes: what it was made of, and whether it is whole
        return hashlib.sha256(key).digest() + zlib.crc32(content).to_bytes(4, "little")

    try:
        old = np.memmap(path, np.uint8, "r").view(np.ndarray)
        if old[:36].tobytes() == head(old[36:]):
            return old[36:]
    except (OSError, ValueError):       # there is none, or an empty one
        pass
    content = make()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(head(content))
            f.write(content)
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        no_cache(path.parent, e.strerror)
    return np.frombuffer(content, np.uint8)


@functools.cache                        # said once is enough
def no_cache(folder, why):
    print(f"{folder}: nothing can be kept there ({why}), so this data is prepared anew at each "
          "start")


# ---------------------------------------------------------------- reading released files


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text ({e}); download it again") from None


def numbered_lines(path, content):
    """[(where, line)], without blank lines. Only newlines end a line: questions may hold other
    characters at which splitlines() breaks."""
    lines = enumerate(content.split("\n"), 1)
    return [(f"{path}, line {i}", line.strip()) for i, line in lines if line.strip()]


def parse_json(content, where):
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where} is not JSON ({e}); download or export it again") from None


def read_records(path):
    """[(where, record)] of a file: lines 'question||cot #### answer' (.txt), or JSON: a list of
    objects, an object of columns, or an object per line. Raises UserError, also when there is
    none."""
    content = read_text(path)
    lines = numbered_lines(path, content)
    if not lines:
        raise UserError(f"{path} is empty; download or export it again")
    if Path(path).suffix == ".txt":
        return [(where, parse_line(line, where)) for where, line in lines]
    first = lines[0][1]
    if len(lines) > 1 and first.startswith("{") and first.endswith("}"):
        return [(where, parse_json(line, where)) for where, line in lines]
    whole = parse_json(content, path)
    if isinstance(whole, dict) and all(isinstance(column, list) for column in whole.values()):
        if len(set(map(len, whole.values()))) > 1:
            raise UserError(f"{path} has columns of different lengths; download or export it again")
        whole = [dict(zip(whole, row)) for row in zip(*whole.values())]
    elif isinstance(whole, dict):
        whole = [whole]
    if not isinstance(whole, list) or not whole:
        raise UserError(f"{path} holds no list of items; download or export it again")
    return [(f"{path}, item {i}", record) for i, record in enumerate(whole, 1)]


def plain(answer):
    """An answer as text. Numbers have no commas; those from JSON are written out, without the noise
    of binary fractions: '1,450,000' -> '1450000', 51.0 -> '51', 2e-06 -> '0.000002',
    35.199999999999996 -> '35.2'."""
    if isinstance(answer, float):
        return format(Decimal(f"{answer:.15g}"), "f")
    answer = str(answer).strip()
    return answer.replace(",", "") if re.fullmatch(r"[-+]?[\d,]*\.?\d+", answer) else answer


def read_problems(path, questions, answer):
    """Items without steps from records: their fields `questions` make up the question, their field
    `answer` is a number."""
    items = []
    for where, record in read_records(path):
        check_fields(record, where, **dict.fromkeys(questions, str), **{answer: (int, float)})
        question = " ".join(record[field].strip() for field in questions)
        items.append({"question": question, "steps": [], "answer": plain(record[answer])})
    return items


TITLES = {"mr", "mrs", "ms", "dr", "st", "prof", "vs", "i.e", "e.g"}
UNITS = {"sq", "ft", "lb", "lbs", "oz", "hr", "hrs", "min", "mins", "approx", "no", "jr", "sr"}


def is_sentence_end(before, stop, after):
    """Does a sentence end at `stop` (some of . ! ?)? before: the words since the last end; after:
    the rest of the line."""
    word = ""                           # the one that a full stop follows
    if before and stop == ".":
        word = before[-1].lstrip("(\"'“‘").lower()
    is_unit = re.split("[^a-z]", word)[-1] in UNITS or re.search(r"\b[a-z]\.[a-z]$", word)
    if word in TITLES or (is_unit and not after[:1].isupper()):
        return False
    if ".." in stop and after[:1].islower():
        return False
    if len(before) == 1 and word.isdecimal():
        return False
    return not re.match(r"[-+*/=<>×÷–]\s|\W*$", after)


def sentences(content):
    """The sentences of a text; joined, they are the text again, except for blanks.

    A sentence ends with its line, and at . ! or ? before a blank, so that 3.5 and $4.50 stay whole.
    It does not end after Mr., i.e. and the like; after a unit or an hour (sq. ft., p.m.) unless a
    capital follows; before an operator (8 ft. * 20 ft.); at 14... seconds; nor after the number
    that opens it, as in a list. Where line breaks were lost, as in GSM8K on one line, a sentence
    without a full stop runs on into the next.
    """
    found = []
    for line in content.split("\n"):
        start = 0
        for stop in re.finditer(r"([.!?]+)[\"'”’)\]*]*\s+", line):
            before = line[start:stop.start()].split()
            if is_sentence_end(before, stop[1], line[stop.end():]):
                found.append(line[start:stop.end()])
                start = stop.end()
        found.append(line[start:])
    return [sentence.strip() for sentence in found if sentence.strip()]


def parse_line(line, where):
    """'question||cot #### answer' -> {"question", "cot", "answer"}. Raises UserError."""
    question, bar, rest = line.partition("||")
    cot, mark, answer = rest.partition("####")
    if not bar or not mark or "||" in rest or "####" in answer:
        raise UserError(f"{where} is not 'question||steps #### answer'; correct or remove the line")
    return {"question": question, "cot": cot, "answer": answer}


EQUATION = r"<<[^<>]*>>"


def cot_item(record, where):
    """{"question", "cot", "answer"} -> item. Steps are the <<equations>> of a CoT that has nothing
    else, or its sentences; it may have none. The answer is text, perhaps after ####, or a number.
    Raises UserError."""
    check_fields(record, where, "cot", question=str, cot=str, answer=(str, int, float))
    cot, answer = record["cot"], record["answer"]
    if re.sub(EQUATION, "", cot).strip():
        steps = sentences(cot)
    else:
        steps = re.findall(EQUATION, cot)
    if isinstance(answer, str):
        answer = answer.rpartition("####")[2]
    item = {"question": record["question"].strip(), "steps": steps, "answer": plain(answer)}
    check_item(item, where)
    return item


def parse_gsm8k(line, where):
    """'question||<<a*b=c>> <<...>> #### answer' -> item. An item may have no steps. Raises
    UserError."""
    record = parse_line(line, where)
    if re.sub(EQUATION, "", record["cot"]).strip():
        raise UserError(f"{where} has text between its <<...>> steps; correct or remove the line")
    return cot_item(record, where)


def read_gsm8k(path):
    """The items of one GSM8k-Aug text file; blank lines are skipped. Raises UserError."""
    return [parse_gsm8k(line, where) for where, line in numbered_lines(path, read_text(path))]


def read_cots(path):
    """The items of one exported file of questions, CoTs and answers. Records whose answer is null,
    which is how GSM8k-Aug-NL marks those that went wrong, are left out."""
    records, answered = read_records(path), []
    for where, record in records:
        if not isinstance(record, dict) or record.get("answer", "") is not None:
            answered.append((where, record))
    if len(answered) < len(records):
        print(f"{path}: {len(records) - len(answered):,} items without an answer are left out")
    return [cot_item(record, where) for where, record in answered]


def hold_out(items, n):
    """(the others, n items): those whose questions have the lowest sha256, whatever their order and
    company. Others with a question of these n are in neither list."""
    by_question = {item["question"]: item for item in items}
    order = sorted(by_question, key=lambda question: hashlib.sha256(question.encode()).digest())
    if len(order) <= n:
        raise UserError(f"{len(order):,} different questions are too few to hold out {n:,} of them "
                        "as valid; lower --valid")
    held = {question: by_question[question] for question in order[:n]}
    return [item for item in items if item["question"] not in held], list(held.values())


def read_prontoqa(path, sizes, sentences_per_step=1):
    """{split: items} of the original generator's output, in its order, as the Coconut authors split
    it."""
    items = []
    try:
        examples = json.loads(Path(path).read_text(encoding="utf-8")).values()
        for i, example in enumerate(examples, 1):
            example = example["test_example"]
            items.append({"question": example["question"] + " " + example["query"],
                          "answer": example["answer"],
                          "steps": in_steps(example["chain_of_thought"], sentences_per_step)})
            check_item(items[-1], f"{path}, example {i}")
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise UserError(f"{path} is not an output of asaparov/prontoqa ({type(e).__name__}: {e}); "
                        "give its 5hop_0shot_random.json") from None
    if len(items) < sum(sizes):
        raise UserError(f"{path} has {len(items):,} examples, fewer than the {sum(sizes):,} of "
                        "--sizes; lower --sizes")
    return {split: items[sum(sizes[:i]):sum(sizes[:i + 1])] for i, split in enumerate(SPLITS)}


# ---------------------------------------------------------------- statistics


def stats(items):
    """{row: number} for any data set: sizes, lengths, how many steps in %, graphs where there are
    some."""
    if not items:
        return {"items": 0}
    words = [len(item["question"].split()) for item in items]
    n_steps = [len(item["steps"]) for item in items]
    rows = {"items": len(items), "question, words": statistics.fmean(words),
            "question, most words": max(words), "steps": statistics.fmean(n_steps)}
    for n in range(min(n_steps), max(n_steps) + 1):
        rows[f"  {n} steps, %"] = 100 * n_steps.count(n) / len(items)
    if all("edges" in item for item in items):
        return rows | graph_stats(items)
    answers = collections.Counter(item["answer"] for item in items)
    numeric = sum(n for answer, n in answers.items() if re.fullmatch(r"-?\d*\.?\d+", answer))
    return rows | {"numeric answers, %": 100 * numeric / len(items),
                   "floor: one answer for all, %": 100 * max(answers.values()) / len(items)}


def floors(items):
    """What guessers get, in %: the rows of stats that begin with "floor"."""
    return {name: value for name, value in stats(items).items() if name.startswith("floor")}


def print_stats(splits):
    """One line per statistic, one column per split."""
    columns = {split: stats(items) for split, items in splits.items()}
    names = dict(max(columns.values(), key=len))        # their order: that of the longest column
    for column in columns.values():
        names |= column

    def show(value):
        if value is None:               # a split may lack some numbers of steps
            return "-"
        return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"

    print(f"{'':26}" + "".join(f"{split:>10}" for split in columns))
    for name in names:
        shown = [show(column.get(name)) for column in columns.values()]
        print(f"{name:26}" + "".join(f"{value:>10}" for value in shown))


# ---------------------------------------------------------------- command line


def run_chains(args):
    splits = chains(args.sizes, args.seed, n_steps=args.n_steps, limit=args.limit,
                    shuffled=args.shuffled, distractors=args.distractors)
    write_dataset(args.out, splits)


def run_embedded(args):
    given = {name: getattr(args, name) for name in ("sizes", "seed") if hasattr(args, name)}
    write_dataset(args.out, EMBEDDED[args.command](**given))


def run_prosqa(args):
    if not args.generate:
        return run_released(args)
    if args.source:
        raise UserError("--generate and --from exclude each other; give one of them")
    write_dataset(args.out, generate(lambda rng: [prosqa_item(rng)], args.sizes, args.seed))


def run_prontoqa(args):
    def draw(rng):
        return [prontoqa_item(rng, args.n_hops, args.sentences_per_step)]
    if args.file:
        splits = read_prontoqa(args.file, args.sizes, args.sentences_per_step)
    else:
        splits = generate(draw, args.sizes, args.seed)
    write_dataset(args.out, splits, released=bool(args.file))


READERS = {     # name -> what reads one of its released files
    "prosqa": read_split,
    "gsm8k": read_gsm8k,
    "svamp": lambda path: read_problems(path, ("Body", "Question"), "Answer"),
    "gsm-hard": lambda path: read_problems(path, ("input",), "target"),
    "multiarith": lambda path: read_problems(path, ("input",), "target"),
}


def run_released(args):
    files = released_files(args.command, args.out, args.source)
    splits = {split: READERS[args.command](path) for split, path in files.items()}
    write_dataset(args.out, splits, released=True)


def run_exported(args):
    repository, test = HUGGING_FACE[args.command]
    if not args.source:
        export = f'load_dataset("{repository}")["train"].to_json("train.jsonl")'
        raise UserError(f"{args.command} is not downloaded: where Hugging Face's datasets package "
                        f"is, run {export}, likewise for its other splits, and pass the file, or "
                        "the folder of them, with --from PATH")
    files = given_files(args.command, args.source)
    splits = {split: read_cots(path) for split, path in files.items()}
    if "train" in splits and "valid" not in splits:
        splits["train"], splits["valid"] = hold_out(splits["train"], args.valid)
        print(f"{args.source} has no valid: {args.valid:,} items of train become it, always the "
              "same ones")
    if "test" not in splits:
        print(f"{args.source} has no test: CODI's authors take {test}; put it beside train and "
              "give the folder")
    in_order = {split: splits[split] for split in SPLITS if split in splits}
    write_dataset(args.out, in_order, released=True)


def run_stats(args):
    print_stats(load(args.name, need=()))


def sizes(typed):
    """argparse type: '17886,300,500' -> (17886, 300, 500)"""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){2}", typed):
        raise argparse.ArgumentTypeError(f"'{typed}' is not three positive numbers "
                                         "TRAIN,VALID,TEST")
    return tuple(map(int, typed.split(",")))


def out(default):
    """The flag --out."""
    return {"--out": dict(default=default, metavar="DIR",
                          help=f"Folder to write to (default {default}).")}


def drawn(default):
    """The flags --seed and --sizes of a generator."""
    return {"--seed": dict(type=int, default=0,
                           help="Seed of the generator; the same seed gives the same bytes."),
            "--sizes": dict(type=sizes, default=default, metavar="TRAIN,VALID,TEST",
                            help="Generated items per split "
                                 f"(default {','.join(map(str, default))}).")}


FROM = {"--from": dict(dest="source", metavar="PATH",
                       help="Take the released files from PATH, a folder or one of them, without "
                            "network.")}
EXPORTED = {"--from": dict(dest="source", metavar="PATH",
                           help="A file, or a folder of train, valid and test, with question, cot "
                                "and answer: .json, .jsonl, or .txt of lines question||cot #### "
                                "answer."),
            "--valid": dict(type=count(1), default=500,
                            help="Items of train that become valid if there is none "
                                 "(default 500).")}
CHAIN = {"--n-steps": dict(type=count(1), default=3, help="Operations in a row (default 3)."),
         "--limit": dict(type=count(4), default=20,
                         help="Every count stays below this (default 20)."),
         "--shuffled": dict(action="store_true",
                            help="Facts in any order instead of the order of the steps."),
         "--distractors": dict(type=count(0), default=0,
                               help="Facts that the answer does not need.")}
GENERATE = {"--generate": dict(action="store_true", help="Generate with the paper's Algorithm 1.")}
PRONTOQA = {"--from": dict(dest="file", metavar="FILE",
                           help="Convert FILE, 5hop_0shot_random.json of asaparov/prontoqa."),
            "--n-hops": dict(type=count(1), default=5,
                             help="Hops from the entity to the property (default 5)."),
            "--sentences-per-step": dict(type=count(1), default=1,
                                         help="Sentences in a step (default 1; the Coconut "
                                              "authors: 2).")}
COMMANDS = {    # name -> (function, what it does, flags)
    "chains": (run_chains, "Word problems of chained doublings and differences, generated.",
               CHAIN | drawn(CHAINS_SIZES) | out("data/chains")),
    "chains-mixed": (run_embedded, "The same with 1, 2 and 3 operations in train.",
                     drawn(CHAINS_SIZES) | out("data/chains-mixed")),
    "chains-longer": (run_embedded, "A test set for models of chains: one operation more.",
                      out("data/chains-longer")),
    "chains-larger": (run_embedded, "A test set for models of chains: counts up to 39.",
                      out("data/chains-larger")),
    "prosqa": (run_prosqa, "ProsQA: the official files by download, --from PATH, or new ones by "
                           "--generate.",
               FROM | GENERATE | drawn(PROSQA_SIZES) | out("data/prosqa")),
    "prosqa-mini": (run_embedded, "ProsQA with about 11 nodes and exactly 3 steps, generated.",
                    drawn(MINI_SIZES) | out("data/prosqa-mini")),
    "prontoqa": (run_prontoqa, "ProntoQA: generated, or --from the original generator's output.",
                 PRONTOQA | drawn(PRONTOQA_SIZES) | out("data/prontoqa")),
    "gsm8k": (run_released, "GSM8k-Aug by download or --from PATH.", FROM | out("data/gsm8k")),
    "gsm8k-nl": (run_exported, "GSM8k-Aug-NL, with steps in sentences, --from exported files.",
                 EXPORTED | out("data/gsm8k-nl")),
    "commonsense": (run_exported, "CommonsenseQA with reasoning by GPT-4o mini, --from exported "
                                  "files.", EXPORTED | out("data/commonsense")),
    "svamp": (run_released, "SVAMP, a test set, by download or --from PATH.",
              FROM | out("data/svamp")),
    "gsm-hard": (run_released, "GSM-Hard, a test set, by download or --from PATH.",
                 FROM | out("data/gsm-hard")),
    "multiarith": (run_released, "MultiArith, a test set, by download or --from PATH.",
                   FROM | out("data/multiarith")),
    "stats": (run_stats, "Print a table of what is in a data set.",
              {"name": dict(metavar="NAME", help="Name under data/, or the path of a folder.")}),
}


def main(argv=None):
    """Run one subcommand. -> exit status: 0; 2 after one sentence on stderr, never a traceback;
    130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="data_prep.py", description="Get, make and look at data sets.",
        epilog="'python data_prep.py COMMAND --help' lists the flags of a command.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, what, flags) in COMMANDS.items():
        sub = commands.add_parser(name, help=what, description=what)
        for flag, options in flags.items():
            sub.add_argument(flag, **options)
    args = parser.parse_args(argv)
    run, _, _ = COMMANDS[args.command]
    try:
        run(args)
    except UserError as e:
        print(f"data_prep.py: {e}", file=sys.stderr)
        return 2
    except (OSError, UnicodeEncodeError) as e:  # disk full, no permission; half a surrogate pair
        print(f"data_prep.py: {e}; nothing half-written was left", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data_prep.py: stopped; the same command goes on with a download where it was",
              file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
