"""common/scoring.py: what counts as an answer, as a number and as right; the calculator."""

import random
from decimal import Decimal
from fractions import Fraction

import pytest
import torch

from common.scoring import (Calculator, calculate, extract_answer, is_correct, last_number, meaning,
                            number_of, without_commas)

# ---------------------------------------------------------------- scoring

@pytest.mark.parametrize("text, answer, right", [
    ("### 5", "5", True), ("<<1+4=5>>\n### 5", "5", True), ("### 6", "5", False),
    ("### 5 6", "5", False), ("### 1,450,000", "1450000", True), ("### 1450000", "1,450,000", True),
    ("### $18", "18", True), ("###18", "$18", True), ("### 18.0", "18", True),
    ("### 0.50", ".5", True), ("### 18.01", "18", False), ("### 018", "18", True),
    ("### -3", "-3", True), ("### 3", "-3", False), ("### +3", "3", True), ("### -0", "0", True),
    ("### 0.1", "0.10000000000000001", False),
    ("### 12345678901234567891", "12345678901234567890", False),
    ("### Tom is a yumpus.", "Tom is a yumpus.", True),
    ("### Tom is a wumpus.", "Tom is a yumpus.", False),
    ("### tom is a yumpus.", "Tom is a yumpus.", False),
    ("###  Tom is a yumpus. \n", "Tom is a yumpus.", True),
    ("### Tom is a yumpus. Tom", "Tom is a yumpus.", False), ("### yes, it is", "yes, it is", True),
    ("5", "5", False), ("", "5", False), ("### ", "5", False), ("## 5", "5", False),
    ("### 4 ### 5", "5", True), ("### five", "5", False), ("### 1/2", "1/2", True),
    ("### nan", "nan", True), ("### 5.", "5", True), ("### 1e1", "10", False),
    ("The answer is: 5", "5", True), ("The answer is:5", "5", True),
    ("The answer is: 6", "5", False), ("The answer is 5", "5", False),
    ("2 + 3 = 5. The answer is: $1,200.50.", "1200.5", True), ("The answer is: -$3", "-3", True),
    ("The answer is: $ 3", "3", True), ("The answer is: 4\nThe answer is: 5", "5", True),
    ("### 4\nThe answer is: 5", "5", True), ("The answer is: 4 ### 5", "5", True),
    ("The answer is: 5 ### 4", "5", False), ("#### 5", "5", True),
    ("The answer is: 5\n4", "5", True), ("### 5\n4", "5", True), ("The answer is:\n5", "5", False),
    ("The answer is: 5<|endoftext|>6", "5", True), ("The answer is: ", "5", False),
    ("The answer is: C", "C", True), ("The answer is: C", "D", False),
    ("The answer is: Tom is a yumpus.", "Tom is a yumpus.", True), ("### 5..", "5", False),
    ("### .5.", "0.5", True), ("### 5.0.", "5", True), ("### .", "5", False),
    ("### 5", "5.", True), ("### 1,2,3", "123", False), ("### 123", "1,2,3", False),
    ("### 1,2,3", "1,2,3", True), ("### 12,34", "1234", False), ("### 1234,567", "1234567", False),
    ("### 1,2345", "12345", False), ("### ,5", "5", False), ("### 1,450,000.50", "1450000.5", True),
    ("### 1,000 pens", "1000 pens", True), ("### Bob, Eve", "Bob Eve", False)])
def test_is_correct(text, answer, right):
    """Numbers are compared as numbers, exactly; all else as text; nothing without the marker."""
    assert is_correct(text, answer) is right


def test_extract_answer():
    """What follows the last marker of either kind, bare of commas in numbers, dollar sign and
    blanks."""
    assert extract_answer("a ### 1 ### $1,200.50 \n") == "1200.50"
    assert extract_answer("### 1\nThe answer is: Bob, Eve\nand more") == "Bob, Eve"
    for text in ("no marker", "###", "The answer is:"):
        assert extract_answer(text) == ""


@pytest.mark.parametrize("text, without", [
    ("1,234", "1234"), ("1,234,567.25", "1234567.25"), ("-1,000", "-1000"), ("1,2,3", "1,2,3"),
    ("12,345,67", "12,345,67"), ("1,2345", "1,2345"), ("1234,567", "1234,567"), ("1,", "1,"),
    ("0.1,000", "0.1,000"), ("a, b", "a, b"), ("1,000*2+3,000", "1000*2+3000"),
    ("between 1,000 and 2,000, or 1, 2", "between 1000 and 2000, or 1, 2"), ("", "")])
def test_commas_between_groups_of_three_digits(text, without):
    assert without_commas(text) == without


@pytest.mark.parametrize("answer, number", [
    ("5", "5"), ("-3", "-3"), ("+3", "3"), (".5", "0.5"), ("2.50", "2.5"), ("$1,200.50.", "1200.5"),
    ("-$3", "-3"), (" 7 ", "7"), ("5.", "5"), ("1,2,3", None), ("five", None), ("1/2", None),
    ("5..", None), (".", None), ("", None), ("1e3", None), ("nan", None), ("5 pens", None)])
def test_number_of(answer, number):
    assert number_of(answer) == (None if number is None else Decimal(number))


@pytest.mark.parametrize("text, number", [
    ("so 4 - 1 = 3, or $1,200.50.", "1200.50"), ("10-5=5", "5"), ("from 10-12", "12"),
    ("x = -5.", "-5"), ("a loss of -$7", "-7"), ("(3) -7", "-7"), ("is .5", ".5"), ("none", ""),
    ("", "")])
def test_last_number(text, number):
    assert last_number(text) == number


def test_meaning():
    """Equal, and with one hash, for answers that score alike; never for a number and a text."""
    assert len({meaning(answer) for answer in ("2.5", "2.50", "$2.50", "2.5.", " +2.5")}) == 1
    assert len({meaning(answer) for answer in ("2", "two", "3", "2,", "C")}) == 5


# ---------------------------------------------------------------- the calculator

@pytest.mark.parametrize("text, value", [
    ("600*30/100", "180"), ("1/8", "0.125"), ("2*(3+4)", "14"), ("-5+2", "-3"),
    ("1,000*2", "2000"), ("0.1*200", "20"), (".5*4", "2"), ("10-3*2", "4"), ("1/3", "0.3333333333"),
    ("0.1+0.2", "0.3"), ("7", "7"), ("2**9**9", None), ("__import__('os')", None), ("a+1", None),
    ("", None), ("(", None), ("1/0", None), ("9e999*1", None), ("'a'*3", None), ("True+1", None),
    ("1 if 2 else 3", None), ("5%3", None), ("f(1)", None), ("(" * 500 + "1" + ")" * 500, None),
    ("12345678901/2", "6172839450.5"), ("1/10000000", "0.0000001"), ("2/3", "0.6666666667"),
    ("200/3", "66.66666667"), ("200000000000/3", "66666666667"), ("1/3*3", "1"),
    ("1/30000000", "0.00000003333333333"), ("0.1234567890123456789*2", "0.2469135780246913578"),
    ("12345678901234567890.5+1", "12345678901234567891.5"), ("10000000000*10", "100000000000"),
    ("1/1024/1024", "0.00000095367431640625"), ("1e5*2", "200000"), ("9e-999999999*1", None),
    ("1,2+3", None), ("12,34*2", None), ("1,234,567*2", "2469134"), ("-2+2", "0"),
    ("9" * 4000 + "*" + "9" * 4000, None), ("9" * 400 + "/7*0", "0"), ("1/3+\ud83d", None)])
def test_calculate(text, value):
    assert calculate(text) == value


def test_calculate_is_exact():
    """Where the decimals have an end, all are there; no exponent and no zero at the end."""
    rng = random.Random(0)
    for _ in range(500):
        over, under = rng.randrange(10 ** 20), 2 ** rng.randrange(30) * 5 ** rng.randrange(30)
        written = calculate(f"{over}/{under}")
        assert Fraction(written) == Fraction(over, under)
        assert "E" not in written and not ("." in written and written.endswith("0"))


def test_calculator_writes_the_results(text_tok):
    """After << .. = come the right result and >>, whatever the model says; all else is the
    model's."""
    eos = text_tok.eos
    wanted = ["<<2*8-9=7>>\n### 7", "no sums = here", "<<x=4>>\n"]
    said = [text_tok.encode(t) for t in ("<<2*8-9=3>>\n### 7", "no sums = here", "<<x=4>>\n")]
    calculator, out = Calculator(text_tok, 3), []
    for i in range(max(map(len, said))):
        tokens = torch.tensor([row[i] if i < len(row) else eos for row in said])
        out.append(calculator(tokens).tolist())
    for row, text in zip(zip(*out), wanted):
        row = list(row)
        assert text_tok.decode(row[:row.index(eos)] if eos in row else row) == text
