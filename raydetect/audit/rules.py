"""Alarm rules: comparisons of named measures with numbers. Nothing is evaluated as code.

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
MAX_CHARS, MAX_COMPARISONS = 500, 16


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition of a rule: a comparison of a measure with a number."""

    measure: str
    sign: str
    number: float

    def holds(self, value: float) -> bool:
        """Whether the condition is true for a value."""
        return OPERATORS[self.sign](value, self.number)


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule that raises an alarm if all of its conditions hold.

    Attributes:
        name: the problem it detects; the rule's text if it has no name.
        text: as in the job file.
        conditions: at least one.
    """

    name: str
    text: str
    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a rule.

    Attributes:
        rule: the rule.
        outcome: `alarm`, `calm`, or `not judged` if a measure has no value because the baseline or images are missing.
        values: of the rule's measures.
    """

    rule: Rule
    outcome: str
    values: Mapping[str, float | None]


def parse_rules(texts: Sequence[str], measures: Sequence[str]) -> tuple[Rule, ...]:
    """Parses the rules of a job file.

    Args:
        texts: one for each rule.
        measures: names of the known measures.

    Raises:
        SpecError: a rule does not match the grammar, or names an unknown measure.
    """
    return tuple(_parse(text, f"alarm_when.{index}", measures) for index, text in enumerate(texts))


def _parse(text: str, where: str, measures: Sequence[str]) -> Rule:
    if len(text) > MAX_CHARS:
        raise SpecError(f"{where}: has {len(text)} characters, at most {MAX_CHARS}. Write several rules.")
    named = NAME.fullmatch(text)
    name, body = (named.group(1), named.group(2)) if named else (text.strip(), text)
    conditions = tuple(_condition(part, text, where, measures) for part in AND.split(body))
    if len(conditions) > MAX_COMPARISONS:
        raise SpecError(f"{where}: has {len(conditions)} comparisons, at most {MAX_COMPARISONS}. Write several rules.")
    return Rule(name, text.strip(), conditions)


def _condition(part: str, text: str, where: str, measures: Sequence[str]) -> Condition:
    found = COMPARISON.fullmatch(part)
    if found is None:
        raise SpecError(
            f"{where}: {text!r} is not a valid rule, at {part.strip()!r}. Write measure > number, such as "
            "flagged_rate > 0.02; join several with `and`."
        )
    measure, sign, digits = found.groups()
    if measure not in measures:
        raise SpecError(f"{where}: {measure!r} is not a measure.{nearest(measure, list(measures))}")
    try:
        number = float(digits)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise SpecError(f"{where}: {digits!r} is not a valid number. Write one such as 0.02.")
    return Condition(measure, sign, number)


def evaluate_rule(rule: Rule, values: Mapping[str, float | None]) -> Verdict:
    """Applies a rule to a night's measures. A single condition that does not hold makes the outcome `calm`."""
    mine = {condition.measure: values[condition.measure] for condition in rule.conditions}
    held = []
    for condition in rule.conditions:
        value = mine[condition.measure]
        held.append(None if value is None else condition.holds(value))
    if False in held:
        return Verdict(rule, "calm", mine)
    return Verdict(rule, "not judged" if None in held else "alarm", mine)
