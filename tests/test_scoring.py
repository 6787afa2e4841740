"""common/scoring.py: what counts as an answer, as a number and as right; the calculator."""

import pytest
import torch

from common.scoring import Calculator, calculate, extract_answer, is_correct

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
    ("### 5", "5.", True)])
def test_is_correct(text, answer, right):
    """Numbers are compared as numbers, exactly; all else as text; nothing without the marker."""
    assert is_correct(text, answer) is right


def test_extract_answer():
    """What follows the last marker of either kind, bare of commas, dollar sign and blanks."""
    assert extract_answer("a ### 1 ### $1,200.50 \n") == "1200.50"
    assert extract_answer("### 1\nThe answer is: Bob, Eve\nand more") == "Bob Eve"
    for text in ("no marker", "###", "The answer is:"):
        assert extract_answer(text) == ""


# ---------------------------------------------------------------- the calculator

@pytest.mark.parametrize("text, value", [
    ("600*30/100", "180"), ("1/8", "0.125"), ("2*(3+4)", "14"), ("-5+2", "-3"),
    ("1,000*2", "2000"), ("0.1*200", "20"), (".5*4", "2"), ("10-3*2", "4"), ("1/3", "0.3333333333"),
    ("0.1+0.2", "0.3"), ("7", "7"), ("2**9**9", None), ("__import__('os')", None), ("a+1", None),
    ("", None), ("(", None), ("1/0", None), ("9e999*1", None), ("'a'*3", None), ("True+1", None),
    ("1 if 2 else 3", None), ("5%3", None), ("f(1)", None), ("(" * 500 + "1" + ")" * 500, None)])
def test_calculate(text, value):
    assert calculate(text) == value


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
