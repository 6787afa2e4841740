"""Reading data files: what a file is, its records, their forms, and when an item is well formed.

Any file is read by read_records, whether it is in a data folder or given by --from:

    bytes -> read_text: UTF-8, or an error that says what else it is
          -> read_records: [(where, record), ...], whatever the form of the file
          -> read_split, read_gsm8k, read_cots, read_problems: items, each checked
"""

import functools
import json
import math
import re
from decimal import Decimal
from pathlib import Path

from common.runtime import UserError
from common.scoring import extract_answer, is_correct, without_commas
from common.text import CODI_MARK, COCONUT_MARK

# ---------------------------------------------------------------- the format


def require(ok, where, complaint):
    """Raise UserError about the item at `where`, unless ok."""
    if not ok:
        raise UserError(f"{where}: {complaint}; correct or remove this item")


def check_text(value, where, name):
    """Raise UserError if a JSON value has text, however deep in it, that cannot be encoded: JSON
    can write one half of a surrogate pair, "\\ud83d", which is no character."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    half = None if text.isascii() else re.search(r"[\ud800-\udfff]", text)
    if half:
        raise UserError(f"{where}: {name} has {half[0]!r}, half of a surrogate pair, which cannot "
                        "be encoded; correct or remove this item")


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
        if type(value) is str:
            check_text(value, where, f"field '{field}'")


def check_item(item, where):
    """Raise UserError, naming `where` (file and item) and the field, unless the item is well
    formed."""
    check_fields(item, where, question=str, steps=list, answer=str)
    check_text("".join(item), where, "the name of a field")
    for field, value in item.items():
        if field not in ("question", "steps", "answer"):
            check_text(value, where, f"field '{field}'")
    for i, step in enumerate(item["steps"], 1):
        require(isinstance(step, str), where,
                f"field 'steps', step {i}, is {type(step).__name__}, not str")
        check_text(step, where, f"field 'steps', step {i},")
    said = misread(item["answer"])
    require(said is None, where, f"field 'answer' is {item['answer']!r}, of which the scorer reads "
                                 f"{said!r}, so that no model could be right")
    if "edges" in item:
        check_graph(item, where)


@functools.cache                        # answers repeat
def misread(answer):
    """What the scorer reads where a model writes just this answer, if that would not be right."""
    for mark in (COCONUT_MARK, CODI_MARK):
        if not is_correct(mark + answer, answer):
            return extract_answer(mark + answer)
    return None


def check_graph(item, where):
    """The same for the graph of a ProsQA item."""
    names, edges = item.get("idx_to_symbol"), item["edges"]
    good = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    require(good, where, "field 'idx_to_symbol' is missing or not a list of names")

    def is_node(v):
        return type(v) is int and 0 <= v < len(names)

    def is_edge(e):
        return isinstance(e, list) and len(e) == 2 and all(map(is_node, e))

    require(isinstance(edges, list) and all(map(is_edge, edges)), where,
            "field 'edges' is not a list of node pairs")
    for field in ("root", "target", "neg_target"):
        require(is_node(item.get(field)), where, f"field '{field}' is not the number of a node")


# ---------------------------------------------------------------- files

BOM = rb"(\xef\xbb\xbf)?\s*"
TO_JSON = "write it as JSON Lines, with to_json of datasets or pandas"
UNPACK = "unpack it and give what is in it"
NOT_DATA = (        # how a file begins -> what it is, what to do
    (rb"version https://git-lfs", "a Git LFS pointer, which only names the file",
     "run 'git lfs pull' in its repository, or download the file itself"),
    (rb"/annex/objects/", "a git-annex pointer, which only names the file",
     "run 'git annex get' in its repository, or download the file itself"),
    (BOM + rb"(?i:<(!doctype html|html|head|body)\b)", "HTML, a web page",
     "download the raw file, not the page that shows it"),
    (BOM + rb"<\?xml\b", "XML", "download it again, as this may be a server's error message"),
    (BOM + rb"(?i:(?=[^\n]*\b(question|input)\b)[\"\w -]*([,;\t][\"\w -]*)+(\r?\n|$))",
     "a table of columns with separators (CSV or TSV)", TO_JSON),
    (rb"\xff\xfe|\xfe\xff|[\[{\"]\0|\0[\[{\"]", "UTF-16 text, not UTF-8", "save it as UTF-8"),
    (rb"PAR1", "a Parquet file", TO_JSON),
    (rb"ARROW1|\xff\xff\xff\xff", "an Arrow file", TO_JSON),
    (rb"\x80[\x02-\x05]", "a Python pickle", TO_JSON),
    (rb"SQLite format 3\0", "an SQLite database", TO_JSON),
    (rb"%PDF-", "a PDF file", "give the data as JSON"),
    (rb"\x1f\x8b", "compressed with gzip", UNPACK),
    (rb"PK\x03\x04", "a ZIP archive", UNPACK),
    (rb"\xfd7zXZ\0", "compressed with xz", UNPACK),
    (rb"BZh[1-9]1AY&SY", "compressed with bzip2", UNPACK),
    (rb"\x28\xb5\x2f\xfd", "compressed with zstd", UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
)
AGAIN = "make, download or export it again"


def read_text(path):
    """The text of a data file, without a byte order mark. Raises UserError, saying what the file
    is, if it is no UTF-8 text or is known to be something else."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path") from None
    for beginning, what, advice in NOT_DATA:
        if re.match(beginning, content[:9999]):
            raise UserError(f"{path} is {what}; {advice}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        byte = f"0x{content[e.start]:02x}"
        raise UserError(f"{path} is not UTF-8 text (line {line} has the byte {byte}); save it as "
                        f"UTF-8, or {AGAIN}") from None
    if not text.strip():
        raise UserError(f"{path} is empty; {AGAIN}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def numbered_lines(path, content):
    """[(where, line)], without blank lines. Only newlines end a line: questions may hold other
    characters at which splitlines() breaks."""
    lines = enumerate(content.split("\n"), 1)
    return [(f"{path}, line {i}", line.strip()) for i, line in lines if line.strip()]


def begins_as_json(content):
    """Could a JSON list or object begin so? '[2, 5]: which is larger?||...' does not."""
    return re.match(r"\s*(\[\s*([\[{\"\]]|$)|\{\s*([\"}]|$))", content)


def parse_json(content, where):
    """The value of a text that is JSON. Raises UserError, saying what it is if it is not."""
    try:
        return json.loads(content)
    except RecursionError:
        what = f"is not JSON of data: its brackets are nested too deeply; {AGAIN}"
    except json.JSONDecodeError as e:
        line = f"line {e.lineno}, " if "\n" in content.strip() else ""
        place = f"{line}column {e.colno}"
        if not begins_as_json(content):
            what = f"is not JSON but text that begins with {content.strip()[:40]!r}; {AGAIN}"
        elif e.msg == "Extra data":
            what = (f"is not JSON but several JSON values, of which the second begins at {place}; "
                    "put each on one line of its own, as jq -c does")
        elif e.pos >= len(content.rstrip()) or e.msg.startswith("Unterminated string"):
            what = f"is not JSON but the beginning of it: it breaks off ({place}); {AGAIN}"
        else:
            what = f"is not JSON ({e.msg}: {place}); {AGAIN}"
    except ValueError:              # of int()
        what = "has a number of more than 4,300 digits, which Python does not read; shorten it"
    raise UserError(f"{where} {what}")


def is_json(content):
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def rows_of(table, path):
    """The records of a JSON object that is a whole file: columns of equal length become rows, any
    other object is one record. Raises UserError, saying what the object is, if it is neither."""
    names, columns = ", ".join(list(table)[:4]), table.values()
    if all(isinstance(column, dict) for column in columns):
        raise UserError(f"{path} is one JSON object of objects ({names}); write a list of items, "
                        "which is orient='records' in pandas")
    lists = [column for column in columns if isinstance(column, list)]
    has_items = any(column and isinstance(column[0], dict) for column in lists)
    if has_items and not {"question", "Question", "input"} & table.keys():
        raise UserError(f"{path} is one JSON object with lists of items in it ({names}); write "
                        "each list into a file of its own")
    if len(lists) < len(columns):
        return [table]
    if len(set(map(len, lists))) > 1:
        raise UserError(f"{path} has columns of different lengths; {AGAIN}")
    return [dict(zip(table, row)) for row in zip(*lists)]


def read_records(path, least=1):
    """[(where, record)] of a file, which is told by its content and not by its name: JSON (a list
    of objects, an object of columns, an object per line) or lines 'question||cot #### answer'.
    Raises UserError, saying what else the file is, also where there are fewer than `least`."""
    content = read_text(path)
    first, _, rest = content.strip().partition("\n")
    if not begins_as_json(first) and ("||" in first or "####" in first):
        return [(where, parse_line(line, where)) for where, line in numbered_lines(path, content)]
    if rest and first[-1] in "}]" and is_json(first):
        return [(where, parse_json(line, where)) for where, line in numbered_lines(path, content)]
    whole = parse_json(content, path)
    if isinstance(whole, dict) and whole:
        whole = rows_of(whole, path)
    if not isinstance(whole, list) or len(whole) < least:
        raise UserError(f"{path} is JSON but holds no list of items; {AGAIN}")
    return [(f"{path}, item {i}", record) for i, record in enumerate(whole, 1)]


def read_split(path):
    """The items of one file of a data folder, each checked. -> list of dicts; raises UserError."""
    records = read_records(path, least=0)
    for where, item in records:
        if isinstance(item, dict) and "steps" not in item and (
                "cot" in item or "####" in str(item.get("answer"))):
            raise UserError(f"{where}: has no field 'steps': it is a record as they are exported; "
                            f"convert the file with 'python data_prep.py gsm8k-nl --from {path}'")
        check_item(item, where)
    return [item for _, item in records]


# ---------------------------------------------------------------- reading released files


def plain(answer):
    """An answer as text. Numbers have no commas; those from JSON are written out, without the noise
    of binary fractions: '1,450,000' -> '1450000', 51.0 -> '51', 2e-06 -> '0.000002',
    35.199999999999996 -> '35.2'."""
    if isinstance(answer, float):
        return format(Decimal(f"{answer:.15g}"), "f")
    answer = str(answer).strip()
    return without_commas(answer) if re.fullmatch(r"[-+]?[\d,]*\.?\d+", answer) else answer


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


def cot_of_answer(record, where):
    """A record without 'cot', as openai/gsm8k has them -> the same with 'cot': in its answer,
    "... <<2+3=5>>5\\n#### 5", what is before #### is the CoT. Raises UserError."""
    answer = record.get("answer")
    if not isinstance(answer, str) or "####" not in answer:
        if "steps" in record:
            raise UserError(f"{where}: has no field 'cot' but 'steps': this is the format of a "
                            "data folder; put the file there as train.json, valid.json or "
                            "test.json")
        require(False, where, "has no field 'cot', nor a CoT before '####' in field 'answer'")
    cot, _, answer = answer.partition("####")
    require("####" not in answer, where, "field 'answer' has '####' more than once")
    return {**record, "cot": cot, "answer": answer}


def cot_item(record, where):
    """{"question", "cot", "answer"} -> item. Steps are the <<equations>> of a CoT that has nothing
    else, or its sentences; it may have none. The answer is text, perhaps after ####, or a number.
    Without "cot" it is what the answer has before ####. Raises UserError."""
    check_fields(record, where, question=str)
    if "cot" not in record:
        record = cot_of_answer(record, where)
    check_fields(record, where, "cot", cot=str, answer=(str, int, float))
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


def gsm8k_item(record, where):
    """{"question", "cot": "<<a*b=c>> <<...>>", "answer"} -> item. An item may have no steps. Raises
    UserError."""
    item = cot_item(record, where)
    require(all(re.fullmatch(EQUATION, step) for step in item["steps"]), where,
            "has text between its <<...>> steps, as gsm8k-nl has")
    return item


def read_gsm8k(path):
    """The items of one file of GSM8k-Aug. Raises UserError."""
    return [gsm8k_item(record, where) for where, record in read_records(path)]


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


READERS = {     # name -> what reads one of its released files
    "prosqa": read_split,
    "gsm8k": read_gsm8k,
    "svamp": lambda path: read_problems(path, ("Body", "Question"), "Answer"),
    "gsm-hard": lambda path: read_problems(path, ("input",), "target"),
    "multiarith": lambda path: read_problems(path, ("input",), "target"),
}
