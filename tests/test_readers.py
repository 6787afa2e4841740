"""common/readers.py: every form of a data file, what else a file is, items that are refused."""

import bz2
import gzip
import json
import lzma
import pickle

import pytest

import data_prep as dp
from common.readers import gsm8k_item, read_cots, read_gsm8k, read_split
from common.runtime import UserError

ITEMS = [{"question": "What is 1 + 1?", "steps": ["<<1+1=2>>"], "answer": "2"},
         {"question": "Où sont\u2028les 3?", "steps": [], "answer": "là-bas, é"},
         {"question": "[2, 5] || 3?", "steps": ["a {b}", "c\nd"], "answer": "[2, 5]"}]
COLUMNS = {field: [item[field] for item in ITEMS] for field in ITEMS[0]}
LINES = "\n".join(map(json.dumps, ITEMS))
FORMS = {"list": json.dumps(ITEMS), "indented": json.dumps(ITEMS, indent=2),
         "not escaped": json.dumps(ITEMS, ensure_ascii=False), "BOM": "\ufeff" + json.dumps(ITEMS),
         "JSON Lines": LINES + "\n", "JSON Lines with a BOM": "\ufeff" + LINES,
         "JSON Lines of Windows": LINES.replace("\n", "\r\n"),
         "JSON Lines with blank lines": "\n\n" + LINES.replace("\n", "\n\n") + "\n\n",
         "columns": json.dumps(COLUMNS), "indented columns": json.dumps(COLUMNS, indent=4)}


def save(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(read, path):
    """The sentence with which a reader refuses a file; it names the file."""
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- one reader


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["train.json", "train.txt"])
def test_every_form_of_a_data_folders_own_file(tmp_path, form, name):
    """Told by the content, whatever the name."""
    assert read_split(save(tmp_path / name, FORMS[form])) == ITEMS


@pytest.mark.parametrize("form", FORMS)
def test_a_data_set_of_that_form_loads(tmp_path, form):
    save(tmp_path / "train.json", FORMS[form])
    save(tmp_path / "test.json", json.dumps([{**ITEMS[0], "question": "Another?"}]))
    for _ in ("read", "known to be good"):
        assert dp.load(tmp_path, need=("train", "test"))["train"] == ITEMS
    assert dp.main(["stats", str(tmp_path)]) == 0


def test_one_item(tmp_path):
    assert read_split(save(tmp_path / "a", json.dumps(ITEMS[0]))) == ITEMS[:1]
    assert read_split(save(tmp_path / "a", json.dumps(ITEMS[0], indent=1))) == ITEMS[:1]
    assert read_split(save(tmp_path / "a", "[]")) == []


def test_lines_are_told_by_their_content(tmp_path):
    """'question||cot #### answer', even where the first question begins like JSON."""
    lines = "[2, 5]: which is larger?||<<5-2=3>> #### 5\n{x}?||<<1+1=2>> #### 2\n"
    items = [{"question": "[2, 5]: which is larger?", "steps": ["<<5-2=3>>"], "answer": "5"},
             {"question": "{x}?", "steps": ["<<1+1=2>>"], "answer": "2"}]
    for name in ("a.txt", "a.json", "a"):
        path = save(tmp_path / name, lines)
        assert read_cots(path) == read_gsm8k(path) == items


def test_gsm8k_as_json(tmp_path):
    """GSM8k-Aug, exported with datasets, is the same as its text file."""
    record = {"question": "A?", "cot": "<<1+2=3>> <<3*4=12>>", "answer": "12"}
    item = {"question": "A?", "steps": ["<<1+2=3>>", "<<3*4=12>>"], "answer": "12"}
    assert read_gsm8k(save(tmp_path / "a.jsonl", json.dumps(record))) == [item]
    with pytest.raises(UserError, match="here: has text between its <<...>> steps"):
        gsm8k_item({**record, "cot": "So <<1+2=3>>"}, "here")


PAGE = "<!DOCTYPE html>\n<html><head><title>question||#### 5</title></head></html>"
NOT_DATA = {
    "is HTML": PAGE, "is HTML, a web page; download the raw file": "\ufeff\n" + PAGE.lower(),
    "is XML": '<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "is a Git LFS pointer":
        "version https://git-lfs.github.com/spec/v1\noid sha256:0a39\nsize 87805358\n",
    "is a git-annex pointer": "/annex/objects/SHA256E-s42--0a39.json\n",
    "(CSV or TSV); write it as JSON Lines": "question,cot,answer\nWhat?,So,5\n",
    "is a table of columns": '\ufeff,"question"\t"steps"\r\n',
    "is UTF-16 text, not UTF-8; save it as UTF-8": json.dumps(ITEMS).encode("utf-16"),
    "is UTF-16 text": json.dumps(ITEMS).encode("utf-16-le"),
    "is not UTF-8 text (line 2 has the byte 0xe9)": '[\n"é"]'.encode("latin-1"),
    "is a Parquet file; write it as JSON": b"PAR1\x15\x04", "is an Arrow file": b"ARROW1\0\0",
    "is an Arrow file; write": b"\xff\xff\xff\xff8", "is a Python pickle": pickle.dumps(ITEMS),
    "is an SQLite database": b"SQLite format 3\0\x10", "is a PDF file": b"%PDF-1.7\n",
    "is compressed with gzip; unpack it": gzip.compress(LINES.encode()),
    "is compressed with xz": lzma.compress(LINES.encode()),
    "is compressed with bzip2": bz2.compress(LINES.encode()),
    "is compressed with zstd": b"\x28\xb5\x2f\xfd\x24", "is a ZIP archive": b"PK\x03\x04\x14",
    "is a 7z archive": b"7z\xbc\xaf\x27\x1c\0", "is empty": " \n\n",
    "is not JSON but text that begins with '404: Not Found'": "404: Not Found",
    "is not JSON (Expecting property name enclosed in double": "[{'question': 'Q'}]",
    "is not JSON but the beginning of it: it breaks off (line 7, column": FORMS["indented"][:90],
    "but the beginning of it": json.dumps(ITEMS)[:-1],
    "is not JSON (Expecting": '[{"question": "a",, "answer": "b"}]',
    "is not JSON but several JSON values, of which the second begins at line 5":
        "\n".join(json.dumps(item, indent=1) for item in ({"a": 1, "b": 2}, {"c": 3})),
    "line 2 is not JSON but the beginning of it": LINES[:-150],
    "line 3 is not JSON but text that begins with 'more'": LINES.split("\n")[0] + "\n\nmore\n",
    "line 1: is list, not an object": '["Q?", "2"]\n["R?", "3"]\n',
    "is JSON but holds no list of items": "3", "is JSON but holds no list": "{}",
    "is one JSON object with lists of items in it (train, test); write each list":
        json.dumps({"train": ITEMS, "test": ITEMS}),
    "lists of items in it (version, data)": json.dumps({"version": "1", "data": ITEMS}),
    "is one JSON object of objects (question, answer); write a list":
        json.dumps({"question": {"0": "Q?"}, "answer": {"0": "5"}}),
    "has columns of different lengths": '{"question": ["a"], "steps": [], "answer": ["b"]}',
    "has a number of more than 4,300 digits": "[" + "9" * 5000 + "]",
    "its brackets are nested too deeply": "[" * 10 ** 5,
}


@pytest.mark.parametrize("what", NOT_DATA)
def test_what_a_file_is(tmp_path, what):
    """The same sentence from a data folder's own file and by --from."""
    path = save(tmp_path / "train.json", NOT_DATA[what])
    assert what in refusal(read_split, path)
    assert refusal(read_cots, path) == refusal(read_gsm8k, path) == refusal(read_split, path)


def test_a_missing_file(tmp_path):
    assert "does not exist; check the path" in refusal(read_split, tmp_path / "train.json")


def test_json_lines_of_another_name(tmp_path):
    save(tmp_path / "train.jsonl", LINES)
    with pytest.raises(UserError, match="no train.json.*; rename train.jsonl to train.json"):
        dp.load(tmp_path)


def test_exported_records_in_a_data_folder(tmp_path):
    for content in ("Q?||So it is 5. #### 5", '{"question": "Q?", "cot": "So.", "answer": "5"}',
                    '{"question": "Q?", "answer": "So. #### 5"}'):
        said = refusal(read_split, save(tmp_path / "train.json", content))
        assert "has no field 'steps': it is a record as they are exported" in said
        assert f"gsm8k-nl --from {tmp_path}" in said


# ---------------------------------------------------------------- openai/gsm8k

GSM8K = {"question": "Ann has 2 pens and 3 more. How many are 1,000 times that?",
         "answer": "Ann has 2+3 = <<2+3=5>>5 pens.\nThat is 1000*5 = <<1000*5=5000>>5,000.\n"
                   "#### 5,000"}
ITEM = {"question": GSM8K["question"], "answer": "5000",
        "steps": ["Ann has 2+3 = <<2+3=5>>5 pens.", "That is 1000*5 = <<1000*5=5000>>5,000."]}


def test_the_records_of_gsm8k(tmp_path, capsys):
    """What is before #### is the CoT; the same item as from a field 'cot' and as from a line."""
    cot = GSM8K["answer"].partition("####")[0]
    alike = [GSM8K, {**GSM8K, "answer": "5,000", "cot": cot}, {**GSM8K, "answer": 5000, "cot": cot},
             {**GSM8K, "answer": GSM8K["answer"].replace("\n", " ")}]
    path = save(tmp_path / "test.jsonl", "\n".join(map(json.dumps, alike)))
    assert read_cots(path) == [ITEM] * 4
    line = f"{GSM8K['question']}||{alike[3]['answer']}"
    assert read_cots(save(tmp_path / "a.txt", line)) == [ITEM]
    columns = {field: [GSM8K[field]] * 2 for field in GSM8K}
    assert read_cots(save(tmp_path / "a.json", json.dumps(columns))) == [ITEM] * 2
    argv = ["gsm8k-nl", "--from", str(path), "--out", str(tmp_path / "gsm8k-nl")]
    assert dp.main(argv) == 0 and capsys.readouterr().out.endswith("gsm8k-nl: test 4\n")
    assert dp.load(tmp_path / "gsm8k-nl", need=("test",))["test"] == [ITEM] * 4


@pytest.mark.parametrize("answer, steps", [
    ("#### 5", []), ("<<2+3=5>>\n#### 5", ["<<2+3=5>>"]), ("So.####5", ["So."])])
def test_a_short_cot_before_the_answer(tmp_path, answer, steps):
    path = save(tmp_path / "a.json", json.dumps({"question": "Q?", "answer": answer}))
    assert read_cots(path) == [{"question": "Q?", "steps": steps, "answer": "5"}]


@pytest.mark.parametrize("change, words", [
    ({"answer": "So it is 5."}, "item 1: has no field 'cot', nor a CoT before '####'"),
    ({"answer": 5}, "item 1: has no field 'cot', nor a CoT before '####'"),
    ({"answer": "a #### 5 #### 6"}, "item 1: field 'answer' has '####' more than once"),
    ({"answer": "It is 5. ####"}, "item 1: field 'answer' is empty"),
    ({"answer": "5", "steps": []}, "has no field 'cot' but 'steps': this is the format of a data"),
    ({"question": ...}, "item 1: has no field 'question'")])
def test_records_without_a_cot(tmp_path, change, words):
    record = {field: value for field, value in {**GSM8K, **change}.items() if value is not ...}
    assert words in refusal(read_cots, save(tmp_path / "a.json", json.dumps([record])))


# ---------------------------------------------------------------- text that cannot be encoded

HALF = "Ann \ud83d has 3 pens."


@pytest.mark.parametrize("change, field", [
    ({"question": HALF}, "field 'question'"), ({"answer": HALF}, "field 'answer'"),
    ({"steps": ["fine", HALF]}, "field 'steps', step 2,"), ({"note": HALF}, "field 'note'"),
    ({"idx_to_symbol": ["Tom", HALF]}, "field 'idx_to_symbol'"),
    ({"more": {"a": [{"b": HALF}]}}, "field 'more'"), ({"more": {HALF: 1}}, "field 'more'"),
    ({HALF: 1}, "the name of a field"), ({"question": "\udc00"}, "field 'question'")])
def test_half_of_a_surrogate_pair(tmp_path, capsys, change, field):
    """Named, where it is read and where it is written, before anything tokenizes or writes it."""
    bad = [ITEMS[0], {**ITEMS[1], **change}]
    half = "\\udc00" if change == {"question": "\udc00"} else "\\ud83d"
    words = f"item 2: {field} has '{half}', half of a surrogate pair, which cannot be encoded"
    assert words in refusal(read_split, save(tmp_path / "train.json", json.dumps(bad)))
    with pytest.raises(UserError) as error:
        dp.write_dataset(tmp_path / "new", {"test": bad})
    assert words in str(error.value) and not (tmp_path / "new").exists()
    with pytest.raises(UserError) as error:
        dp.load(tmp_path, need=("train",))
    assert words in str(error.value)
    assert dp.main(["stats", str(tmp_path)]) == 2 and words in capsys.readouterr().err


def test_whole_surrogate_pairs_and_unused_fields(tmp_path):
    """A pair is a character; what an exported record has besides is not read."""
    record = {"question": "😀?", "cot": "So.", "answer": "😀", "id": HALF}
    path = save(tmp_path / "a.json", json.dumps(record))
    assert "\\ud83d\\ude00" in path.read_text()
    assert read_cots(path) == [{"question": "😀?", "steps": ["So."], "answer": "😀"}]
    for field in ("question", "cot", "answer"):
        bad = save(tmp_path / "bad.json", json.dumps([record, {**record, field: HALF}]))
        assert f"item 2: field '{field}' has '\\ud83d'" in refusal(read_cots, bad)


# ---------------------------------------------------------------- what an answer is


@pytest.mark.parametrize("answer, read", [
    ("5 #### 5", "5"), ("<|endoftext|>5", ""), ("5<|endoftext|>6", "5"), ("5\n6", "5"), ("$", ""),
    ("The answer is: 5", "5"), ("It is ### 5", "5"), ("###", ""), ("a\nb", "a")])
def test_an_answer_that_no_model_could_give(tmp_path, capsys, answer, read):
    """Read from a data folder, given by --from or generated: file and item are named."""
    bad = [ITEMS[0], {**ITEMS[1], "answer": answer}]
    words = f"item 2: field 'answer' is {answer!r}, of which the scorer reads {read!r}"
    assert words in refusal(read_split, save(tmp_path / "train.json", json.dumps(bad)))
    with pytest.raises(UserError) as error:
        dp.write_dataset(tmp_path / "new", {"test": bad})
    assert f"{tmp_path}/new/test.json, {words}" in str(error.value)
    assert not (tmp_path / "new").exists()
    assert dp.main(["stats", str(tmp_path)]) == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("answer", [
    "5", "-$1,200.50", "1,2,3", "5.", "Bob, Eve", "# 5", "## a", "5 < 6", "<bot>", " 5 ", "5\n",
    "nan", "The answer", "é", "٣", "$x", "1/2"])
def test_an_answer_that_scores(tmp_path, answer):
    items = [{**ITEMS[0], "answer": answer}]
    assert read_split(save(tmp_path / "train.json", json.dumps(items))) == items


@pytest.mark.parametrize("written, kept", [
    ("1,450,000", "1450000"), ("-1,000.5", "-1000.5"), ("1,2,3", "1,2,3"), ("12,34", "12,34"),
    ("1234,567", "1234,567"), (",5", ",5"), ("Bob, Eve", "Bob, Eve"), ("$1,200", "$1,200")])
def test_commas_in_an_exported_answer(tmp_path, written, kept):
    """Only those between groups of three digits are left out."""
    record = {"question": "Q?", "cot": "", "answer": written}
    item, = read_cots(save(tmp_path / "a.json", json.dumps(record)))
    assert item["answer"] == kept


def test_stats_count_as_the_scorer_does():
    """A number is what the scorer compares as a number, and answers that score alike are one."""
    answers = ["2.5", "2.50", "$2.5", "+2.5", "2.5.", "1,000", "1,2,3", "C", "five"]
    rows = dp.stats([{**ITEMS[0], "answer": answer} for answer in answers])
    assert rows["numeric answers, %"] == pytest.approx(100 * 6 / 9)
    assert rows["floor: one answer for all, %"] == pytest.approx(100 * 5 / 9)
