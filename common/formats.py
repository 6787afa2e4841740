"""Formats of weights: what torch.save writes, safetensors, GGUF. What a file is, its content
decides, never its name; everything else that people have at hand is refused with a sentence on what
it is and what to do. Only tensors and plain values are read: no code in a file is run.

    safetensors    bytes of the header (8), header (JSON: name -> dtype, shape, begin, end), data
    GGUF           "GGUF", version, counts, metadata, table of tensors, data; see Reader
"""

import json
import math
import mmap
import os
import pickle
import re
import struct
import warnings
import zipfile
from typing import NamedTuple

import torch

from common.runtime import UserError

AGAIN = "copy or download it again"
SHARDS = "model.safetensors.index.json"
SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# ---------------------------------------------------------------- any file


def read(path):
    """What a file of weights holds: of torch.save whatever it was given, tensors and plain values;
    of safetensors (a file, an index of shards, a folder with either) a state dict; of GGUF a GGUF.
    All on the CPU.

    Raises FileNotFoundError, or UserError with what the file is instead.
    """
    if os.path.isdir(path):
        path = file_in(path)
    with open(path, "rb") as f:
        what = foreign(path, f)
        if what:
            raise UserError(f"{path}: {what}.")
        f.seek(0)
        head = f.read(9)
        f.seek(0)
        if head.startswith(b"GGUF"):
            return read_gguf(path, f)
        if head.startswith(b"{"):
            return read_shards(path, f)
        if is_safetensors(head):
            return read_safetensors(path, f)
        return unpickled(path, f)


def file_in(folder):
    """The file of weights in a folder. Raises UserError where there is none, or a choice."""
    names = sorted(os.listdir(folder))
    for name in ("model.safetensors", SHARDS):
        if name in names:
            return os.path.join(folder, name)
    for name in ["best.pt", "last.pt", "pytorch_model.bin", *names]:
        if name in names and name.endswith((".pt", ".gguf", "pytorch_model.bin")):
            raise UserError(f"{folder}: a folder; give the file {os.path.join(folder, name)}.")
    raise UserError(f"{folder}: a folder without a best.pt, a model.safetensors, a .gguf or a "
                    f"pytorch_model.bin; if it holds a GPT-2 in other files, {one_file(folder)}.")


def folder_of(path):
    """The folder of a file of weights, or that folder itself."""
    return path if os.path.isdir(path) else os.path.dirname(path) or "."


def unpickled(path, f):
    """What torch.load reads in an open file (given its path, it would go by the name). Raises
    UserError."""
    try:
        with warnings.catch_warnings(action="ignore"):       # on what a damaged file may be
            return torch.load(f, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        name_is_cut = not f.read(1) and not zipfile.is_zipfile(path)
        if not refused or name_is_cut:
            raise UserError(f"{path}: cut off or damaged; {AGAIN}.") from None
        raise UserError(f"{path}: holds Python objects ({refused[1]}), a whole pickled model "
                        "perhaps, which can run code and are not read; save only its weights: "
                        "torch.save(model.state_dict(), 'pytorch_model.bin').") from None
    except Exception:                # whatever the unpickler meets in a damaged file
        raise UserError(f"{path}: not what torch.save writes, or cut off or damaged; "
                        f"{AGAIN}.") from None


def foreign(path, f):
    """What a file is that cannot be read, by its first bytes, and what to do; or None. f: the file,
    opened in binary."""
    head, folder = f.read(512), os.path.dirname(path) or "."
    if not head:
        return f"an empty file; {AGAIN}"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the weights; get those with: git lfs pull"
    if head.lstrip()[:1] == b"<":
        return "a web page, not weights; download the file itself"
    if head.lstrip()[:1] in (b"{", b"["):
        head += f.read(1 << 24)
        if b'"weight_map"' not in head:
            return "JSON text, not weights; give the file of the weights"
        if b".safetensors" not in head:
            return f"the index of weights in several files (shards); {one_file(folder)}"
    if head.startswith(b"\x89HDF"):
        return "weights of TensorFlow (HDF5), which are not read here; give safetensors"
    if head.startswith(b"PK"):
        try:
            names = [name.rpartition("/")[2] for name in zipfile.ZipFile(path).namelist()]
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError):   # of any damage
            return f"cut off or damaged; {AGAIN}"
        if "constants.pkl" in names:
            return ("a TorchScript program; save only its weights: "
                    "torch.save(torch.jit.load(FILE).state_dict(), 'pytorch_model.bin')")
        if "data.pkl" not in names:
            return "a zip archive that torch.save did not write; give the file in it"
    return None


def one_file(folder):
    """How Hugging Face's library makes one pytorch_model.bin of what is in a folder."""
    model = f"transformers.GPT2LMHeadModel.from_pretrained({folder!r})"
    return (f"make a pytorch_model.bin of it: torch.save({model}.state_dict(), "
            f"{os.path.join(folder, 'pytorch_model.bin')!r})")


def shard(path):
    """What to do with one of several files of weights, by its name; None if it is none."""
    name, folder = os.path.basename(path), os.path.dirname(path) or "."
    if not re.search(r"-\d+-of-\d+", name):
        return None
    if name.endswith(".safetensors"):
        return f"{path}: one of several files of weights (shards); give their folder, {folder}."
    return f"{path}: one of several files of weights (shards); {one_file(folder)}."


def read_json(where, advice=", or cut off; copy or download it again."):
    """A JSON object of a file. Raises UserError, a sentence that `advice` ends."""
    try:
        with open(where, encoding="utf-8-sig") as f:
            content = json.load(f)
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{where}: not a JSON object{advice}")
    return content


def read_config(path, computed, architectures, file, model):
    """The config.json next to a file of weights, or None if there is none. Raises UserError,
    naming the field, if it says that something else is computed than by `file`, for a model of this
    name. computed: {field: the values that mean the same}, the first where there is no such field;
    architectures: names of its class there."""
    where = os.path.join(folder_of(path), "config.json")
    if not os.path.exists(where):
        return None
    config = read_json(where, "; it is read with the weights next to it.")
    for name, same in computed.items():
        value = config.get(name, same[0])
        if value not in same:
            raise UserError(f"{where}: {name} is {json.dumps(value)}, but {file} computes {model} "
                            f"with {json.dumps(same[0])}; its weights cannot be used here.")
    own = config.get("architectures") or []
    if not isinstance(own, list) or set(map(str, own)) - set(architectures):
        raise UserError(f"{where}: architectures is {json.dumps(own)}, but {file} is a "
                        f"{architectures[1]}; its weights cannot be used here.")
    return config


# ---------------------------------------------------------------- safetensors


def is_safetensors(head):
    """Do these first nine bytes begin a safetensors file: the size of a header, then JSON?"""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30


def mapped(f):
    """An open file as a memory map: only what is used of it is read."""
    return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)


def raw(data, begin, n, dtype):
    """Bytes begin .. begin + n of a memory map as a tensor of a dtype, flat."""
    found = torch.frombuffer(data, dtype=torch.uint8, count=n, offset=begin)
    return (found.clone() if begin % dtype.itemsize else found).view(dtype)


def read_safetensors(path, f):
    """{name: tensor} of an open safetensors file, in memory that is mapped. Raises UserError."""
    size = os.fstat(f.fileno()).st_size
    n = int.from_bytes(f.read(8), "little")
    if 8 + n > size:
        raise UserError(f"{path}: cut off, its header of {n:,} bytes is not all there; {AGAIN}.")
    try:
        header = json.loads(f.read(n))
        header.pop("__metadata__", None)
        entries = {name: (of["dtype"], of["shape"], *of["data_offsets"])
                   for name, of in header.items()}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: the header of a safetensors file, but damaged; "
                        f"{AGAIN}.") from None
    data, found = mapped(f), {}
    for name, (kind, shape, begin, end) in entries.items():
        if kind not in SAFETENSORS and name.endswith((".attn.bias", ".attn.masked_bias")):
            continue                             # a causal mask that old versions of GPT-2 saved
        if kind not in SAFETENSORS:
            raise UserError(f"{path}: the tensor {name} is of type {kind}; read here are "
                            f"{', '.join(SAFETENSORS)}.")
        dtype = SAFETENSORS[kind]
        numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
        if not all(type(i) is int and i >= 0 for i in numbers) or (
                end - begin != math.prod(shape) * dtype.itemsize):
            raise UserError(f"{path}: damaged, the tensor {name} has not the size of its shape; "
                            f"{AGAIN}.")
        if 8 + n + end > size:
            raise UserError(f"{path}: cut off, the tensor {name} ends after {8 + n + end:,} bytes, "
                            f"the file after {size:,}; {AGAIN}.")
        found[name] = torch.empty(shape, dtype=dtype)
        if end > begin:
            found[name] = raw(data, 8 + n + begin, end - begin, dtype).view(shape)
    return found


def read_shards(path, f):
    """{name: tensor} of all files that an index of shards names. Raises UserError."""
    try:
        files = sorted(set(json.load(f)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: an index of shards, but cut off or damaged; {AGAIN}.") from None
    found = {}
    for name in files:
        shard = os.path.join(os.path.dirname(path), str(name))
        if not os.path.isfile(shard):
            raise UserError(f"{shard}: no such file, but {os.path.basename(path)} names it; copy "
                            "or download it, too.")
        with open(shard, "rb") as part:
            if not is_safetensors(part.read(9)):
                raise UserError(f"{shard}: not a safetensors file, or cut off; {AGAIN}.")
            part.seek(0)
            found |= read_safetensors(shard, part)
    return found


# ---------------------------------------------------------------- GGUF


class GGUF(NamedTuple):
    """What a file of llama.cpp holds."""
    meta: dict       # name -> number, text, bool or list of them
    tensors: dict    # name -> float tensor


NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
           12: "d"}                              # types in the metadata, as struct writes them
TEXT, LIST = 8, 9
# types of tensors: number -> name, weights in a block, bytes of a block
TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
         8: ("Q8_0", 32, 34)}
OTHER_TYPES = {6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K",
               14: "Q6_K", 15: "Q8_K", 30: "BF16"}


class Reader:
    """Reads a GGUF file's numbers and texts one after the other, little-endian. Raises
    struct.error at its end."""

    def __init__(self, data):
        self.data, self.at = data, 4             # after "GGUF"

    def number(self, kind):
        value, = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += struct.calcsize("<" + kind)
        return value

    def text(self):
        n = self.number("Q")
        if n > len(self.data) - self.at:
            raise struct.error
        self.at += n
        return self.data[self.at - n:self.at].decode("utf-8", "replace")

    def value(self, kind):
        if kind == TEXT:
            return self.text()
        if kind == LIST:
            kind, n = self.number("I"), self.number("Q")
            return [self.value(kind) for _ in range(n)]
        return self.number(NUMBERS[kind])


def read_gguf(path, f):
    """The GGUF of an open file. Raises UserError."""
    data = mapped(f)
    reader = Reader(data)
    try:
        version = reader.number("I")
        if version not in (2, 3):
            raise UserError(f"{path}: GGUF of version {version}; 2 and 3 are read here.")
        n_tensors, n_meta = reader.number("Q"), reader.number("Q")
        meta = {}
        for _ in range(n_meta):
            name = reader.text()
            meta[name] = reader.value(reader.number("I"))
        table = []
        for _ in range(n_tensors):
            name = reader.text()
            shape = [reader.number("Q") for _ in range(reader.number("I"))]
            table.append((name, shape[::-1], reader.number("I"), reader.number("Q")))
    except (struct.error, KeyError, RecursionError):
        raise UserError(f"{path}: a GGUF file, but cut off or damaged; {AGAIN}.") from None
    align = meta.get("general.alignment", 32)
    start = -(-reader.at // align) * align
    return GGUF(meta, {name: tensor_of(path, data, start + at, name, shape, kind)
                       for name, shape, kind, at in table})


def tensor_of(path, data, at, name, shape, kind):
    """A tensor of a GGUF file's data, from byte `at` on, as float32 or float16."""
    if kind not in TYPES:
        raise UserError(f"{path}: the tensor {name} is of type {OTHER_TYPES.get(kind, kind)}; read "
                        f"here are {', '.join(name for name, *_ in TYPES.values())}.")
    named, per_block, size = TYPES[kind]
    n = math.prod(shape)
    if not shape or shape[-1] % per_block or n == 0:
        raise UserError(f"{path}: damaged, the tensor {name} has the shape {shape}; {AGAIN}.")
    end = at + n // per_block * size
    if end > len(data):
        raise UserError(f"{path}: cut off, the tensor {name} ends after {end:,} bytes, the file "
                        f"after {len(data):,}; {AGAIN}.")
    if per_block == 1:
        return raw(data, at, end - at, torch.float32 if size == 4 else torch.float16).view(shape)
    blocks = raw(data, at, end - at, torch.uint8).view(-1, size)
    return dequantised(blocks, named).view(shape)


def dequantised(blocks, named):
    """Blocks (n, bytes) of 32 weights -> (n, 32) float32. A block begins with its scale d (and the
    offset m of Q4_1) as float16; then Q8_0 has 32 signed bytes q, the others 16 bytes, whose low
    halves are q of the first 16 weights, whose high halves those of the others.

        Q8_0  w = d q        Q4_0  w = d (q - 8)        Q4_1  w = d q + m
    """
    d = blocks[:, :2].contiguous().view(torch.float16).float()               # (n, 1)
    if named == "Q8_0":
        return blocks[:, 2:].contiguous().view(torch.int8).float().mul_(d)
    q = blocks[:, -16:]
    q = torch.cat([q & 15, q >> 4], 1).float()                               # (n, 32)
    if named == "Q4_0":
        return q.sub_(8).mul_(d)
    return q.mul_(d).add_(blocks[:, 2:4].contiguous().view(torch.float16).float())
