"""Derivatives: expressions of our own generator, differentiated by sympy (BSD)."""

import random
import re
from collections.abc import Iterator

from moelora.demo.skills import Example
from moelora.demo.sources.split import Candidate

DRAWS = 1500
LONGEST_ANSWER = 40
LARGEST_FACTOR = 9
LARGEST_POWER = 6
FUNCTIONS = ("sin", "cos", "exp", "log", "sqrt", "tan")


def derivative_candidates(*, seed: str) -> Iterator[Candidate]:
    """Yield ``expression in x -> derivative``, grouped by the shape of the expression.

    Two expressions have one shape if they differ in numbers only, so a validation example asks
    for a shape that training never showed.

    Args:
        seed: any text; the same text draws the same expressions.
    """
    # imported late: sympy takes a second that `--help` need not wait for
    import sympy  # type: ignore[import-untyped]

    # positive, so that sqrt(x**2) is x and not a case distinction
    x = sympy.Symbol("x", positive=True)
    draw = random.Random(seed)
    for _ in range(DRAWS):
        expression = sympy.sympify(_expression(draw), locals={"x": x})
        question, answer = str(expression), str(sympy.diff(expression, x))
        # sympy folds some draws to a constant or to one term that is too easy
        if "x" in answer and len(answer) <= LONGEST_ANSWER:
            example = Example(f"Differentiate with respect to x: {question}", answer)
            yield Candidate(example, group=re.sub(r"\d+", "n", question))


def _expression(draw: random.Random) -> str:
    kind = draw.randrange(4)
    if kind == 0:
        return f"{_term(draw)} {draw.choice('+-')} {_term(draw)}"
    if kind == 1:
        return f"{_term(draw)} {draw.choice('+-')} {_term(draw)} {draw.choice('+-')} {_term(draw)}"
    if kind == 2:
        return f"{_power(draw)}*{_function(draw)}"
    return f"{_function(draw)} {draw.choice('+-')} {_power(draw)} + {_number(draw)}"


def _term(draw: random.Random) -> str:
    return draw.choice((_power, _function, _scaled_function))(draw)


def _power(draw: random.Random) -> str:
    return f"{_number(draw)}*x**{draw.randint(1, LARGEST_POWER)}"


def _scaled_function(draw: random.Random) -> str:
    return f"{_number(draw)}*{_function(draw)}"


def _function(draw: random.Random) -> str:
    inner = draw.choice(("x", f"{draw.randint(2, LARGEST_FACTOR)}*x", f"x**{draw.randint(2, 3)}"))
    return f"{draw.choice(FUNCTIONS)}({inner})"


def _number(draw: random.Random) -> int:
    return draw.randint(2, LARGEST_FACTOR)
