"""data_prep.py: CoTs in sentences, exported files, test sets of other word problems, harder chains.

No network."""

import collections
import hashlib
import json
import os
import re

import pytest

import data_prep as dp
from common.files import RELEASED
from common.puzzles import chains, chains_larger, chains_longer, chains_mixed
from common.readers import READERS, read_cots, sentences
from common.runtime import UserError
from common.scoring import is_correct
from test_text import solve


def run(capsys, *argv):
    """(exit status, output, messages) of one command."""
    status = dp.main([str(a) for a in argv])
    return status, *capsys.readouterr()


def refused(capsys, out, *argv):
    """The one sentence of a command that fails with status 2 and writes nothing."""
    status, _, message = run(capsys, *argv, "--out", out)
    assert status == 2 and not list(out.glob("*")) and len(message.splitlines()) == 1
    return message.removeprefix("data_prep.py: ")


# ---------------------------------------------------------------- sentences

@pytest.mark.parametrize("text", [       # | marks the places where the next step begins
    "Natalia sold 48/2 = 24 clips in May. |Altogether she sold 48+24 = 72 clips in April and May.",
    "He spent 3.5 hours. |It cost $4.50. |So $9.00 - $4.50 = $4.50 is left!",
    "A pen costs $.50. |3 pens cost 3 * .50 = $1.50. |12 pens cost $6",
    "Mr. Benson and Mrs. Doré paid $200. |Dr. Jones paid half.",
    "The wall is 8 ft. * 20 ft. = 160 sq. ft. |The door is 3 ft. * 7 ft. = 21 sq. ft. of it.",
    "Two are 100 sq.ft. = 200 sq.ft. |The third is 10ft * 12ft = 120 sq.ft. of that, 20 km/2 km "
    "per hr. = 10.",
    "He left at 7:50 a.m. and came at 8:20 a.m. |If the bus leaves at 8 P.M. |Kath waits.",
    "30 dresses, i.e. 30/2 = 15 pairs, vs. 20 before. |That is 15 lbs. each, at $2/hr. or less.",
    "After 12, 14... seconds it is on. |31 / 3 = 10.33..., so 10. |Or 16.66...% of it... "
    "|That is all",
    "2y + 100 = 1000. |2y = 900. |x + 3*x = 80 x=20. |So Y. |Then B is 5.",
    'She said "no." |He asked (twice?) |"Why?" |Then 2 + 2 = 4.',
    "1. Tonya made $50. |2. She sold 5. |10 are left.",
    "Half is 12\n|Twice that is 24. |Is it?\n\n|Yes!",
    "(X-2)*3 = 63. |(X-2) = 21. - 5 apples",
    "The annual budget for policing is 32 / 2 = $16 million. |The combined budget for education "
    "and policing is 16 + 12 = $28 million. |There is 32 - 28 = $4 million to manage public "
    "spaces.",
    "He spent 17 + 11 = €28. |So, he still has 100 – 28 = €72 remaining.",
    "The dress was $50 and 30% off so 50*.30 = $15 discount price "
    "The dress cost $50 minus $15 (30% off discount) so 50-15 = $35",
    "It costs 2 dollars. |so four cost 8.", 'She earns $350. "', "120 min",
    "12 pounds.. |Half of it."])
def test_sentences(text):
    """Typical and hand-made cases. A step also ends with its line."""
    assert sentences(text.replace("|", "")) == [step.strip() for step in text.split("|")]


@pytest.mark.parametrize("text", [
    "", "  \n ", ". . .", "...", "a.b. c", "?! x", "\u2028 A. B\r\n\n* One. * Two.",
    "A.\u00a0B.", "**No.** 5. 6", "1. 2. 3.",
    "14 pieces/house * 60 houses = 840 pieces Then find the total: 11 * 75 = 825 pieces",
    ") . ( Mr. . sq. Ft"])
def test_sentences_lose_nothing(text):
    steps = sentences(text)
    assert " ".join(steps).split() == text.split()
    assert all(step == step.strip() != "" for step in steps)


# ---------------------------------------------------------------- exported files

RECORDS = [{"question": "Ann has 3.5 kg of flour. How much is twice that?",
            "cot": "Twice 3.5 is 3.5 * 2 = 7. So it is 7.", "answer": "7"},
           {"question": "What is 1,000 + 1\u2028?", "cot": "", "answer": "1,001"},
           {"question": "Half of 5?", "cot": "<<5/2=2.5>>", "answer": "#### 2.5"}]
ITEMS = [{"question": RECORDS[0]["question"],
          "steps": ["Twice 3.5 is 3.5 * 2 = 7.", "So it is 7."], "answer": "7"},
         {"question": "What is 1,000 + 1\u2028?", "steps": [], "answer": "1001"},
         {"question": "Half of 5?", "steps": ["<<5/2=2.5>>"], "answer": "2.5"}]
AS_TEXT = "".join(f"{r['question']}||{r['cot']} #### {r['answer'].removeprefix('#### ')}\n"
                  for r in RECORDS)
FORMS = {"train.json": json.dumps(RECORDS), "train.jsonl": "\n".join(map(json.dumps, RECORDS)),
         "other.json": json.dumps(RECORDS, indent=2),
         "lines.json": "\n\n".join(map(json.dumps, RECORDS)) + "\n",
         "train.txt": AS_TEXT, "bom.txt": "\ufeff" + AS_TEXT,
         "columns.json": json.dumps({k: [r[k] for r in RECORDS] for k in RECORDS[0]}),
         "crlf.txt": AS_TEXT.replace("\n", "\r\n")}


def many(n, start=0):
    return [{"question": f"What is {i} + 1?", "cot": f"It is {i + 1}.", "answer": str(i + 1)}
            for i in range(start, start + n)]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_items(tmp_path, name):
    (tmp_path / name).write_text(FORMS[name], encoding="utf-8", newline="")
    assert read_cots(tmp_path / name) == ITEMS


def test_one_record_and_numbers(tmp_path):
    (tmp_path / "a.json").write_text('{"question": "Q?", "cot": "A. B.", "answer": 3.0, "id": 7}')
    item = {"question": "Q?", "steps": ["A.", "B."], "answer": "3"}
    assert read_cots(tmp_path / "a.json") == [item]


def test_null_answers_are_left_out_and_counted(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps([RECORDS[0], {**RECORDS[1], "answer": None}]))
    assert read_cots(tmp_path / "a.json") == ITEMS[:1]
    assert "1 items without an answer are left out" in capsys.readouterr().out


def test_valid_is_held_out_of_train(tmp_path, capsys):
    """Always the same items, whatever the order of the file and what else is in it; no question in
    both."""
    def held(records):
        (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, records)))
        status, out, _ = run(capsys, "gsm8k-nl", "--from", tmp_path / "all.jsonl", "--valid", 20,
                             "--out", tmp_path / "nl")
        assert status == 0 and "20 items of train become it" in out and "has no test" in out
        splits = dp.load(tmp_path / "nl", need=("train", "valid"))
        assert set(splits) == {"train", "valid"}
        train, valid = ([item["question"] for item in splits[s]] for s in ("train", "valid"))
        assert not set(train) & set(valid) and len(set(valid)) == 20
        assert set(train + valid) == {r["question"] for r in records}
        return valid
    first = held(many(200))
    assert held(many(200)[::-1]) == first and held(many(200) + many(200)) == first
    assert set(held(many(150))) & set(first) == {q for q in first if int(q.split()[2]) < 150}
    questions = [r["question"] for r in many(200)]
    for order in (questions, sorted(questions)):        # neither the first nor the last ones
        assert set(first) != set(order[:20]) and set(first) != set(order[-20:])


def test_commonsense_from_folder(tmp_path, capsys):
    """validation is the test, as CODI's authors evaluate; a valid file is used if there is one."""
    for name, records in (("train", many(30)), ("validation", many(5, 100))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    status, out, _ = run(capsys, "commonsense", "--from", tmp_path, "--valid", 4,
                         "--out", tmp_path / "commonsense")
    assert status == 0 and out.endswith("commonsense: train 26, valid 4, test 5\n")
    assert "no test" not in out
    test = dp.load("commonsense", tmp_path)["test"]
    assert [i["question"] for i in test] == [r["question"] for r in many(5, 100)]
    (tmp_path / "valid.json").write_text(json.dumps(many(3, 200)))
    _, out, _ = run(capsys, "commonsense", "--from", tmp_path, "--out", tmp_path / "c")
    assert out.endswith("train 30, valid 3, test 5\n")
    status, out, _ = run(capsys, "commonsense", "--from", tmp_path / "validation.jsonl",
                         "--out", tmp_path / "d")
    assert status == 0 and out.endswith("d: test 5\n")
    assert run(capsys, "stats", tmp_path / "c")[0] == 0


def test_gsm8k_nl_takes_the_test_of_gsm8k(tmp_path, capsys):
    (tmp_path / "train.json").write_text(json.dumps(many(9)))
    (tmp_path / "test.txt").write_text("Q?||<<1+1=2>> <<2+2=4>> #### 4\n")
    status, _, _ = run(capsys, "gsm8k-nl", "--from", tmp_path, "--valid", 1,
                       "--out", tmp_path / "gsm8k-nl")
    assert status == 0
    assert dp.load("gsm8k-nl", tmp_path)["test"] == [
        {"question": "Q?", "steps": ["<<1+1=2>>", "<<2+2=4>>"], "answer": "4"}]


@pytest.mark.parametrize("name, repository", [
    ("gsm8k-nl", "zen-E/GSM8k-Aug-NL"), ("commonsense", "zen-E/CommonsenseQA-GPT4omini")])
def test_how_to_export(tmp_path, capsys, name, repository):
    message = refused(capsys, tmp_path / "x", name)
    assert f'load_dataset("{repository}")["train"].to_json("train.jsonl")' in message
    assert "--from PATH" in message


GOOD = json.dumps(RECORDS[0])


@pytest.mark.parametrize("name, content, words", [
    ("a.json", "", "is empty"), ("a.json", "[]", "holds no list of items"),
    ("a.json", "3", "holds no list of items"), ("a.json", "{}", "holds no list of items"),
    ("a.json", "null", "holds no list of items"),
    ("a.json", f"[{GOOD}, {GOOD[:-9]}", "a.json is not JSON"),
    ("a.json", "[" * 10 ** 5, "a.json is not JSON"),
    ("a.json", b"\xff\xfe[", "not UTF-8"),
    ("a.json", f"[{GOOD}, 3]", "item 2: is int, not an object"),
    ("a.json", '{"question": ["a"], "cot": [], "answer": ["b"]}', "columns of different lengths"),
    ("a.json", '{"question": ["a"], "answer": ["b"]}', "item 1: has no field 'cot'"),
    ("a.jsonl", f"{GOOD}\n{GOOD[:-9]}\n", "line 2 is not JSON"),
    ("a.jsonl", f"{GOOD[:-9]}\n{GOOD}\n", "a.jsonl is not JSON"),
    ("a.jsonl", f"{GOOD}\n\n[1]\n", "line 3: is list, not an object"),
    ("a.jsonl", f"{GOOD}\n{{}}\n", "line 2: has no field 'question'"),
    ("a.json", json.dumps([{"question": "Q", "cot": "c"}]), "item 1: has no field 'answer'"),
    ("a.json", json.dumps([{**RECORDS[0], "question": 3}]), "'question' is int, not str"),
    ("a.json", json.dumps([{**RECORDS[0], "question": " "}]), "'question' is empty"),
    ("a.json", json.dumps([{**RECORDS[0], "cot": ["a"]}]), "'cot' is list, not str"),
    ("a.json", json.dumps([{**RECORDS[0], "answer": "####"}]), "'answer' is empty"),
    ("a.json", json.dumps([{**RECORDS[0], "answer": True}]),
     "'answer' is bool, not str or int or float"),
    ("a.json", json.dumps([{**RECORDS[0], "answer": float("nan")}]), "'answer' is nan"),
    ("a.json", json.dumps([{**RECORDS[0], "cot": "\ud800 x"}] + many(9)),
     "a.json, item 1: field 'cot' has '\\ud800', half of a surrogate pair"),
    ("a.txt", AS_TEXT + "Q? no bars #### 4", "line 4 is not 'question||"),
    ("a.txt", "Q?||a #### 1 #### 2", "line 1 is not 'question||"),
    ("a.txt", "Q?||a #### \n", "line 1: field 'answer' is empty"), ("a.txt", "\n\n", "is empty"),
    ("a.json", json.dumps(many(8) * 2), "8 different questions are too few to hold out 8 of them")])
def test_bad_export(tmp_path, capsys, name, content, words):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in refused(capsys, tmp_path / "nl", "gsm8k-nl", "--from", tmp_path / name,
                            "--valid", 8)


def test_absent_export(tmp_path, capsys):
    for source in (tmp_path, tmp_path / "nowhere"):
        message = refused(capsys, tmp_path / "x", "commonsense", "--from", source)
        assert "none of the commonsense files" in message
        assert "validation.jsonl" in message and str(source) in message


# ---------------------------------------------------------------- test sets of other word problems

SVAMP = [{"ID": "chal-1", "Body": "Each pack costs 76 dollars", "Question": "How much are 2 packs?",
          "Equation": "( 76.0 * 2.0 )", "Answer": 152.0, "Type": "Multiplication"},
         {"ID": "chal-2", "Body": "Dan had $ 4.", "Question": " How much is half? ",
          "Equation": "( 4.0 / 2.0 )", "Answer": 2.0, "Type": "Division"}]
TARGETS = (-9867630.0, 2.0107e-06, 3244047.0999999996, 17.5, 1e20, 0.0, 123456789012.0, 0.1)
HARD = [{"input": f"How much is x{i}?", "code": "def solution():\n    return 1", "target": target}
        for i, target in enumerate(TARGETS)]
ARITH = [{"input": "Luke had 2 + 2 games. How many?", "target": 4}] * 2
ALL = {"svamp": SVAMP, "gsm-hard": HARD, "multiarith": ARITH}
SETS = {"svamp": ("SVAMP.json", json.dumps(SVAMP, indent=4), ["152", "2"]),
        "gsm-hard": ("gsmhardv2.jsonl", "".join(json.dumps(r) + "\n" for r in HARD), [
            "-9867630", "0.0000020107", "3244047.1", "17.5", "100000000000000000000", "0",
            "123456789012", "0.1"]),
        "multiarith": ("mawpsmultiarith.jsonl", "\n".join(map(json.dumps, ARITH)), ["4", "4"])}


@pytest.mark.parametrize("name", SETS)
def test_a_test_set(tmp_path, capsys, monkeypatch, name):
    """From a file of any name, from a folder, and by download: only test.json, with questions and
    answers as released."""
    file, content, answers = SETS[name]
    data = tmp_path / "data"
    (tmp_path / file).write_text(content)
    (tmp_path / "x").write_text(content)
    sha = hashlib.sha256(content.encode()).hexdigest()
    released = (tmp_path / file).as_uri(), len(content), sha
    monkeypatch.setitem(RELEASED, name, {"test": released})
    for source in (["--from", tmp_path / "x"], ["--from", tmp_path], []):
        status, out, _ = run(capsys, name, *source, "--out", data / name)
        assert status == 0 and out.endswith(f"{name}: test {len(answers)}\n")
        splits = dp.load(name, data, need=("test",))
        assert list(splits) == ["test"]
        assert [item["answer"] for item in splits["test"]] == answers
        assert all(item["steps"] == [] for item in splits["test"])
    values = [record.get("target", record.get("Answer")) for record in ALL[name]]
    assert [float(answer) for answer in answers] == pytest.approx(values, rel=1e-14, abs=0)
    for answer, item in zip(answers, splits["test"]):
        assert is_correct(f"The answer is: {answer}", item["answer"])
    assert run(capsys, "stats", data / name)[0] == 0
    words = f"{name} is a test set alone, with no train and no valid split"
    with pytest.raises(UserError, match=words):
        dp.load(name, data)


def test_svamp_question(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(SVAMP))
    assert [item["question"] for item in READERS["svamp"](tmp_path / "a.json")] == [
        "Each pack costs 76 dollars How much are 2 packs?", "Dan had $ 4. How much is half?"]


@pytest.mark.parametrize("name, field, answer", [
    ("svamp", "Body", "Answer"), ("svamp", "Question", "Answer"), ("gsm-hard", "input", "target"),
    ("multiarith", "input", "target")])
def test_bad_test_set(tmp_path, capsys, name, field, answer):
    good = ALL[name][0]
    for change, words in (
            ({field: ...}, f"has no field '{field}'"), ({answer: ...}, f"has no field '{answer}'"),
            ({field: 5}, f"'{field}' is int, not str"), ({field: ""}, f"'{field}' is empty"),
            ({answer: "5"}, f"'{answer}' is str, not int or float"),
            ({answer: None}, "is NoneType"), ({answer: True}, "is bool"),
            ({answer: float("inf")}, f"'{answer}' is inf")):
        bad = {k: v for k, v in {**good, **change}.items() if v is not ...}
        (tmp_path / "a").write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
        message = refused(capsys, tmp_path / "out", name, "--from", tmp_path / "a")
        assert f"{tmp_path}/a, line 2: " in message and words in message
    for content, words in (
            ("", "is empty"), ("[]", "no list of items"), ('[{"a": 1', "not JSON"),
            (json.dumps(good)[:-3], "not JSON"), ("\x00", "not JSON"),
            ('"a"', "no list of items"), ("[[]]", "item 1: is list")):
        (tmp_path / "a").write_text(content)
        assert words in refused(capsys, tmp_path / "out", name, "--from", tmp_path / "a")
    message = refused(capsys, tmp_path / "out", name, "--from", tmp_path / "nowhere")
    assert "nowhere has none of the" in message


def test_download_that_is_another_file(tmp_path, capsys, monkeypatch):
    (tmp_path / "SVAMP.json").write_text(json.dumps(SVAMP))
    other = (tmp_path / "SVAMP.json").as_uri(), *RELEASED["svamp"]["test"][1:]
    monkeypatch.setitem(RELEASED, "svamp", {"test": other})
    assert run(capsys, "svamp", "--out", tmp_path / "svamp")[0] == 2
    assert os.listdir(tmp_path / "svamp") in ([], ["raw"])
    assert os.listdir(tmp_path / "svamp" / "raw") == []


def test_named_file_is_its_split(tmp_path, capsys):
    """--from FILE for data of several splits: the split that the name says."""
    (tmp_path / "test.txt").write_text("Q?||#### 1\n")
    _, out, _ = run(capsys, "gsm8k", "--from", tmp_path / "test.txt", "--out", tmp_path / "g")
    assert out.endswith("g: test 1\n")


# ---------------------------------------------------------------- harder chains

@pytest.fixture(scope="module")
def larger():
    return chains_larger()


def test_chains_longer():
    """1,000 items of 4 operations, so no question of chains, which has 3; the rest as in chains."""
    splits = chains_longer()
    assert splits == chains_longer() and list(splits) == ["test"]
    assert len(splits["test"]) == 1000
    assert len({item["question"] for item in splits["test"]}) == 1000
    for item in splits["test"]:
        values, needed, order, steps, _ = solve(item["question"])
        assert item["steps"] == steps and len(steps) == 4
        assert item["answer"] == str(values[-1]) and len(order) == 5
        assert max(values) < 20
    assert all(len(item["steps"]) == 3 for item in chains((300, 1, 1))["train"])


def test_chains_larger(larger):
    """1,000 items of 3 operations; each has a count that chains cannot have, up to 39; every number
    is known."""
    assert list(larger) == ["test"]
    assert len(larger["test"]) == len({item["question"] for item in larger["test"]}) == 1000
    assert chains_larger() == larger
    highest, answers = [], []
    for item in larger["test"]:
        values, _, _, steps, _ = solve(item["question"])
        assert item["steps"] == steps and len(steps) == 3 and item["answer"] == str(values[-1])
        highest.append(max(values))
        answers.append(values[-1])
    assert min(highest) == 20 and max(highest) == 39 and sum(a >= 20 for a in answers) > 500

    def numbers(items):
        told = " ".join(item["question"] + " ".join(item["steps"]) for item in items)
        return set(re.findall(r"\d+", told))

    train = chains((3000, 1, 1))["train"]
    assert numbers(larger["test"]) <= numbers(train)
    assert all(max(solve(item["question"])[0]) < 20 for item in train)


def test_chains_mixed():
    """Train has 1, 2 and 3 operations as 1 : 1 : 4; valid and test are those of chains, whatever
    train's size."""
    mixed, plain = chains_mixed((1200, 20, 30)), chains((5, 20, 30))
    assert mixed["valid"] == plain["valid"] and mixed["test"] == plain["test"]
    counts = collections.Counter(len(item["steps"]) for item in mixed["train"])
    assert set(counts) == {1, 2, 3}
    assert all(abs(counts[n] - share) < 90 for n, share in ((1, 200), (2, 200), (3, 800)))


def test_chains_mixed_of_other_lengths(tmp_path):
    """--n-steps N: N operations in valid and test; in train 1 to N, mostly N."""
    flags = ["--n-steps", "2", "--sizes", "500,5,6", "--out", str(tmp_path / "two")]
    assert dp.main(["chains-mixed", *flags]) == 0
    splits = dp.load(str(tmp_path / "two"))
    counts = collections.Counter(len(item["steps"]) for item in splits["train"])
    assert set(counts) == {1, 2} and abs(counts[1] - 100) < 45
    assert {len(item["steps"]) for item in splits["valid"] + splits["test"]} == {2}


@pytest.mark.parametrize("name", ["chains-longer", "chains-larger"])
def test_harder_chains_are_made_when_absent(tmp_path, capsys, monkeypatch, larger, name):
    monkeypatch.setitem(dp.EMBEDDED, "chains-larger", lambda: larger)
    splits = dp.load(name, tmp_path, need=("test",))
    assert "making it" in capsys.readouterr().out
    assert os.listdir(tmp_path / name) == ["test.json"]
    assert splits == dp.EMBEDDED[name]() == dp.load(name, tmp_path, need=())
    for need in (dp.SPLITS, ("train",), ("valid", "test")):
        words = f"{name} is a test set alone, with no train and no valid split"
        with pytest.raises(UserError, match=words):
            dp.load(name, tmp_path, need=need)
    assert run(capsys, name, "--out", tmp_path / "again")[0] == 0
    again = (tmp_path / "again" / "test.json").read_bytes()
    assert again == (tmp_path / name / "test.json").read_bytes()
    assert run(capsys, "stats", tmp_path / name)[0] == 0


def test_commands_are_those_that_messages_name(tmp_path):
    """What load() proposes exists, and the module's docstring names every data set."""
    for name in dp.COMMANDS.keys() - {"stats", *dp.EMBEDDED}:
        with pytest.raises(UserError, match=f"make it with 'python data_prep.py {name}'"):
            dp.load(name, tmp_path, need=("test",))
    with pytest.raises(UserError) as error:
        dp.load("nonsense", tmp_path)
    for name in dp.COMMANDS.keys() - {"stats"}:
        assert name in str(error.value) and name in dp.__doc__
    assert set(READERS) == set(RELEASED) and set(dp.FILES) == {*RELEASED, *dp.HUGGING_FACE}
    assert {*dp.EMBEDDED, *dp.FILES, *dp.TEST_SETS} <= set(dp.COMMANDS)
