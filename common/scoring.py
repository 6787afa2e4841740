"""What an answer is: read out of what a model wrote, compared with the right one, calculated."""

import ast
import re
from decimal import Decimal
from fractions import Fraction

import torch

from common.text import SPECIAL

# ---------------------------------------------------------------- scoring


def bare(answer):
    """An answer without blanks around it, commas, and the dollar sign in front:
    '-$1,200.50' -> '-1200.50'."""
    return re.sub(r"^([-+]?)\$\s*", r"\1", answer.replace(",", "").strip())


def extract_answer(text):
    """What follows the last answer marker, '###' (Coconut's) or 'The answer is:' (CODI's), up to
    the end of that line or of the text, bare; '' without a marker."""
    *before, last = re.split(r"#{3,}|The answer is:", text)
    if not before:
        return ""
    return bare(re.split(rf"\n|{re.escape(SPECIAL[0])}", last)[0])


def is_correct(text, answer):
    """Does the decoded text give the answer? Numbers, with or without a full stop at the end, are
    compared as numbers, everything else as text."""
    given, wanted = extract_answer(text), bare(answer)
    number = r"[-+]?(\d+(\.\d+)?|\.\d+)\.?"
    if re.fullmatch(number, given) and re.fullmatch(number, wanted):
        return Decimal(given.rstrip(".")) == Decimal(wanted.rstrip("."))
    return given != "" and given == wanted


# ---------------------------------------------------------------- the calculator

OPERATORS = {
    ast.Add: Fraction.__add__,
    ast.Sub: Fraction.__sub__,
    ast.Mult: Fraction.__mul__,
    ast.Div: Fraction.__truediv__,
}


def calculate(text):
    """The value of an arithmetic expression (+ - * / and brackets), exactly, as GSM8k writes it:
    '600*30/100' -> '180', '1/8' -> '0.125'. None for anything else; nothing is ever executed."""
    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return Fraction(str(node.value))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        operate = OPERATORS[type(node.op)]          # any other node has no op, or none of these
        return operate(value(node.left), value(node.right))

    try:
        number = value(ast.parse(text.replace(",", "").strip(), mode="eval").body)
    except (SyntaxError, ValueError, AttributeError, KeyError, ArithmeticError, RecursionError,
            MemoryError):
        return None
    if number.denominator == 1:
        return str(number.numerator)
    return f"{float(number):.10g}"


class Calculator:
    """Computes what a model writes between << and = and goes on with the result, as in GSM8k's
    annotations. B: how many rows are decoded at once."""

    def __init__(self, tok, B):
        self.tok = tok
        self.rows = [[] for _ in range(B)]      # the tokens of each row so far
        self.due = [[] for _ in range(B)]       # the tokens of a result that are still to come

    def __call__(self, tokens):
        """The next tokens (B,) that the model chose -> those (B,) that are written instead."""
        tokens = tokens.tolist()
        for b, row in enumerate(self.rows):
            if self.due[b]:
                tokens[b] = self.due[b].pop(0)
            row.append(tokens[b])
            if self.due[b]:
                continue
            asked = re.search(r"<<([^<>=]*)=$", self.tok.decode(row[-40:]))
            result = calculate(asked[1]) if asked else None
            if result:
                self.due[b] = self.tok.encode(result + ">>")
        return torch.tensor(tokens)
