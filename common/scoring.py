"""What an answer is: read out of what a model wrote, compared with the right one, counted,
calculated."""

import ast
import math
import re
from decimal import Context, Decimal, Inexact
from fractions import Fraction

import torch

from common.text import SPECIAL

# ---------------------------------------------------------------- scoring


def without_commas(text):
    """A text whose numbers have no commas. Commas belong to a number only between groups of three
    digits: '1,234.5 of 1,2,3' -> '1234.5 of 1,2,3'."""
    grouped = r"(?<![\d.,])\d{1,3}(,\d{3})+(?!\d|,\d)"
    return re.sub(grouped, lambda number: number[0].replace(",", ""), text)


def bare(answer):
    """An answer without blanks around it, commas in numbers, and the dollar sign in front:
    '-$1,200.50' -> '-1200.50'."""
    return re.sub(r"^([-+]?)\$\s*", r"\1", without_commas(answer).strip())


def number_of(answer):
    """The number that an answer is, as a Decimal, or None if it is text. A full stop may end it:
    '-$1,200.50.' -> Decimal('-1200.50'), '1,2,3' -> None."""
    answer = bare(answer)
    if not re.fullmatch(r"[-+]?(\d+(\.\d+)?|\.\d+)\.?", answer):
        return None
    return Decimal(answer.rstrip("."))


def meaning(answer):
    """What answers are compared by: equal for two answers that score alike. A number, or text."""
    number = number_of(answer)
    return bare(answer) if number is None else number


def extract_answer(text):
    """What follows the last answer marker, '###' (Coconut's) or 'The answer is:' (CODI's), up to
    the end of that line or of the text, bare; '' without a marker."""
    *before, last = re.split(r"#{3,}|The answer is:", text)
    if not before:
        return ""
    return bare(re.split(rf"\n|{re.escape(SPECIAL[0])}", last)[0])


def last_number(text):
    """The last number of a text, as digits, or '' if it has none: 'so 4 - 1 = 3 ($1,200.)' ->
    '1200'. What follows instructions and knows no answer marker is read this way."""
    numbers = re.findall(r"((?<![\w)])-)?\$?(\d+(?:\.\d+)?|\.\d+)", without_commas(text))
    return "".join(numbers[-1]) if numbers else ""


def is_correct(text, answer):
    """Does the decoded text give the answer?"""
    return same_answer(extract_answer(text), answer)


def same_answer(given, answer):
    """Is what was given the answer? Numbers are compared as numbers, everything else as text."""
    return given != "" and meaning(given) == meaning(answer)


# ---------------------------------------------------------------- how sure a count is


def wilson(right, n, z=1.959964):
    """(low, high): the 95 % interval of a share, `right` of n, by Wilson's score (Wilson 1927).
    Unlike share +- 2 standard errors it stays within 0 .. 1 and has a width at 0 and at 1."""
    if n == 0:
        return 0.0, 1.0
    share = right / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low, high = (middle - half) / scale, (middle + half) / scale
    return low if right > 0 else 0.0, high if right < n else 1.0         # exactly, whatever rounds


def mcnemar(b, c):
    """McNemar's exact test, two-sided: p of two models that answered the same questions, b of them
    only the one right, c only the other. If neither were better, each of these b + c questions
    would fall to either side like a coin."""
    n = b + c
    tail, ways = 0, 1                    # ways: n over i, from one i to the next
    for i in range(min(b, c) + 1):
        tail += ways
        ways = ways * (n - i) // (i + 1)
    return min(1.0, 2 * tail / 2 ** n)


def pairs_of(items):
    """Where pairs begin: each i whose item and the next one have the same number "pair". The second
    is the first with one fact rewritten, so that the answer is another."""
    numbers = [item.get("pair") for item in items]
    return [i for i, (one, other) in enumerate(zip(numbers, numbers[1:]))
            if one is not None and one == other]


def of_pairs(items, right):
    """The score of items in pairs, right (n,) or a list of bools: how many pairs there are, of how
    many both are right, or the original; with 95 % intervals of the share of pairs, both right, and
    of the originals that are right whose prediction follows the change. None without pairs."""
    first = pairs_of(items)
    if not first:
        return None
    original = sum(bool(right[i]) for i in first)
    both = sum(bool(right[i]) and bool(right[i + 1]) for i in first)
    return dict(n=len(first), original=original, both=both, share=both / len(first),
                interval=wilson(both, len(first)), follows=both / original if original else None,
                follows_interval=wilson(both, original))


# ---------------------------------------------------------------- the calculator

OPERATORS = {
    ast.Add: Fraction.__add__,
    ast.Sub: Fraction.__sub__,
    ast.Mult: Fraction.__mul__,
    ast.Div: Fraction.__truediv__,
}
NUMBER = r"(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,2})?"    # a larger exponent would take forever


def calculate(text):
    """The value of an arithmetic expression (+ - * / and brackets), exactly, as GSM8k writes it:
    '600*30/100' -> '180', '1/8' -> '0.125'. Only where the decimals have no end are there ten
    significant digits: '2/3' -> '0.6666666667'. None for anything else; nothing is ever executed.
    """
    text = without_commas(text).strip()

    def value(node):
        if isinstance(node, ast.Constant):
            typed = ast.get_source_segment(text, node)      # node.value would be a rounded float
            if not re.fullmatch(NUMBER, typed):
                raise ValueError(typed)
            return Fraction(typed)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        operate = OPERATORS[type(node.op)]          # any other node has no op, or none of these
        return operate(value(node.left), value(node.right))

    try:
        return in_digits(value(ast.parse(text, mode="eval").body))
    except (SyntaxError, ValueError, AttributeError, KeyError, ArithmeticError, RecursionError,
            MemoryError):
        return None


def in_digits(number):
    """A Fraction as decimal digits, without an exponent: all of them if they have an end, else ten
    significant ones, or all those before the point if they are more. Raises ValueError for a number
    that Python does not write out (more than 4,300 digits)."""
    numerator, denominator = Decimal(str(number.numerator)), Decimal(str(number.denominator))
    n_whole = len(str(abs(number.numerator) // number.denominator))
    # A quotient that ends has at most log2(denominator) decimals: those of 1 / 2^n are n.
    exact = Context(n_whole + number.denominator.bit_length(), traps=[Inexact])
    try:
        quotient = exact.divide(numerator, denominator)
    except Inexact:
        rounded = Context(max(10, n_whole))
        quotient = rounded.normalize(rounded.divide(numerator, denominator))
    return format(quotient, "f")


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
