"""The built-in sample: a few thousand generated instruction records, the same on every machine.

Small tasks that a tiny model can begin to learn in a minute, with answers of one word up to a paragraph, so that
the lengths vary as they do in real sets.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

_T = TypeVar("_T")
_Task = tuple[str, str, str]

WORDS = (  # noqa: SIM905 (sixty quoted words would be harder to read)
    "apple bread chair cloud dance eagle field glass house island jacket kitchen lemon music night ocean paper queen "
    "river stone table under violet water yellow zebra bridge candle desert engine forest garden hammer insect jungle "
    "kettle ladder market needle orange pencil rabbit silver ticket umbrella village window winter summer morning "
    "evening doctor farmer teacher painter sailor baker mountain valley planet rocket basket button carpet dragon"
).split()
NAMES = ("Ada", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jonas", "Karin", "Leo")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
UNITS = (
    ("meters", "centimeters", 100), ("kilometers", "meters", 1000), ("kilograms", "grams", 1000),
    ("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24), ("weeks", "days", 7),
    ("liters", "milliliters", 1000), ("feet", "inches", 12), ("yards", "feet", 3),
)  # fmt: skip
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class _Dice:
    """Random choices from `random()` alone, whose sequence Python promises to keep between versions."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def number(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int(self._random() * (high - low + 1))

    def one_of(self, choices: Sequence[_T]) -> _T:
        return choices[int(self._random() * len(choices))]

    def some_of(self, choices: Sequence[_T], count: int) -> list[_T]:
        """`count` different choices in random order."""
        pool = list(choices)
        return [pool.pop(int(self._random() * len(pool))) for _ in range(count)]


def _with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _add(dice: _Dice) -> _Task:
    a, b = dice.number(1, 99), dice.number(1, 99)
    return dice.one_of((f"What is {a} plus {b}?", f"Add {a} and {b}.")), "", f"{a} + {b} = {a + b}"


def _subtract(dice: _Dice) -> _Task:
    a, b = dice.number(20, 99), dice.number(1, 20)
    return f"Subtract {b} from {a}.", "", f"{a} - {b} = {a - b}"


def _multiply(dice: _Dice) -> _Task:
    a, b = dice.number(2, 12), dice.number(2, 12)
    return f"Multiply {a} by {b}.", "", f"{a} times {b} is {a * b}."


def _spell(dice: _Dice) -> _Task:
    word = dice.one_of(WORDS)
    return f"Spell the word '{word}' letter by letter.", "", "-".join(word.upper())


def _count_letters(dice: _Dice) -> _Task:
    word = dice.one_of(WORDS)
    return "How many letters does this word have?", word, f"The word '{word}' has {len(word)} letters."


def _reverse_order(dice: _Dice) -> _Task:
    words = dice.some_of(WORDS, dice.number(3, 9))
    return "Write the words in reverse order.", " ".join(words), " ".join(reversed(words))


def _sort_words(dice: _Dice) -> _Task:
    words = dice.some_of(WORDS, dice.number(3, 12))
    return "Sort the words alphabetically.", ", ".join(words), ", ".join(sorted(words))


def _sort_numbers(dice: _Dice) -> _Task:
    numbers = [dice.number(1, 99) for _ in range(dice.number(3, 15))]
    return "Sort the numbers from small to large.", ", ".join(map(str, numbers)), ", ".join(map(str, sorted(numbers)))


def _convert(dice: _Dice) -> _Task:
    large, small, factor = dice.one_of(UNITS)
    amount = dice.number(2, 20)
    return f"Convert {amount} {large} to {small}.", "", f"{amount} {large} are {amount * factor} {small}."


def _capitals(dice: _Dice) -> _Task:
    words = dice.some_of(WORDS, dice.number(2, 6))
    return "Write the text in capital letters.", " ".join(words), " ".join(words).upper()


def _day_after(dice: _Dice) -> _Task:
    today, ahead = dice.number(0, 6), dice.number(1, 6)
    day = DAYS[(today + ahead) % 7]
    return f"Today is {DAYS[today]}. Which day is it {NUMBER_WORDS[ahead]} days from now?", "", f"It will be {day}."


def _larger(dice: _Dice) -> _Task:
    a, b = dice.some_of(range(1, 100), 2)
    return "Which number is larger?", f"{a} or {b}", f"{max(a, b)} is larger than {min(a, b)}."


def _past_tense(dice: _Dice) -> _Task:
    name, verb = dice.one_of(NAMES), dice.one_of(("walk", "talk", "cook", "paint", "play", "work", "jump", "listen"))
    place = dice.one_of(("at home", "in the garden", "near the river", "with a friend", "all day"))
    return "Put the sentence into the past tense.", f"{name} {verb}s {place}.", f"{name} {verb}ed {place}."


def _list_multiples(dice: _Dice) -> _Task:
    base, count = dice.number(2, 12), dice.number(5, 20)
    numbers = ", ".join(str(base * i) for i in range(1, count + 1))
    return f"List the first {count} multiples of {base}.", "", f"The first {count} multiples of {base} are {numbers}."


def _shopping(dice: _Dice) -> _Task:
    name, count = dice.one_of(NAMES), dice.number(2, 7)
    items = dice.some_of(WORDS, count)
    prices = [dice.number(2, 20) for _ in items]
    offers, steps, total = [], [], 0
    for item, price in zip(items, prices, strict=True):
        offers.append(f"{_with_article(item)} for {price} coins")
        steps.append(f"After the {item}: {total} + {price} = {total + price}.")
        total += price
    question = "How many coins are spent? Show each step."
    return question, f"{name} buys {', '.join(offers)}.", f"{' '.join(steps)} {name} spends {total} coins."


def _story(dice: _Dice) -> _Task:
    name, friend = dice.some_of(NAMES, 2)
    thing, place, *seen = dice.some_of(WORDS, 2 + dice.number(2, 10))
    sentences = [f"{name} looked for {_with_article(thing)} near the {place}."]
    sentences += [f"Then {dice.one_of((name, friend))} saw {_with_article(word)}." for word in seen]
    sentences.append(f"In the end {friend} found the {thing} and gave it to {name}.")
    return f"Tell a short story about {name}, {friend} and {_with_article(thing)}.", "", " ".join(sentences)


_TASKS: tuple[Callable[[_Dice], _Task], ...] = (
    _add, _subtract, _multiply, _spell, _count_letters, _reverse_order, _sort_words, _sort_numbers, _convert,
    _capitals, _day_after, _larger, _past_tense, _list_multiples, _shopping, _story,
)  # fmt: skip


def sample_records(num_records: int = 3000, *, seed: int = 0) -> list[dict[str, str]]:
    """Generate instruction records: arithmetic, spelling, word order, unit conversion, short stories.

    Args:
        num_records: how many; a shorter sample is the beginning of a longer one.
        seed: another seed gives other records.

    Returns:
        Records with `instruction`, `input` (empty for about half of them) and `output`, a pure function of the
        arguments.
    """
    dice = _Dice(seed)
    records = []
    for _ in range(num_records):
        instruction, text, output = dice.one_of(_TASKS)(dice)
        records.append({"instruction": instruction, "input": text, "output": output})
    return records
