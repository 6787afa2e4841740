"""Questions, steps, answers: where they come from, how they are checked, what they look like.

One format everywhere, that of the Coconut authors: data/NAME/{train,valid,test}.json is a JSON
list of {"question": str, "steps": [str, ...], "answer": str}. ProsQA items also carry their graph
(idx_to_symbol, edges, root, target, neg_target). Item and line numbers in messages count from 1.

    python data_prep.py chains             word problems of chained operations, the embedded default
    python data_prep.py chains-mixed       the same with shorter ones among train, the default of codi.py
    python data_prep.py chains-longer      a test set for it: one operation more
    python data_prep.py chains-larger      a test set for it: larger counts
    python data_prep.py prosqa             the official files (or --from PATH, or --generate)
    python data_prep.py prosqa-mini        the same puzzle with 11 nodes, for small models
    python data_prep.py prontoqa           true or false in a made-up ontology, generated or --from FILE
    python data_prep.py gsm8k              GSM8k-Aug
    python data_prep.py gsm8k-nl           the same with steps in sentences, from exported files (--from PATH)
    python data_prep.py commonsense        CommonsenseQA with reasoning in sentences, from exported files
    python data_prep.py svamp              test sets of word problems: svamp, gsm-hard, multiarith
    python data_prep.py stats prosqa       what is in a data set, beside its shortcut floors
"""
import argparse
import array
import ast
import bisect
import collections.abc
import functools
import hashlib
import itertools
import http.client
import json
import math
import os
import random
import re
import statistics
import sys
import urllib.error
import urllib.request
import zlib
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

SPLITS = ("train", "valid", "test")
PROSQA_SIZES = (17886, 300, 500)    # Coconut, table 2
PRONTOQA_SIZES = (9000, 200, 800)
MINI_SIZES = (40000, 300, 500)
CHAINS_SIZES = (50000, 500, 1000)
TEST_SETS = ("chains-longer", "chains-larger", "svamp", "gsm-hard", "multiarith")    # a test split alone


class DataError(ValueError):
    """One sentence: what is wrong, where, and what to do about it."""


# ---------------------------------------------------------------- the format

def require(ok, where, complaint):
    if not ok:
        raise DataError(f"{where}: {complaint}; correct or remove this item")


def check_fields(record, where, *may_be_empty, **kinds):
    """Raise DataError, naming `where` (file and item) and the field, unless the record is an object that has
    fields of these types: kinds {field: type, or types}."""
    require(isinstance(record, dict), where, f"is {type(record).__name__}, not an object")
    for field, kind in kinds.items():
        require(field in record, where, f"has no field '{field}'")
        value, wanted = record[field], kind if isinstance(kind, tuple) else (kind,)
        require(type(value) in wanted, where,
                f"field '{field}' is {type(value).__name__}, not {' or '.join(k.__name__ for k in wanted)}")
        require(type(value) is not float or math.isfinite(value), where, f"field '{field}' is {value}")
        require(type(value) is not str or value.strip() or field in may_be_empty, where, f"field '{field}' is empty")


def check_item(item, where):
    """Raise DataError, naming `where` (file and item) and the field, unless `item` is well formed."""
    check_fields(item, where, question=str, steps=list, answer=str)
    for i, step in enumerate(item["steps"], 1):
        require(isinstance(step, str), where, f"field 'steps', step {i}, is {type(step).__name__}, not str")
    if "edges" in item:
        names, edges = item.get("idx_to_symbol"), item["edges"]
        require(isinstance(names, list), where, "field 'idx_to_symbol' is missing or not a list")
        node = lambda v: type(v) is int and 0 <= v < len(names)
        require(isinstance(edges, list) and all(isinstance(e, list) and len(e) == 2 and all(map(node, e)) for e in edges),
                where, "field 'edges' is not a list of node pairs")
        for field in ("root", "target", "neg_target"):
            require(node(item.get(field)), where, f"field '{field}' is not the number of a node")


def read_split(path):
    """The items of one JSON file, each checked. -> list of dicts; raises DataError."""
    try:
        items = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; check the path") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise DataError(f"{path} is not JSON ({e}); make or download it again") from None
    if not isinstance(items, list):
        raise DataError(f"{path} holds {type(items).__name__}, not a list of items; wrap the items in [ ]")
    for i, item in enumerate(items, 1):
        check_item(item, f"{path}, item {i}")
    return items


def validate(splits, where, released=False):
    """Check every item of {split: items} and that no question stands in two splits.

    Released files are kept as their authors made them (released=True), so that numbers stay
    comparable: there a repeated question is only counted. -> how many questions repeat.
    """
    seen, repeats = {}, 0
    for split, items in splits.items():
        for i, item in enumerate(items, 1):
            check_item(item, f"{where}/{split}.json, item {i}")
            first, j = seen.setdefault(item["question"], (split, i))
            if first != split:
                repeats += 1
                if not released:
                    raise DataError(f"{where}: the question of {split}.json, item {i}, is also that of "
                                    f"{first}.json, item {j}; remove it from one of the two")
    return repeats


def write_jsons(files):
    """Write {path: obj}, a list with one item per line, so that a crash leaves each file old or new,
    never half: the slow and fallible work happens on temporary files, before the first rename."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in map(Path, files)}
    try:
        for path, obj in zip(temporary, files.values()):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary[path], "w", encoding="utf-8") as f:
                f.write("[\n" + ",\n".join(json.dumps(x, ensure_ascii=False) for x in obj) + "\n]\n"
                        if isinstance(obj, list) else json.dumps(obj) + "\n")
                f.flush()
                os.fsync(f.fileno())
        for path in temporary:
            os.replace(temporary[path], path)
    finally:
        for path in temporary:
            if temporary[path].exists():
                temporary[path].unlink()


def write_json(path, obj):
    write_jsons({path: obj})


def write_dataset(folder, splits, released=False):
    """Validate {split: items}, then write folder/{split}.json; nothing is written if anything is wrong."""
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
    the spot. Raises DataError on bad data, or when a split in `need` is missing. Where the same files were
    found good before, train is Items that are not read until one is looked at."""
    folder = Path(root) / name
    if not folder.is_dir() and Path(name).is_dir():
        folder = Path(name)
    if not folder.is_dir() and name in EMBEDDED:
        print(f"{folder} is not there yet: making it, which takes some seconds")
        write_dataset(folder, EMBEDDED[name]())
    present = [s for s in SPLITS if (folder / f"{s}.json").is_file()]
    missing = [s for s in need if s not in present]
    if missing or not present:
        base = folder.name
        if base in TEST_SETS and set(missing) - {"test"}:
            raise DataError(f"{base} is a test set alone, with no train and no valid split; train on another data set "
                            f"and evaluate on this one")
        known = [command for command in COMMANDS if command != "stats"]
        make = (f"make it with 'python data_prep.py {base}'" if base in known else
                f"put it there, or name one of {', '.join(known)}")
        raise DataError(f"{folder} has no {' and no '.join(f'{s}.json' for s in missing or SPLITS)}; {make}")
    paths = {s: folder / f"{s}.json" for s in present}
    digests, released = {s: digest(path) for s, path in paths.items()}, folder.name in FILES
    splits = {s: Items(path, digests[s]) if s == "train" else read_split(path) for s, path in paths.items()}

    def check():
        validate(splits, folder, released)
        return str(len(splits["train"])).encode()
    if "train" in splits:       # it may be large: all is looked at once, and again when a file has changed
        splits["train"].n = int(cached(folder / ".checked", [released, digests], check).tobytes())
    else:
        validate(splits, folder, released)
    for split in need:
        if not splits[split]:
            raise DataError(f"{folder}/{split}.json has no items; put some there, or make the data again")
    return splits


class Items(collections.abc.Sequence):
    """The items of one JSON file, which is read when the first of them is looked at. digest: of the file; n: how
    many there are, where that is known without reading."""

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
    """The bytes that make() gives, as a uint8 array. The file `path` keeps them, and the next time a memory map of it
    gives them at once, to several processes together. They are made again where the file is not whole, or was
    made of something else (`of`) or by another version of this script. Where no file can be written, none is."""
    key = hashlib.sha256(json.dumps([of, digest(__file__)]).encode()).digest()
    head = lambda content: key + zlib.crc32(content).to_bytes(4, "little")
    try:
        kept = np.memmap(path, np.uint8, "r").view(np.ndarray)
        if kept[:36].tobytes() == head(kept[36:]):
            return kept[36:]
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
    print(f"{folder}: nothing can be kept there ({why}), so this data is prepared anew at each start")


# ---------------------------------------------------------------- released files

GSM8K_AUG = "da03/Internalize_CoT_Step_by_Step/e06a32ee5e4cd117171daeb4755d2a97ece62761/data/gsm8k"
PROSQA = "https://raw.githubusercontent.com/facebookresearch/coconut/27273cb8cca4bb763c041a63b036d0c3b7cbbb48/data"
SVAMP = "https://raw.githubusercontent.com/arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53"
PAL = "https://raw.githubusercontent.com/reasoning-machines/pal/f81ca2a9777f002f98a6b4d0f10b61bd5c8feb02/datasets"
RELEASED = {    # name -> split -> (url, bytes, sha256); None: pinned by the first download
    "prosqa": {
        "train": (f"{PROSQA}/prosqa_train.json", None, None),
        "valid": (f"{PROSQA}/prosqa_valid.json", 518208,
                  "c74e0de24f1e90ec48b1a993e6458a7be4caeef3928f5104e3c2e45d689a5249"),
        "test": (f"{PROSQA}/prosqa_test.json", 856611,
                 "82ddc0afe6ee30eb31bb16fa208e293e55278a20fa987098d48519cae7e12680")},
    "gsm8k": {      # train is stored by Git LFS: the raw address would give a pointer, not the file
        "train": (f"https://media.githubusercontent.com/media/{GSM8K_AUG}/train.txt", 87805358,
                  "0a3909a9e7d8d2f7ad6b8c7b5608aa744988d835f9bf874d4cf06ca77df6bf8c"),
        "valid": (f"https://raw.githubusercontent.com/{GSM8K_AUG}/valid.txt", 143419,
                  "04f9bddfe8ac4846571b1e2b612b289c95770b5012fdb34cc36a597b041afb87"),
        "test": (f"https://raw.githubusercontent.com/{GSM8K_AUG}/test.txt", 388019,
                 "e464efa2713fbcf423bdbfb482c543a6a086188c3d97c294b1d19a70c2a515e8")},
    "svamp": {
        "test": (f"{SVAMP}/SVAMP.json", 339970,
                 "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e")},
    "gsm-hard": {
        "test": (f"{PAL}/gsmhardv2.jsonl", 1138151,
                 "2032b0188a49ac0ec38cbe1e695e7d62d6dddc44bbb64f920728aca710e9ddef")},
    "multiarith": {
        "test": (f"{PAL}/mawpsmultiarith.jsonl", 109522,
                 "12e8295088364af21fb6591dbdbd1dda452aade57227f63d725677471ded2951")},
}
HUGGING_FACE = {    # name -> repository, what CODI's authors test on; given by --from
    "gsm8k-nl": ("zen-E/GSM8k-Aug-NL", "that of GSM8K, test.txt of GSM8k-Aug"),
    "commonsense": ("zen-E/CommonsenseQA-GPT4omini", "its validation split")}
exported = lambda *stems: " ".join(f"{stem}.{suffix}" for stem in stems for suffix in ("json", "jsonl", "txt"))
FILES = {           # name -> split -> the file names that --from looks for in a folder
    "prosqa": {split: f"prosqa_{split}.json {split}.json" for split in SPLITS},
    "gsm8k": {split: f"gsm8k_aug_{split}.txt {split}.txt" for split in SPLITS},
    "svamp": {"test": "SVAMP.json"},
    "gsm-hard": {"test": "gsmhardv2.jsonl"},
    "multiarith": {"test": "mawpsmultiarith.jsonl multiarith.jsonl"},
    "gsm8k-nl": {"train": exported("train"), "valid": exported("valid", "validation"), "test": exported("test")},
    "commonsense": {"train": exported("train"), "valid": exported("valid"), "test": exported("test", "validation")},
}


def digest(path):
    """sha256 of a file, as 64 hex digits."""
    sha = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def fetch(url, part, size):
    """Bring `part` up to the whole of `url`, going on from the bytes it already has (HTTP Range)."""
    have = part.stat().st_size if part.exists() else 0
    if size and have == size:
        return
    headers = {"User-Agent": "data_prep.py", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    by_hand = "download it elsewhere and pass it with --from PATH"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as reply:
            if reply.status != 206:     # the server ignored Range: it sends everything again
                have = 0
            length = reply.headers.get("Content-Length")
            total = have + int(length) if length else size
            with open(part, "ab" if have else "wb") as f, \
                    tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem) as bar:
                while block := reply.read(1 << 16):
                    f.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as e:
        if e.code == 416 and have:      # nothing beyond what we have: complete, or of another file
            if e.headers.get("Content-Range") == f"bytes */{have}":
                return
            part.unlink()
            return fetch(url, part, size)
        raise DataError(f"the server answered {e.code} for {url}; {by_hand}") from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as e:
        raise DataError(f"cannot reach {url} ({getattr(e, 'reason', e) or type(e).__name__}); try again later, "
                        f"which resumes, or {by_hand}") from None
    if total and part.stat().st_size < total:
        raise DataError(f"{url} broke off after {part.stat().st_size:,} of {total:,} bytes; "
                        f"run the same command to resume")


def download(url, path, size=None, sha256=None):
    """Download `url` to `path`, resuming path.part; what stands at `path` has the right hash.

    sha256=None pins: the first download's hash goes into SHA256SUMS.json beside it, and every
    later one is checked against that. Raises DataError (no network, wrong size or hash).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pin_file = path.parent / "SHA256SUMS.json"
    try:
        pins = json.loads(pin_file.read_text()) if pin_file.exists() else {}
    except ValueError:
        raise DataError(f"{pin_file} is not JSON; delete it to pin the hashes anew") from None
    wanted = sha256 or pins.get(path.name)
    if path.exists():
        if digest(path) == wanted:
            return path
        path.unlink()
    part = path.with_name(path.name + ".part")
    fetch(url, part, size)
    got_size, got = part.stat().st_size, digest(part)
    if (size and got_size != size) or (wanted and got != wanted):
        part.unlink()
        raise DataError(f"{url} gave {got_size:,} bytes with sha256 {got}, expected {size or 'any number of'} bytes "
                        f"with {wanted or 'any'}; it was deleted: run the command again, and if this repeats, "
                        f"the file has changed at its source")
    if wanted is None:
        write_json(pin_file, {**pins, path.name: got})
        print(f"{path.name}: no published hash, so its sha256 {got} is now pinned in {pin_file}")
    os.replace(part, path)
    return path


def given_files(name, source):
    """{split: path} of what --from gives: a folder, in which a split may be missing, or one file. A file is the split
    that its name says; under any other name the data set's first (train; test where there is no other)."""
    source, splits = Path(source), FILES[name]
    if source.is_file():
        return {next((split for split in splits if source.name in splits[split].split()), next(iter(splits))): source}
    found = {}
    for split, files in splits.items():
        paths = [source / file for file in files.split() if (source / file).is_file()]
        found |= {split: path for path in paths[:1]}
    if not found:
        raise DataError(f"--from {source} has none of the {name} files ({', '.join(splits.values()).replace(' ', ', ')}); "
                        f"give a file, or the folder that holds them")
    return found


def released_files(name, out, source=None):
    """{split: path} of the released files: given by --from, or downloaded to OUT/raw."""
    if source is None:
        return {split: download(url, Path(out) / "raw" / url.rsplit("/", 1)[1], size, sha)
                for split, (url, size, sha) in RELEASED[name].items()}
    found = given_files(name, source)
    for split, files in FILES[name].items():
        if split not in found:
            print(f"{source} has no {files.replace(' ', ' and no ')}: {split} is left out")
    return found


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8 text ({e}); download it again") from None


def numbered_lines(path, text):
    """[(where, line)], blank lines skipped. Only newlines end a line: questions may hold other characters that
    splitlines() breaks at."""
    return [(f"{path}, line {i}", line.strip()) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def read_records(path):
    """[(where, record)] of a file: lines 'question||cot #### answer' (.txt), or JSON: a list of objects, an object of
    columns, or an object per line. Raises DataError, also when there is none."""
    def parse(text, where):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{where} is not JSON ({e}); download or export it again") from None

    text = read_text(path)
    lines = numbered_lines(path, text)
    if not lines:
        raise DataError(f"{path} is empty; download or export it again")
    if Path(path).suffix == ".txt":
        return [(where, parse_line(line, where)) for where, line in lines]
    if len(lines) > 1 and lines[0][1].startswith("{") and lines[0][1].endswith("}"):
        return [(where, parse(line, where)) for where, line in lines]
    whole = parse(text, path)
    if isinstance(whole, dict) and all(isinstance(column, list) for column in whole.values()):
        if len(set(map(len, whole.values()))) > 1:
            raise DataError(f"{path} has columns of different lengths; download or export it again")
        whole = [dict(zip(whole, row)) for row in zip(*whole.values())]
    whole = [whole] if isinstance(whole, dict) else whole
    if not isinstance(whole, list) or not whole:
        raise DataError(f"{path} holds no list of items; download or export it again")
    return [(f"{path}, item {i}", record) for i, record in enumerate(whole, 1)]


def plain(answer):
    """An answer as text. Numbers have no commas; those from JSON are written out, without the noise of binary
    fractions: '1,450,000' -> '1450000', 51.0 -> '51', 2e-06 -> '0.000002', 35.199999999999996 -> '35.2'."""
    if isinstance(answer, float):
        return format(Decimal(f"{answer:.15g}"), "f")
    answer = str(answer).strip()
    return answer.replace(",", "") if re.fullmatch(r"[-+]?[\d,]*\.?\d+", answer) else answer


def read_problems(path, questions, answer):
    """Items without steps from records: their fields `questions` make up the question, `answer` is a number."""
    items = []
    for where, record in read_records(path):
        check_fields(record, where, **dict.fromkeys(questions, str), **{answer: (int, float)})
        items.append({"question": " ".join(record[field].strip() for field in questions), "steps": [],
                      "answer": plain(record[answer])})
    return items


TITLES = {"mr", "mrs", "ms", "dr", "st", "prof", "vs", "i.e", "e.g"}
UNITS = {"sq", "ft", "lb", "lbs", "oz", "hr", "hrs", "min", "mins", "approx", "no", "jr", "sr"}


def sentences(text):
    """The sentences of a text; joined, they are the text again, up to blanks.

    A sentence ends with its line, and at . ! or ? before a blank, so that 3.5 and $4.50 stay whole. It does not end
    after Mr., i.e. and the like; after a unit or an hour (sq. ft., p.m.) unless a capital follows; before an operator
    (8 ft. * 20 ft.); at 14... seconds; nor after the number that opens it, as in a list. Where line breaks were
    lost, as in GSM8K on one line, a sentence without a full stop runs on into the next.
    """
    found = []
    for line in text.split("\n"):
        start = 0
        for end in re.finditer(r"([.!?]+)[\"'”’)\]*]*\s+", line):
            before, after = line[start:end.start()].split(), line[end.end():]
            word = before[-1].lstrip("(\"'“‘").lower() if before and end[1] == "." else ""
            unit = re.split("[^a-z]", word)[-1] in UNITS or re.search(r"\b[a-z]\.[a-z]$", word)
            if not (word in TITLES or (unit and not after[:1].isupper()) or (".." in end[1] and after[:1].islower())
                    or (len(before) == 1 and word.isdecimal()) or re.match(r"[-+*/=<>×÷–]\s|\W*$", after)):
                found.append(line[start:end.end()])
                start = end.end()
        found.append(line[start:])
    return [sentence.strip() for sentence in found if sentence.strip()]


def parse_line(line, where):
    """'question||cot #### answer' -> {"question", "cot", "answer"}. Raises DataError."""
    question, bar, rest = line.partition("||")
    cot, mark, answer = rest.partition("####")
    if not bar or not mark or "||" in rest or "####" in answer:
        raise DataError(f"{where} is not 'question||steps #### answer'; correct or remove the line")
    return {"question": question, "cot": cot, "answer": answer}


EQUATION = r"<<[^<>]*>>"


def cot_item(record, where):
    """{"question", "cot", "answer"} -> item. Steps are the <<equations>> of a CoT that has nothing else, or its
    sentences; it may have none. The answer is text, perhaps after ####, or a number. Raises DataError."""
    check_fields(record, where, "cot", question=str, cot=str, answer=(str, int, float))
    cot, answer = record["cot"], record["answer"]
    steps = sentences(cot) if re.sub(EQUATION, "", cot).strip() else re.findall(EQUATION, cot)
    item = {"question": record["question"].strip(), "steps": steps,
            "answer": plain(answer.rpartition("####")[2] if isinstance(answer, str) else answer)}
    check_item(item, where)
    return item


def parse_gsm8k(line, where):
    """'question||<<a*b=c>> <<...>> #### answer' -> item. An item may have no steps. Raises DataError."""
    record = parse_line(line, where)
    if re.sub(EQUATION, "", record["cot"]).strip():
        raise DataError(f"{where} has text between its <<...>> steps; correct or remove the line")
    return cot_item(record, where)


def read_gsm8k(path):
    """The items of one GSM8k-Aug text file; blank lines are skipped. Raises DataError."""
    return [parse_gsm8k(line, where) for where, line in numbered_lines(path, read_text(path))]


def read_cots(path):
    """The items of one exported file of questions, CoTs and answers. Records whose answer is null, which is how
    GSM8k-Aug-NL marks those that went wrong, are left out."""
    records = read_records(path)
    kept = [r for r in records if not isinstance(r[1], dict) or r[1].get("answer", "") is not None]
    if len(kept) < len(records):
        print(f"{path}: {len(records) - len(kept):,} items without an answer are left out")
    return [cot_item(record, where) for where, record in kept]


def hold_out(items, n):
    """(the others, n items): those whose questions have the lowest sha256, whatever their order and company. A
    question that stands in `items` twice leaves the others altogether."""
    by_question = {item["question"]: item for item in items}
    order = sorted(by_question, key=lambda question: hashlib.sha256(question.encode()).digest())
    if len(order) <= n:
        raise DataError(f"{len(order):,} different questions are too few to hold out {n:,} of them as valid; lower --valid")
    held = {question: by_question[question] for question in order[:n]}
    return [item for item in items if item["question"] not in held], list(held.values())


# ---------------------------------------------------------------- ProsQA: Algorithm 1 of Coconut's appendix

ENTITIES = "Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom Wren".split()
CONCEPTS = """bompus boompus brimpus chorpus dumpus felpus fompus gerpus gorpus grimpus gwompus hilpus
    impus jelpus jompus kerpus lempus lorpus numpus quimpus rempus rompus rorpus scrompus shumpus
    sterpus storpus terpus timpus tumpus vumpus worpus wumpus yerpus yimpus yumpus zhorpus zumpus""".split()


def poisson(rng, mean):
    """Knuth's method: how many uniform factors keep the product above exp(-mean)."""
    k, product, floor = 0, rng.random(), math.exp(-mean)
    while product > floor:
        k, product = k + 1, product * rng.random()
    return k


def prosqa_graph(rng, n_draws):
    """Grow a directed acyclic graph from the roots 0 and 1 (Algorithm 1), then drop isolated nodes.

    A node's label is the set of roots above it as bits: 1 = only root 0, 2 = only root 1, 3 = both,
    0 = neither. -> labels [n], edges [(parent, child)]; n <= n_draws.
    """
    labels, groups, edges, depth = [1, 2], [[], [0], [1], []], [], [0, 0]
    for idx in range(2, n_draws):
        n_in, r = poisson(rng, 1.5), rng.random()
        candidates = list(groups[1] if r <= 0.34 else groups[2] if r <= 0.80 else range(idx))
        parents = []
        for _ in range(min(n_in, len(candidates))):
            # deep nodes are preferred: long chains
            reach = list(itertools.accumulate(1.5 * depth[c] + 1 for c in candidates))
            parents.append(candidates.pop(bisect.bisect(reach, rng.random() * reach[-1], 0, len(reach) - 1)))
        label = 0
        for p in parents:
            label |= labels[p]
        labels.append(label)
        groups[label].append(idx)
        depth.append(1 + min(depth[p] for p in parents) if parents else 0)
        edges += [(p, idx) for p in parents]
    kept = sorted({0, 1}.union(*edges))     # a node without edges would have no sentence
    if len(kept) < n_draws:
        new = {old: i for i, old in enumerate(kept)}
        labels, edges = [labels[old] for old in kept], [(new[a], new[b]) for a, b in edges]
    return labels, edges


def adjacency(edges, reverse=False):
    lists = collections.defaultdict(list)
    for a, b in edges:
        lists[b if reverse else a].append(a if reverse else b)
    return lists


def shortest_paths(children, start):
    """Breadth first. -> {node: distance}, {node: number of shortest paths}, over what `start` reaches."""
    distance, paths, queue = {start: 0}, {start: 1}, [start]
    for a in queue:
        for b in children[a]:
            if b not in distance:
                distance[b], paths[b] = distance[a] + 1, 0
                queue.append(b)
            if distance[b] == distance[a] + 1:
                paths[b] += paths[a]
    return distance, paths


def prosqa_puzzle(rng, n_draws=28, names=(len(ENTITIES), len(CONCEPTS)), min_steps=3, max_steps=6, alike=False):
    """A graph and a question about it. -> edges, root, target, neg_target.

    The paper leaves open, and we fitted to the 800 official valid and test items:
    - number of nodes: 28 draws, and a node left without any edge disappears (mean 22.8, sd 2.0);
    - group thresholds: the paper prints r <= .35 and r <= .70, with groups[0] among the candidates,
      which gives 2.8 parentless nodes beyond the roots; the files have 0.56, and root 1 is asked in
      64 %. r <= .34, r <= .80 and no groups[0] gives both;
    - depth_to_root is the shortest distance to a node without parents;
    - the target is the deepest leaf that has only one of the roots above it (random among equals);
      its root is the one asked. neg_target is any leaf with only the other root above it;
    - 3 to 6 steps: no official item has fewer or more, so other graphs are drawn again.
    names: how many entities and concepts can be named. alike: neg_target is as deep below its root as
    target below its own, so that the two look alike and no shortcut tells them apart.
    """
    while True:
        labels, edges = prosqa_graph(rng, n_draws)
        inner, concepts = {a for a, b in edges}, len({b for a, b in edges})
        leaves = [[v for v, l in enumerate(labels) if l == 1 << root and v not in inner] for root in (0, 1)]
        if not all(leaves) or len(labels) - concepts > names[0] or concepts > names[1]:
            continue
        distance = [{0: 0}, {1: 0}]
        for a, b in edges:              # shortest_paths, faster: the edges into a node come before those out of it
            for found in distance:
                if a in found:
                    found[b] = min(found.get(b, n_draws), found[a] + 1)
        deepest = [max(distance[root][v] for v in leaves[root]) for root in (0, 1)]
        n_steps = max(deepest)
        if min_steps <= n_steps <= max_steps and (not alike or min(deepest) == n_steps):
            break
    root, target = rng.choice([(r, v) for r in (0, 1) for v in leaves[r] if distance[r][v] == n_steps])
    neg_target = rng.choice([v for v in leaves[1 - root] if not alike or distance[1 - root][v] == n_steps])
    return edges, root, target, neg_target


def prosqa_item(rng, puzzle=None, entities=ENTITIES, concepts=CONCEPTS):
    """One ProsQA item in the authors' surface form; same rng state, same item. The steps are one of
    the shortest paths, each equally likely."""
    edges, root, target, neg_target = puzzle or prosqa_puzzle(rng)
    children, parents = adjacency(edges), adjacency(edges, reverse=True)
    distance, paths = shortest_paths(children, root)
    path = [target]
    while path[0] != root:      # walk back, weighted by path counts: uniform over the shortest paths
        above = [p for p in parents[path[0]] if distance.get(p) == distance[path[0]] - 1]
        path.insert(0, rng.choices(above, [paths[p] for p in above])[0])

    entity, concept = iter(rng.sample(entities, len(entities))), iter(rng.sample(concepts, len(concepts)))
    name = [next(concept if v in parents else entity) for v in range(1 + max(map(max, edges)))]
    say = lambda a, b: f"{'Every ' if a in parents else ''}{name[a]} is a {name[b]}."
    facts = [say(a, b) for a, b in edges]
    rng.shuffle(facts)
    first, second = rng.sample([target, neg_target], 2)
    return {"question": " ".join(facts) + f" Is {name[root]} a {name[first]} or {name[second]}?",
            "answer": say(root, target), "steps": [say(a, b) for a, b in zip(path, path[1:])],
            "idx_to_symbol": name, "edges": [list(e) for e in edges],
            "root": root, "target": target, "neg_target": neg_target}


def generate(draw, sizes, seed, train=None):
    """{split: items} of the splits whose size is not 0, from lists of items that draw(rng), or for the training
    split train(rng), gives, no question twice. Each split has its own random stream, so another size of train
    leaves valid and test as they are."""
    splits, seen = {}, set()
    for split, size in reversed([(split, size) for split, size in zip(SPLITS, sizes) if size]):
        of_split = train if train and split == "train" else draw
        rng, items, wasted = random.Random(f"{seed} {split}"), [], 0
        with tqdm(total=size, desc=split, disable=None, leave=False) as bar:
            while len(items) < size:
                for item in of_split(rng):
                    if item["question"] in seen:
                        wasted += 1
                        continue
                    seen.add(item["question"])
                    items.append(item)
                    bar.update()
                if wasted > 100 * size:
                    raise DataError(f"only {len(seen):,} distinct questions found; ask for fewer with --sizes")
        splits[split] = items[:size]
    return {split: splits[split] for split in SPLITS if split in splits}


def has_detour(edges, root, target):
    """Can one step off the shortest ways from root to target and still get there, by a longer one?"""
    children, left = adjacency(edges), shortest_paths(adjacency(edges, reverse=True), target)[0]
    nodes = {root}
    for steps in range(left[root], 0, -1):
        below = {w for v in nodes for w in children[v] if w in left}
        if any(left[w] >= steps for w in below):
            return True
        nodes = {w for w in below if left[w] == steps - 1}
    return False


def prosqa_mini(sizes=MINI_SIZES, seed=0):
    """{split: items}: Algorithm 1 small enough for tiny models: about 11 nodes, exactly 3 steps, few names,
    both options alike. In train each graph is told eight times, in other names and another order: such
    graphs are rare among those drawn. Every question of valid and test has a detour (a third of train
    do), where a model that walks on from fact to fact, without looking ahead, loses its way; so has the
    wrong option from its own root, and each graph is asked about both, so that a detour tells nothing."""
    draw = lambda rng: prosqa_puzzle(rng, 12, (4, 12), 3, 3, alike=True)
    tell = lambda rng, puzzle: prosqa_item(rng, puzzle, ENTITIES[:4], CONCEPTS[:12])

    def train(rng):
        puzzle = draw(rng)
        return [tell(rng, puzzle) for _ in range(8)]

    def evaluate(rng):
        while True:
            edges, root, target, other = draw(rng)
            if has_detour(edges, root, target) and has_detour(edges, 1 - root, other):
                return [tell(rng, (edges, root, target, other)), tell(rng, (edges, 1 - root, other, target))]
    return generate(evaluate, sizes, seed, train)


# ---------------------------------------------------------------- ProntoQA (Saparov and He 2022, arXiv 2210.01240)

PROPERTIES = [family.split() for family in (
    "red blue green brown", "large small", "wooden metallic liquid", "opaque transparent", "happy shy nervous calm", "bright dull",
    "sweet sour bitter spicy", "hot cold mild", "kind mean angry", "loud muffled", "slow fast", "rainy sunny windy", "old new",
    "round flat", "rich poor", "wet dry")]


def prontoqa_item(rng, n_hops=5, sentences_per_step=1):
    """A true/false question on a made-up ontology, in the style of asaparov/prontoqa.

    "Every wumpus is a dumpus. Lempuses are not shy. .. Fae is a wumpus. True or false: Fae is shy."
    A chain of concepts leads from the entity in n_hops steps to the property that is asked for. Along
    it every concept has a second parent, which leads nowhere; all have properties of their own; and a
    concept that the entity is not has the opposite of the property asked for. Sentences stand in
    random order. steps: premise, rule, conclusion, rule, .. one sentence each, 2 * n_hops + 1 in all
    (the Coconut authors make six steps of them, two sentences each: sentences_per_step=2).
    """
    if 2 * (n_hops + 3) > len(CONCEPTS):
        raise DataError(f"--n-hops {n_hops} needs more than the {len(CONCEPTS)} concept names there are; at most "
                        f"{len(CONCEPTS) // 2 - 3}")
    below, above = rng.randrange(2), rng.randrange(3)        # concepts that the chain has beside those used
    names = iter(rng.sample(CONCEPTS, len(CONCEPTS)))
    chain = [next(names) for _ in range(below + n_hops + above)]
    families = iter(rng.sample(PROPERTIES, len(PROPERTIES)))
    entity, start, last = rng.choice(ENTITIES), chain[below], chain[below + n_hops - 1]

    def rule(concept, what, kind):               # three ways to say it, as in the original
        article = ("an " if what[0] in "aeiou" else "a ") if kind else ""
        if rng.random() < 0.5:
            return f"{rng.choice(('Every', 'Each'))} {concept} is {article}{what}."
        return f"{concept.capitalize()}es are {what}{'es' if kind else ''}."

    def said(concept, what, positive=True):
        return rule(concept, what if positive else "not " + what, False)

    rules, facts = {}, []                        # rules: those that the proof needs, by their concept
    positive, asked = rng.random() < 2 / 3, rng.choice(next(families))
    for i, concept in enumerate(chain):
        if i + 1 < len(chain):
            rules[concept] = rule(concept, chain[i + 1], True)
            parent = next(names)
            facts += [rules[concept], rule(concept, parent, True)]
            facts += [said(parent, rng.choice(family), rng.random() < 2 / 3) for family in [next(families, None)] if family]
        if concept != last:
            facts += [said(concept, rng.choice(family), rng.random() < 2 / 3) for family in [next(families, None)] if family]
    rules[last] = said(last, asked, positive)
    facts += [rules[last], said(next(names), asked, not positive)]
    rng.shuffle(facts)

    is_a = lambda concept: f"{entity} is a{'n' if concept[0] in 'aeiou' else ''} {concept}."
    steps = [is_a(start)]
    for i, concept in enumerate(chain[below:below + n_hops]):
        final = f"{entity} is {'' if positive else 'not '}{asked}."
        steps += [rules[concept], final if concept == last else is_a(chain[below + i + 1])]
    answer = rng.random() < 0.5
    query = f"{entity} is {'' if positive == answer else 'not '}{asked}."
    return {"question": " ".join(facts) + f" {is_a(start)} True or false: {query}", "answer": str(answer),
            "steps": [" ".join(steps[i:i + sentences_per_step]) for i in range(0, len(steps), sentences_per_step)]}


def read_prontoqa(path, sizes, sentences_per_step=1):
    """{split: items} of the original generator's output, in its order, as the Coconut authors split it."""
    try:
        items = []
        for i, example in enumerate(json.loads(Path(path).read_text(encoding="utf-8")).values(), 1):
            example = example["test_example"]
            thought = example["chain_of_thought"]
            items.append({"question": example["question"] + " " + example["query"], "answer": example["answer"], "steps": [
                " ".join(thought[j:j + sentences_per_step]) for j in range(0, len(thought), sentences_per_step)]})
            check_item(items[-1], f"{path}, example {i}")
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise DataError(f"{path} is not an output of asaparov/prontoqa ({type(e).__name__}: {e}); give its "
                        f"5hop_0shot_random.json") from None
    if len(items) < sum(sizes):
        raise DataError(f"{path} has {len(items):,} examples, fewer than the {sum(sizes):,} of --sizes; lower --sizes")
    return {split: items[sum(sizes[:i]):sum(sizes[:i + 1])] for i, split in enumerate(SPLITS)}


# ---------------------------------------------------------------- chains: the embedded default

PEOPLE = "Ann Ben Cal Dan Eve Fay Gus Hal Ian Joy Kim Leo Max Ned Oli Pam Ray Sue Tom Zoe".split()
THINGS = "apples books cards coins eggs pens shells stamps".split()


def chain_item(rng, n_steps=3, limit=20, shuffled=False, distractors=0):
    """A word problem of n_steps operations in a row, each on the result of the one before.

    "Ned has 8 pens. Ben has what separates twice Ned from 9. Ian has what separates twice Ben from
    30. .. How many pens does Ray have?", steps like <<2*8-9=7>>, <<30-2*7=16>>. Each operation is
    v -> |2v - n|: doubling and folding, so that three of them in a row are no simple function of the
    question's numbers. With "more" and "fewer" instead the answer is one signed sum, which a model
    can learn to give at once, without any steps.
    All counts stay below `limit`, n below 2 * limit. distractors: facts about further people whom no
    other fact needs; they stand anywhere after the first. shuffled: any order.
    """
    if n_steps + distractors >= len(PEOPLE):
        raise DataError(f"--n-steps {n_steps} and --distractors {distractors} need more than the {len(PEOPLE)} names "
                        f"there are; lower one of them")
    people, thing = rng.sample(PEOPLE, n_steps + 1 + distractors), rng.choice(THINGS)
    counts = [rng.randrange(1, limit)]
    facts, steps = [f"{people[0]} has {counts[0]} {thing}."], []
    for i in range(1, len(people)):
        before = i - 1 if i <= n_steps else rng.randrange(n_steps)
        v, n = counts[before], rng.choice([n for n in range(2 * limit) if abs(2 * counts[before] - n) < limit])
        counts.append(abs(2 * v - n))
        fact = f"{people[i]} has what separates twice {people[before]} from {n}."
        if i <= n_steps:
            facts.append(fact)
            steps.append(f"<<2*{v}-{n}={counts[i]}>>" if 2 * v >= n else f"<<{n}-2*{v}={counts[i]}>>")
        else:
            facts.insert(rng.randrange(1, len(facts) + 1), fact)
    if shuffled:
        rng.shuffle(facts)
    return {"question": " ".join(facts) + f" How many {thing} does {people[n_steps]} have?",
            "steps": steps, "answer": str(counts[n_steps])}


def chains(sizes=CHAINS_SIZES, seed=0, **shape):
    return generate(lambda rng: [chain_item(rng, **shape)], sizes, seed)


def chains_mixed(sizes=CHAINS_SIZES, seed=0):
    """{split: items}: valid and test of chains; train has chains of 1, 2 and 3 operations, as 1 : 1 : 4. From three
    alone a model that must find out by itself what to think of (CODI) may learn nothing: the first result is of no
    use to it before it can use two. With many of two, one that has learned those well is slow to go on to three.
    The papers' own data is mixed too."""
    train = lambda rng: [chain_item(rng, n_steps=rng.choices((1, 2, 3), (1, 1, 4))[0])]
    return generate(lambda rng: [chain_item(rng)], sizes, seed, train)


def chains_longer():
    """{"test": items}: one operation more than in the default chains."""
    return generate(lambda rng: [chain_item(rng, n_steps=4)], (0, 0, CHAINS_SIZES[2]), 0)


def chains_larger():
    """{"test": items}: in each a count goes beyond those of the default chains, where they stay below 20, up to 39.
    Only the counts are new: every number has been read in training, where n too goes up to 39. (Other numbers
    would be unknown words to a compact tokenizer.)"""
    def draw(rng):
        item = chain_item(rng, limit=40)
        given = [int(n) for n in re.findall(r"\d+", item["question"])]        # the first count, then each n
        counts = given[:1] + [int(n) for n in re.findall(r"=(\d+)", "".join(item["steps"]))]
        return [item] if max(counts) >= 20 and max(given) < 40 else []
    return generate(draw, (0, 0, CHAINS_SIZES[2]), 0)


EMBEDDED = {"chains": chains, "chains-mixed": chains_mixed, "chains-longer": chains_longer, "chains-larger": chains_larger,
            "prosqa-mini": prosqa_mini}     # load() makes these by itself


# ---------------------------------------------------------------- tokenizers

SPECIAL = ("<|endoftext|>", "<bot>", "<eot>", "<pause>")
# Both patterns are written so that Python's re and tiktoken read them alike. GPT-2's takes a space
# into the number that follows it, so that "7" and " 7" are two unrelated tokens; numbers-apart gives
# that space to the word or sign before it, and every number is one token wherever it stands. is-a also
# joins " is a" to the word before: in "Every cat is a" the last token then names the subject.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+",
    "numbers-apart": r" ?[^\W\d]+(?: (?=\d))?|\d+| ?[^\s\w]+(?: (?=\d))?|\s+(?!\S)|\s+",
    "is-a": r" ?[^\W\d]+(?: is an?\b)?(?: (?=\d))?|\d+| ?[^\s\w]+(?: (?=\d))?|\s+(?!\S)|\s+",
}


class Tokenizer:
    """A tiktoken encoding plus <|endoftext|> (eos), <bot>, <eot> and <pause>, saved with the model.

    encode(text) -> ids, decode(ids) -> text; any text survives the round trip.
    """

    def __init__(self, pattern, ranks):
        """pattern: how text is split into pieces. ranks: {piece (bytes): id}, 0 .. n - 1."""
        self.pattern, self.ranks, self.n_vocab = pattern, ranks, len(ranks) + len(SPECIAL)
        self.eos, self.bot, self.eot, self.pause = range(len(ranks), self.n_vocab)
        encoding = tiktoken.Encoding("data_prep", pat_str=pattern, mergeable_ranks=ranks,
                                     special_tokens={s: len(ranks) + i for i, s in enumerate(SPECIAL)})
        self.encode, self.decode = encoding.encode_ordinary, encoding.decode

    @classmethod
    def compact(cls, texts, pattern="numbers-apart", most=50000):
        """All 256 bytes and the `most` most frequent whole pieces of the texts: training from
        scratch is not spent on 50,257 rows. tiktoken emits a known piece whole, others as bytes."""
        pieces = collections.Counter()
        for text in texts:
            pieces.update(re.findall(PATTERNS[pattern], text))
        pieces = sorted(p.encode() for p, _ in pieces.most_common(most) if len(p.encode()) > 1)
        return cls(PATTERNS[pattern], {p: i for i, p in enumerate([bytes([b]) for b in range(256)] + pieces)})

    @classmethod
    def gpt2(cls):
        """GPT-2's own 50,256 pieces, downloaded by tiktoken. Raises DataError without network."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except Exception as e:      # requests' own errors, which are not ours to import
            raise DataError(f"tiktoken cannot download the gpt2 tokenizer ({type(e).__name__}); connect once, set "
                            f"TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer compact") from None
        return cls(encoding._pat_str, encoding._mergeable_ranks)

    def state(self):
        """Plain values for a checkpoint; see from_state."""
        return {"pattern": self.pattern, "pieces": [p.decode("latin-1") for p in self.ranks]}

    @classmethod
    def from_state(cls, state):
        return cls(state["pattern"], {p.encode("latin-1"): i for i, p in enumerate(state["pieces"])})


# ---------------------------------------------------------------- examples and batches

def compact_tokenizer(items, prompt, pattern):
    """Tokenizer.compact of items with `prompt` before each answer."""
    def state():
        texts = ("\n".join([d["question"], *d["steps"], prompt + d["answer"]]) for d in items)
        return json.dumps(Tokenizer.compact(texts, pattern).state()).encode()
    kept = items.cached("pieces", [prompt, PATTERNS[pattern]], state).tobytes() if isinstance(items, Items) else state()
    return Tokenizer.from_state(json.loads(kept))


class Example(NamedTuple):
    """One item as token ids, in the authors' text format."""
    question: list      # "question\n"
    steps: list         # one list per step, "step\n"
    answer: list        # "### answer" (CODI: "The answer is: answer") and eos


class Examples(collections.abc.Sequence):
    """Examples packed into one int32 array, perhaps a memory map, and made lists again when asked for:

        n items | parts before each item, and in all | ids before each part, and in all | ids

    An item's parts are its question, its steps and its answer. lengths: an Example of arrays, the tokens of each
    question (n,), steps (n, most steps of any; 0 where there is none) and answer (n,).
    """

    def __init__(self, packed):
        self.first, rest = np.split(packed[1:], [packed[0] + 1])
        self.start, self.ids = np.split(rest, [self.first[-1] + 1])
        parts, n_steps = np.diff(self.start), np.diff(self.first) - 2
        question, answer = self.first[:-1], self.first[1:] - 1
        steps = np.zeros((len(n_steps), n_steps.max(initial=0)), np.int32)
        steps[np.arange(steps.shape[1]) < n_steps[:, None]] = np.delete(parts, [question, answer])
        self.lengths = Example(parts[question], steps, parts[answer])

    @classmethod
    def pack(cls, examples):
        """Examples one after the other -> the packed array."""
        first, start, ids = (array.array("i", before) for before in ([0], [0], []))
        for example in examples:
            for part in (example.question, *example.steps, example.answer):
                ids.extend(part)
                start.append(len(ids))
            first.append(len(start) - 1)
        return np.concatenate([np.array(a, np.int32) for a in ([len(first) - 1], first, start, ids)])

    def __len__(self):
        return len(self.first) - 1

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        i = range(len(self))[i]                          # raises IndexError beyond the end
        start = self.start[self.first[i]:self.first[i + 1] + 1].tolist()
        question, *steps, answer = (self.ids[a:b].tolist() for a, b in zip(start, start[1:]))
        return Example(question, steps, answer)


def tokenize(items, tok, block_size, n_extra, where, prompt="### "):
    """Examples of the items, with `prompt` before each answer. Raises DataError for an item that would not fit into block_size
    positions with all its steps and n_extra more (thoughts, <bot>, <eot>)."""
    def example(item):
        return Example(tok.encode(item["question"] + "\n"), [tok.encode(s + "\n") for s in item["steps"]],
                       tok.encode(prompt + item["answer"]) + [tok.eos])

    make = lambda: Examples.pack(map(example, tqdm(items, "tokens", disable=None, leave=False, delay=2)))
    if isinstance(items, Items):
        examples = Examples(items.cached("tokens", [tok.state(), prompt], make).view(np.int32))
    else:
        examples = Examples(make())
    question, steps, answer = examples.lengths
    n = question + steps.sum(1) + answer + n_extra
    if (n > block_size).any():
        i = np.argmax(n > block_size)
        raise DataError(f"{where}, item {i + 1}, takes {n[i]} positions with its thoughts, more than block_size "
                        f"{block_size}; raise --block-size or remove the item")
    return examples


def batches(lengths, batch_size, rng):
    """One epoch: a list of index arrays of batch_size (the last may be smaller), in random order.

    lengths [(prompt, language), ...] in tokens. Items alike in both share a batch, which keeps
    padding under 10 % (ProsQA 1 %, GSM8k-Aug 6 to 8 %): shuffle; cut into stretches of up to
    16 x 16 batches; sort each by prompt and, within 1/16 of that, by language; shuffle the batches.
    """
    lengths = np.asarray(lengths)
    order, groups = rng.permutation(len(lengths)), []
    for stretch in np.split(order, range(256 * batch_size, len(order), 256 * batch_size)):
        side = round(math.sqrt(-(-len(stretch) // batch_size))) * batch_size
        stretch = stretch[np.argsort(lengths[stretch, 0], kind="stable")]
        for band in np.split(stretch, range(side, len(stretch), side)):
            band = band[np.argsort(lengths[band, 1], kind="stable")]
            groups += np.split(band, range(batch_size, len(band), batch_size))
    return [groups[i] for i in rng.permutation(len(groups))]


class Sequence(NamedTuple):
    """What a model reads and is to write: the latent loop's view of an example."""
    prompt: list       # token ids that are given
    n_latent: int      # continuous thoughts that follow
    language: list     # one more given token, then the tokens that are predicted


class Batch(NamedTuple):
    """B sequences as tensors, laid out so that the first thoughts of all rows stand in one column:

        - - q q q <bot> | o o o | <eot> s s s a a eos          o: a continuous thought
        q q q q q <bot> | o o o | <eot> a a eos  -  -          -: padding
    """
    prompt: torch.Tensor      # (B, Tq) ids, left-padded
    keep: torch.Tensor        # (B, Tq) bool, True where the prompt is real
    latent: torch.Tensor      # (B, k) bool, True where the row has its i-th thought
    language: torch.Tensor    # (B, Tl) ids, right-padded
    where: torch.Tensor       # (N,) positions in the flattened language that have a label
    labels: torch.Tensor      # (N,) ids: the token after each of those
    positions: int            # real positions, thoughts counted: for tokens per second


def collate(sequences, pad, device="cpu"):
    """Batch of Sequences."""
    B = len(sequences)
    Tq, k, Tl = (max(lengths) for lengths in zip(*[(len(p), n, len(l)) for p, n, l in sequences]))
    prompt, language = np.full((B, Tq), pad), np.full((B, Tl), pad)
    keep, has_label, n_latent = np.zeros((B, Tq), bool), np.zeros((B, Tl), bool), np.zeros((B, 1), int)
    for row, (p, n, l) in enumerate(sequences):
        prompt[row, Tq - len(p):], keep[row, Tq - len(p):] = p, True
        language[row, :len(l)], has_label[row, :len(l) - 1], n_latent[row] = l, True, n
    where = np.flatnonzero(has_label)
    arrays = prompt, keep, np.arange(k) < n_latent, language, where, language.ravel()[where + 1]
    return Batch(*(torch.from_numpy(a).to(device) for a in arrays),
                 positions=int(keep.sum() + n_latent.sum() + has_label.sum() + B))


# ---------------------------------------------------------------- scoring

def bare(answer):
    """An answer without blanks around it, commas and the dollar sign in front: '-$1,200.50' -> '-1200.50'."""
    return re.sub(r"^([-+]?)\$\s*", r"\1", answer.replace(",", "").strip())


def extract_answer(text):
    """What stands after the last answer marker, '###' (Coconut's) or 'The answer is:' (CODI's), up to the end
    of that line or of the text, bare; '' without a marker."""
    *before, last = re.split(r"#{3,}|The answer is:", text)
    return bare(re.split(rf"\n|{re.escape(SPECIAL[0])}", last)[0]) if before else ""


def is_correct(text, answer):
    """Does the decoded text give the answer? Numbers, also with a full stop behind, are compared as numbers,
    all else as text."""
    given, wanted = extract_answer(text), bare(answer)
    number = r"[-+]?(\d+(\.\d+)?|\.\d+)\.?"
    if re.fullmatch(number, given) and re.fullmatch(number, wanted):
        return Decimal(given.rstrip(".")) == Decimal(wanted.rstrip("."))
    return given != "" and given == wanted


def calculate(text):
    """The value of an arithmetic expression (+ - * / and brackets), exactly, as GSM8k writes it:
    '600*30/100' -> '180', '1/8' -> '0.125'. None for anything else; nothing is ever executed."""
    operators = {ast.Add: Fraction.__add__, ast.Sub: Fraction.__sub__, ast.Mult: Fraction.__mul__, ast.Div: Fraction.__truediv__}

    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return Fraction(str(node.value))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        return operators[type(node.op)](value(node.left), value(node.right))      # anything else has none of these
    try:
        number = value(ast.parse(text.replace(",", "").strip(), mode="eval").body)
    except (SyntaxError, ValueError, AttributeError, KeyError, ArithmeticError, RecursionError, MemoryError):
        return None
    return str(number.numerator) if number.denominator == 1 else f"{float(number):.10g}"


# ---------------------------------------------------------------- statistics

def graph_stats(items):
    """Means over ProsQA items. The last two are floors: what a guesser gets that only compares the
    two options by a surface property of the graph (a tie counts half)."""
    rows = collections.defaultdict(list)
    for item in items:
        edges, root, options = item["edges"], item["root"], (item["target"], item["neg_target"])
        children, parents = adjacency(edges), adjacency(edges, reverse=True)
        distance, paths = shortest_paths(children, root)
        if item["target"] not in distance:
            raise DataError(f"the target of '...{item['question'][-40:]}' cannot be reached from its root; "
                            f"correct or remove this item")
        ancestors = [len(shortest_paths(parents, v)[0]) for v in options]
        in_edges = [len(parents[v]) for v in options]
        wins = lambda right, wrong: 100 * ((right > wrong) + (right == wrong) / 2)
        asked = re.search(r" a (\w+) or (\w+)\?$", item["question"])
        for key, value in {
                "nodes": len(item["idx_to_symbol"]),
                "edges": len(edges),
                "entity names": sum(s[:1].isupper() for s in item["idx_to_symbol"]),
                "shortest path": distance[item["target"]],
                "shortest paths": paths[item["target"]],
                "children of the root": len(children[root]),
                "grandchildren": sum(d == 2 for d in distance.values()),
                "root is node 1, %": 100 * (root == 1),
                "right option first, %": 100 * bool(
                    asked and asked[1] == item["idx_to_symbol"][item["target"]]),
                "with a detour, %": 100 * has_detour(edges, root, item["target"]),
                "floor: more ancestors, %": wins(*ancestors),
                "floor: fewer in-edges, %": wins(*[-n for n in in_edges])}.items():
            rows[key].append(value)
    return {key: statistics.fmean(values) for key, values in rows.items()}


def stats(items):
    """{row: number} for any data set: sizes, lengths, histogram of steps in %, graphs where there are."""
    if not items:
        return {"items": 0}
    counts = collections.Counter(len(item["steps"]) for item in items)
    rows = {"items": len(items),
            "question, words": statistics.fmean(len(item["question"].split()) for item in items),
            "question, most words": max(len(item["question"].split()) for item in items),
            "steps": statistics.fmean(len(item["steps"]) for item in items)}
    rows |= {f"  {n} steps, %": 100 * counts[n] / len(items) for n in range(min(counts), max(counts) + 1)}
    if all("edges" in item for item in items):
        return rows | graph_stats(items)
    answers = collections.Counter(item["answer"] for item in items)
    numeric = sum(n for answer, n in answers.items() if re.fullmatch(r"-?\d*\.?\d+", answer))
    return rows | {"numeric answers, %": 100 * numeric / len(items),
                   "floor: one answer for all, %": 100 * max(answers.values()) / len(items)}


def print_stats(splits):
    """One line per statistic, one column per split."""
    columns = {split: stats(items) for split, items in splits.items()}
    longest = max(columns.values(), key=len)    # a split may lack some numbers of steps
    rows = list(dict.fromkeys(row for column in (longest, *columns.values()) for row in column))
    show = lambda value: "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
    print(f"{'':26}" + "".join(f"{split:>10}" for split in columns))
    for row in rows:
        print(f"{row:26}" + "".join(f"{show(column.get(row)):>10}" for column in columns.values()))


# ---------------------------------------------------------------- command line

def run_chains(args):
    write_dataset(args.out, chains(args.sizes, args.seed, n_steps=args.n_steps, limit=args.limit,
                                   shuffled=args.shuffled, distractors=args.distractors))


def run_embedded(args):
    given = {name: getattr(args, name) for name in ("sizes", "seed") if hasattr(args, name)}
    write_dataset(args.out, EMBEDDED[args.command](**given))


def run_prosqa(args):
    if args.generate:
        if args.source:
            raise DataError("--generate and --from exclude each other; give one of them")
        write_dataset(args.out, generate(lambda rng: [prosqa_item(rng)], args.sizes, args.seed))
    else:
        run_released(args)


def run_prontoqa(args):
    if args.file:
        write_dataset(args.out, read_prontoqa(args.file, args.sizes, args.sentences_per_step), released=True)
    else:
        write_dataset(args.out, generate(lambda rng: [prontoqa_item(rng, args.n_hops, args.sentences_per_step)],
                                         args.sizes, args.seed))


READERS = {     # name -> what reads one of its released files
    "prosqa": read_split,
    "gsm8k": read_gsm8k,
    "svamp": lambda path: read_problems(path, ("Body", "Question"), "Answer"),
    "gsm-hard": lambda path: read_problems(path, ("input",), "target"),
    "multiarith": lambda path: read_problems(path, ("input",), "target"),
}


def run_released(args):
    files = released_files(args.command, args.out, args.source)
    write_dataset(args.out, {split: READERS[args.command](path) for split, path in files.items()}, released=True)


def run_exported(args):
    repository, test = HUGGING_FACE[args.command]
    if not args.source:
        raise DataError(f"{args.command} is not downloaded: where Hugging Face's datasets package is, run "
                        f"load_dataset(\"{repository}\")[\"train\"].to_json(\"train.jsonl\"), likewise for its other "
                        f"splits, and pass the file, or the folder of them, with --from PATH")
    splits = {split: read_cots(path) for split, path in given_files(args.command, args.source).items()}
    if "train" in splits and "valid" not in splits:
        splits["train"], splits["valid"] = hold_out(splits["train"], args.valid)
        print(f"{args.source} has no valid: {args.valid:,} items of train become it, always the same ones")
    if "test" not in splits:
        print(f"{args.source} has no test: CODI's authors take {test}; put it beside train and give the folder")
    write_dataset(args.out, {split: splits[split] for split in SPLITS if split in splits}, released=True)


def run_stats(args):
    print_stats(load(args.name, need=()))


def sizes(text):
    """'17886,300,500' -> (17886, 300, 500)"""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){2}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not three positive numbers TRAIN,VALID,TEST")
    return tuple(map(int, text.split(",")))


def at_least(least):
    def number(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least {least}")
        return int(text)
    return number


def real(high=1e9):
    """argparse type: a number from 0 to `high`."""
    def number(text):
        if not 0 <= float(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between 0 and {high:g}")
        return float(text)
    return number


def out(default):
    return {"--out": dict(default=default, metavar="DIR", help=f"Folder to write to (default {default}).")}


def drawn(default):
    return {"--seed": dict(type=int, default=0, help="Seed of the generator; the same seed gives the same bytes."),
            "--sizes": dict(type=sizes, default=default, metavar="TRAIN,VALID,TEST",
                            help=f"Generated items per split (default {','.join(map(str, default))}).")}


FROM = {"--from": dict(dest="source", metavar="PATH", help="Take the released files from PATH, a folder or one of "
                       "them, without network.")}
EXPORTED = {"--from": dict(dest="source", metavar="PATH", help="A file, or a folder of train, valid and test, with question, "
                           "cot and answer: .json, .jsonl, or .txt of lines question||cot #### answer."),
            "--valid": dict(type=at_least(1), default=500, help="Items of train that become valid if there is none "
                            "(default 500).")}
COMMANDS = {    # name -> (function, what it does, flags)
    "chains": (run_chains, "Word problems of chained doublings and differences, generated.",
               {"--n-steps": dict(type=at_least(1), default=3, help="Operations in a row (default 3)."),
                "--limit": dict(type=at_least(4), default=20, help="Every count stays below this (default 20)."),
                "--shuffled": dict(action="store_true", help="Facts in any order instead of the order of the steps."),
                "--distractors": dict(type=at_least(0), default=0, help="Facts that the answer does not need."),
                **drawn(CHAINS_SIZES), **out("data/chains")}),
    "chains-mixed": (run_embedded, "The same with 1, 2 and 3 operations in train.", drawn(CHAINS_SIZES) | out("data/chains-mixed")),
    "chains-longer": (run_embedded, "A test set for models of chains: one operation more.", out("data/chains-longer")),
    "chains-larger": (run_embedded, "A test set for models of chains: counts up to 39.", out("data/chains-larger")),
    "prosqa": (run_prosqa, "ProsQA: the official files by download, --from PATH, or new ones by --generate.",
               {**FROM, "--generate": dict(action="store_true", help="Generate with the paper's Algorithm 1."),
                **drawn(PROSQA_SIZES), **out("data/prosqa")}),
    "prosqa-mini": (run_embedded, "ProsQA with about 11 nodes and exactly 3 steps, generated.",
                    {**drawn(MINI_SIZES), **out("data/prosqa-mini")}),
    "prontoqa": (run_prontoqa, "ProntoQA: generated, or --from the original generator's output.",
                 {"--from": dict(dest="file", metavar="FILE", help="Convert FILE, 5hop_0shot_random.json of asaparov/prontoqa."),
                  "--n-hops": dict(type=at_least(1), default=5, help="Hops from the entity to the property (default 5)."),
                  "--sentences-per-step": dict(type=at_least(1), default=1, help="Sentences in a step (default 1; the "
                                               "Coconut authors: 2)."),
                  **drawn(PRONTOQA_SIZES), **out("data/prontoqa")}),
    "gsm8k": (run_released, "GSM8k-Aug by download or --from PATH.", {**FROM, **out("data/gsm8k")}),
    "gsm8k-nl": (run_exported, "GSM8k-Aug-NL, with steps in sentences, --from exported files.",
                 {**EXPORTED, **out("data/gsm8k-nl")}),
    "commonsense": (run_exported, "CommonsenseQA with reasoning by GPT-4o mini, --from exported files.",
                    {**EXPORTED, **out("data/commonsense")}),
    "svamp": (run_released, "SVAMP, a test set, by download or --from PATH.", {**FROM, **out("data/svamp")}),
    "gsm-hard": (run_released, "GSM-Hard, a test set, by download or --from PATH.", {**FROM, **out("data/gsm-hard")}),
    "multiarith": (run_released, "MultiArith, a test set, by download or --from PATH.", {**FROM, **out("data/multiarith")}),
    "stats": (run_stats, "Print a table of what is in a data set.",
              {"name": dict(metavar="NAME", help="Name under data/, or the path of a folder.")}),
}


def main(argv=None):
    """Run one subcommand. -> exit status: 0; 2 after one sentence on stderr, never a traceback."""
    parser = argparse.ArgumentParser(prog="data_prep.py", description="Get, make and look at data sets.",
                                     epilog="'python data_prep.py COMMAND --help' lists the flags of a command.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, what, flags) in COMMANDS.items():
        sub = commands.add_parser(name, help=what, description=what)
        for flag, options in flags.items():
            sub.add_argument(flag, **options)
    args = parser.parse_args(argv)
    try:
        COMMANDS[args.command][0](args)
    except DataError as e:
        print(f"data_prep.py: {e}", file=sys.stderr)
        return 2
    except (OSError, UnicodeEncodeError) as e:      # disk full, no permission; half of a surrogate pair
        print(f"data_prep.py: {e}; nothing half-written was left", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data_prep.py: stopped; the same command goes on with a download where it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
