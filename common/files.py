"""Files: written whole or not at all, downloaded or given, each with the hash it must have."""

import hashlib
import http.client
import json
import os
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from common.puzzles import SPLITS
from common.runtime import UserError

# ---------------------------------------------------------------- what is released where

GITHUB = "https://raw.githubusercontent.com"
GIT_LFS = "https://media.githubusercontent.com/media"   # for a file for which GITHUB has a pointer
PROSQA = "facebookresearch/coconut/27273cb8cca4bb763c041a63b036d0c3b7cbbb48/data"
GSM8K_AUG = "da03/Internalize_CoT_Step_by_Step/e06a32ee5e4cd117171daeb4755d2a97ece62761/data/gsm8k"
SVAMP = "arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53"
PAL = "reasoning-machines/pal/f81ca2a9777f002f98a6b4d0f10b61bd5c8feb02/datasets"
RELEASED = {    # name -> split -> (url, bytes, sha256); None: pinned by the first download
    "prosqa": {
        "train": (f"{GITHUB}/{PROSQA}/prosqa_train.json", None, None),
        "valid": (f"{GITHUB}/{PROSQA}/prosqa_valid.json", 518208,
                  "c74e0de24f1e90ec48b1a993e6458a7be4caeef3928f5104e3c2e45d689a5249"),
        "test": (f"{GITHUB}/{PROSQA}/prosqa_test.json", 856611,
                 "82ddc0afe6ee30eb31bb16fa208e293e55278a20fa987098d48519cae7e12680")},
    "gsm8k": {
        "train": (f"{GIT_LFS}/{GSM8K_AUG}/train.txt", 87805358,
                  "0a3909a9e7d8d2f7ad6b8c7b5608aa744988d835f9bf874d4cf06ca77df6bf8c"),
        "valid": (f"{GITHUB}/{GSM8K_AUG}/valid.txt", 143419,
                  "04f9bddfe8ac4846571b1e2b612b289c95770b5012fdb34cc36a597b041afb87"),
        "test": (f"{GITHUB}/{GSM8K_AUG}/test.txt", 388019,
                 "e464efa2713fbcf423bdbfb482c543a6a086188c3d97c294b1d19a70c2a515e8")},
    "svamp": {
        "test": (f"{GITHUB}/{SVAMP}/SVAMP.json", 339970,
                 "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e")},
    "gsm-hard": {
        "test": (f"{GITHUB}/{PAL}/gsmhardv2.jsonl", 1138151,
                 "2032b0188a49ac0ec38cbe1e695e7d62d6dddc44bbb64f920728aca710e9ddef")},
    "multiarith": {
        "test": (f"{GITHUB}/{PAL}/mawpsmultiarith.jsonl", 109522,
                 "12e8295088364af21fb6591dbdbd1dda452aade57227f63d725677471ded2951")},
}
HUGGING_FACE = {    # name -> repository, what CODI's authors test on; given by --from
    "gsm8k-nl": ("zen-E/GSM8k-Aug-NL", "that of GSM8K (openai/gsm8k's, or test.txt of GSM8k-Aug)"),
    "commonsense": ("zen-E/CommonsenseQA-GPT4omini", "its validation split")}
EXPORTED_TRAIN = "train.json train.jsonl train.txt"
EXPORTED_TEST = "test.json test.jsonl test.txt"
EXPORTED_VALID = "valid.json valid.jsonl valid.txt"
EXPORTED_VALIDATION = "validation.json validation.jsonl validation.txt"
FILES = {           # name -> split -> the file names that --from looks for in a folder
    "prosqa": {split: f"prosqa_{split}.json {split}.json" for split in SPLITS},
    "gsm8k": {split: f"gsm8k_aug_{split}.txt {split}.txt" for split in SPLITS},
    "svamp": {"test": "SVAMP.json"},
    "gsm-hard": {"test": "gsmhardv2.jsonl"},
    "multiarith": {"test": "mawpsmultiarith.jsonl multiarith.jsonl"},
    "gsm8k-nl": {"train": EXPORTED_TRAIN, "valid": f"{EXPORTED_VALID} {EXPORTED_VALIDATION}",
                 "test": EXPORTED_TEST},
    "commonsense": {"train": EXPORTED_TRAIN, "valid": EXPORTED_VALID,
                    "test": f"{EXPORTED_TEST} {EXPORTED_VALIDATION}"},
}


# ---------------------------------------------------------------- writing


def digest(path):
    """sha256 of a file, as 64 hex digits."""
    sha = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def write_texts(files):
    """Write {path: text}, so that a crash leaves each file old or new, never half: the slow and
    fallible work happens on temporary files, before the first rename."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp")
                 for path in map(Path, files)}
    try:
        for path, content in zip(temporary, files.values()):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary[path], "w", encoding="utf-8") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
        for path in temporary:
            os.replace(temporary[path], path)
    finally:
        for path in temporary:
            if temporary[path].exists():
                temporary[path].unlink()


def write_text(path, text):
    """write_texts of one file."""
    write_texts({path: text})


def write_jsons(files):
    """The same with {path: obj}, as JSON, a list with one item per line."""
    texts = {}
    for path, obj in files.items():
        texts[path] = json.dumps(obj) + "\n"
        if isinstance(obj, list):
            lines = [json.dumps(entry, ensure_ascii=False) for entry in obj]
            texts[path] = "[\n" + ",\n".join(lines) + "\n]\n"
    write_texts(texts)


def write_json(path, obj):
    """write_jsons of one file."""
    write_jsons({path: obj})


# ---------------------------------------------------------------- getting


BY_HAND = "download it elsewhere and pass it with --from PATH"


def fetch(url, part, size, by_hand=BY_HAND):
    """Bring `part` up to the whole of `url`, going on from the bytes it already has (HTTP Range).
    Raises UserError if that does not succeed. by_hand: what else can be done."""
    have = part.stat().st_size if part.exists() else 0
    if size and have == size:
        return
    headers = {"User-Agent": "data_prep.py", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            if reply.status != 206:     # the server ignored Range: it sends everything again
                have = 0
            length = reply.headers.get("Content-Length")
            total = have + int(length) if length else size
            with (open(part, "ab" if have else "wb") as f,
                  tqdm(total=total, initial=have, unit="B", unit_scale=True,
                       desc=part.stem) as bar):
                while block := reply.read(1 << 16):
                    f.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as e:
        if e.code == 416 and have:      # nothing beyond what we have: complete, or of another file
            if e.headers.get("Content-Range") == f"bytes */{have}":
                return
            part.unlink()
            return fetch(url, part, size, by_hand)
        raise UserError(f"the server answered {e.code} for {url}; {by_hand}") from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as e:
        why = getattr(e, "reason", e) or type(e).__name__
        raise UserError(f"cannot reach {url} ({why}); try again later, which resumes, or "
                        f"{by_hand}") from None
    if total and part.stat().st_size < total:
        raise UserError(f"{url} broke off after {part.stat().st_size:,} of {total:,} bytes; "
                        "run the same command to resume")


def download(url, path, size=None, sha256=None, by_hand=BY_HAND):
    """Download `url` to `path`, resuming path.part; a file at `path` has the right hash.

    sha256=None pins: the first download's hash goes into SHA256SUMS.json next to it, and every
    later one is checked against that. Raises UserError (no network, wrong size or hash).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pin_file = path.parent / "SHA256SUMS.json"
    try:
        pins = dict(json.loads(pin_file.read_text())) if pin_file.exists() else {}
    except (ValueError, TypeError):
        raise UserError(f"{pin_file} is no JSON object; delete it to pin the hashes anew") from None
    wanted = sha256 or pins.get(path.name)
    if path.exists() and digest(path) == wanted:
        return path
    part = path.with_name(path.name + ".part")
    fetch(url, part, size, by_hand)
    got_size, got = part.stat().st_size, digest(part)
    if (size and got_size != size) or (wanted and got != wanted):
        part.unlink()
        raise UserError(f"{url} gave {got_size:,} bytes with sha256 {got}, expected "
                        f"{size or 'any number of'} bytes with {wanted or 'any'}; it was deleted: "
                        "run the command again, and if this repeats, the file has changed at its "
                        "source")
    if wanted is None:
        write_json(pin_file, {**pins, path.name: got})
        print(f"{path.name}: no published hash, so its sha256 {got} is now pinned in {pin_file}")
    os.replace(part, path)
    return path


def given_files(name, source):
    """{split: path} of what --from gives: a folder, in which a split may be missing, or one file. A
    file is the split that its name says; under any other name the data set's first (train; test
    where there is no other)."""
    source, splits = Path(source), FILES[name]
    if source.is_file():
        named = [split for split in splits if source.name in splits[split].split()]
        return {[*named, *splits][0]: source}
    found = {}
    for split, files in splits.items():
        paths = [source / file for file in files.split() if (source / file).is_file()]
        if paths:
            found[split] = paths[0]
    if not found:
        names = ", ".join(splits.values()).replace(" ", ", ")
        raise UserError(f"--from {source} has none of the {name} files ({names}); give a file, or "
                        "the folder that holds them")
    return found


def released_files(name, out, source=None):
    """{split: path} of the released files: given by --from, or downloaded to OUT/raw."""
    if source is None:
        return {split: download(url, Path(out) / "raw" / url.rsplit("/", 1)[1], size, sha256)
                for split, (url, size, sha256) in RELEASED[name].items()}
    found = given_files(name, source)
    for split, files in FILES[name].items():
        if split not in found:
            print(f"{source} has no {files.replace(' ', ' and no ')}: {split} is left out")
    return found
