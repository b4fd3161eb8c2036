"""When a night raises an alarm: comparisons of named measures with numbers. Nothing is evaluated as code.

rule        [name ":"] comparison { "and" comparison }
comparison  measure ( ">" | ">=" | "<" | "<=" ) number
"""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from raydetect.config.validation import nearest
from raydetect.errors import SpecError

Compare = Callable[[float, float], bool]
OPERATORS: dict[str, Compare] = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
COMPARISON = re.compile(r"\s*([a-z][a-z_]*)\s*(>=|<=|>|<)\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*")
NAME = re.compile(r"\s*([^:<>=]{1,60}?)\s*:(.*)", re.DOTALL)
AND = re.compile(r"\band\b")
MAX_LETTERS, MAX_COMPARISONS = 500, 16


@dataclass(frozen=True, slots=True)
class Comparison:
    """A measure against a number."""

    measure: str
    sign: str
    number: float

    def holds(self, value: float) -> bool:
        """Whether it is true of a value."""
        return OPERATORS[self.sign](value, self.number)


@dataclass(frozen=True, slots=True)
class Rule:
    """Raises an alarm when all of its comparisons hold.

    Attributes:
        name: what is wrong then; the rule's text when it has none.
        text: as the job file has it.
        comparisons: at least one.
    """

    name: str
    text: str
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a rule.

    Attributes:
        outcome: `alarm`, `calm`, or `not judged` when a measure has no value, for want of a baseline or of images.
        values: of its measures.
    """

    rule: Rule
    outcome: str
    values: Mapping[str, float | None]


def parse_rules(texts: Sequence[str], measures: Sequence[str]) -> tuple[Rule, ...]:
    """The rules of a job file.

    Args:
        texts: one each.
        measures: names that may stand in them.

    Raises:
        SpecError: one is not of the grammar, or names an unknown measure.
    """
    return tuple(_parse(text, f"alarm_when.{place}", measures) for place, text in enumerate(texts))


def _parse(text: str, where: str, measures: Sequence[str]) -> Rule:
    if len(text) > MAX_LETTERS:
        raise SpecError(f"{where}: has {len(text)} letters, at most {MAX_LETTERS} are read. Write several rules.")
    named = NAME.fullmatch(text)
    name, body = (named.group(1), named.group(2)) if named else (text.strip(), text)
    comparisons = tuple(_comparison(part, text, where, measures) for part in AND.split(body))
    if len(comparisons) > MAX_COMPARISONS:
        raise SpecError(f"{where}: has {len(comparisons)} comparisons, at most {MAX_COMPARISONS}. Write several rules.")
    return Rule(name, text.strip(), comparisons)


def _comparison(part: str, text: str, where: str, measures: Sequence[str]) -> Comparison:
    found = COMPARISON.fullmatch(part)
    if found is None:
        raise SpecError(
            f"{where}: {text!r} is no rule, at {part.strip()!r}. Write measure > number, such as flagged_rate > 0.02; "
            "join several with `and`."
        )
    measure, sign, digits = found.groups()
    if measure not in measures:
        raise SpecError(f"{where}: {measure!r} is no measure.{nearest(measure, list(measures))}")
    try:
        number = float(digits)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise SpecError(f"{where}: {digits!r} is no number. Write one such as 0.02.")
    return Comparison(measure, sign, number)


def evaluate_rule(rule: Rule, values: Mapping[str, float | None]) -> Verdict:
    """What a night's measures make of a rule. One comparison that does not hold is enough to be calm."""
    mine = {comparison.measure: values[comparison.measure] for comparison in rule.comparisons}
    held = []
    for comparison in rule.comparisons:
        value = mine[comparison.measure]
        held.append(None if value is None else comparison.holds(value))
    if False in held:
        return Verdict(rule, "calm", mine)
    return Verdict(rule, "not judged" if None in held else "alarm", mine)
