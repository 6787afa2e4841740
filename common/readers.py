"""Reading data files: what an item is and how it is checked, records, released and exported forms.
"""

import json
import math
import re
from decimal import Decimal
from pathlib import Path

from common.puzzles import SPLITS, in_steps
from common.runtime import UserError

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


READERS = {     # name -> what reads one of its released files
    "prosqa": read_split,
    "gsm8k": read_gsm8k,
    "svamp": lambda path: read_problems(path, ("Body", "Question"), "Answer"),
    "gsm-hard": lambda path: read_problems(path, ("input",), "target"),
    "multiarith": lambda path: read_problems(path, ("input",), "target"),
}
