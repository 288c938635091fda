"""The built-in sample: a few thousand generated instruction records, the same on every machine.

Small tasks, with answers of one word up to a paragraph, so that the lengths vary as they do in real sets. Two of three
records rewrite a sentence, which a tiny model learns in two minutes: it then answers for sentences it was not shown.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
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
VERBS = ("walk", "talk", "cook", "paint", "play", "work", "jump", "listen", "rest", "wait", "laugh", "shout")
PLACES = (
    "at home", "in the garden", "near the river", "with a friend", "all day", "in the evening", "behind the house",
    "on the bridge", "under the table", "for an hour",
)  # fmt: skip
UNITS = (
    ("meters", "centimeters", 100), ("kilometers", "meters", 1000), ("kilograms", "grams", 1000),
    ("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24), ("weeks", "days", 7),
    ("liters", "milliliters", 1000), ("feet", "inches", 12), ("yards", "feet", 3),
)  # fmt: skip
PAST_TENSE = "Put the sentence into the past tense."  # this kind, and
QUESTION = "Turn the sentence into a question."  # this one, a tiny model learns in two minutes


def _with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


class _Tasks:
    """Tasks by chance, from `random()` alone, whose sequence Python promises to keep between versions."""

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

    def add(self) -> _Task:
        a, b = self.number(1, 99), self.number(1, 99)
        return self.one_of((f"What is {a} plus {b}?", f"Add {a} and {b}.")), "", f"{a} + {b} = {a + b}"

    def spell(self) -> _Task:
        word = self.one_of(WORDS)
        return f"Spell the word '{word}' letter by letter.", "", "-".join(word.upper())

    def reverse_order(self) -> _Task:
        words = self.some_of(WORDS, self.number(3, 9))
        return "Write the words in reverse order.", " ".join(words), " ".join(reversed(words))

    def sort_words(self) -> _Task:
        words = self.some_of(WORDS, self.number(3, 12))
        return "Sort the words alphabetically.", ", ".join(words), ", ".join(sorted(words))

    def sort_numbers(self) -> _Task:
        numbers = [self.number(1, 99) for _ in range(self.number(3, 15))]
        given, ordered = (", ".join(map(str, part)) for part in (numbers, sorted(numbers)))
        return "Sort the numbers from small to large.", given, ordered

    def convert(self) -> _Task:
        large, small, factor = self.one_of(UNITS)
        amount = self.number(2, 20)
        return f"Convert {amount} {large} to {small}.", "", f"{amount} {large} are {amount * factor} {small}."

    def capitals(self) -> _Task:
        words = self.some_of(WORDS, self.number(2, 6))
        return "Write the text in capital letters.", " ".join(words), " ".join(words).upper()

    def larger(self) -> _Task:
        a, b = self.some_of(range(1, 100), 2)
        return "Which number is larger?", f"{a} or {b}", f"{max(a, b)} is larger than {min(a, b)}."

    def _sentence(self) -> tuple[str, str, str]:
        return self.one_of(NAMES), self.one_of(VERBS), self.one_of(PLACES)

    def past_tense(self) -> _Task:
        name, verb, place = self._sentence()
        return PAST_TENSE, f"{name} {verb}s {place}.", f"{name} {verb}ed {place}."

    def question(self) -> _Task:
        name, verb, place = self._sentence()
        return QUESTION, f"{name} {verb}s {place}.", f"Does {name} {verb} {place}?"

    def list_multiples(self) -> _Task:
        base, count = self.number(2, 12), self.number(3, 12)
        numbers = ", ".join(str(base * i) for i in range(1, count + 1))
        return f"List the first {count} multiples of {base}.", "", numbers

    def shopping(self) -> _Task:
        name, count = self.one_of(NAMES), self.number(2, 7)
        items = self.some_of(WORDS, count)
        prices = [self.number(2, 20) for _ in items]
        offers = [f"{_with_article(item)} for {price} coins" for item, price in zip(items, prices, strict=True)]
        return "How many coins are spent?", f"{name} buys {', '.join(offers)}.", f"{name} spends {sum(prices)} coins."

    def story(self) -> _Task:
        name, friend = self.some_of(NAMES, 2)
        thing, place, *seen = self.some_of(WORDS, 2 + self.number(2, 10))
        sentences = [f"{name} looked for {_with_article(thing)} near the {place}."]
        sentences += [f"Then {self.one_of((name, friend))} saw {_with_article(word)}." for word in seen]
        sentences.append(f"In the end {friend} found the {thing} and gave it to {name}.")
        return f"Tell a short story about {name}, {friend} and {_with_article(thing)}.", "", " ".join(sentences)


_OTHERS = (
    _Tasks.add, _Tasks.larger, _Tasks.spell, _Tasks.capitals, _Tasks.reverse_order, _Tasks.sort_words,
    _Tasks.sort_numbers, _Tasks.convert, _Tasks.list_multiples, _Tasks.story, _Tasks.shopping,
)  # fmt: skip
_KINDS = (*[_Tasks.past_tense] * 10, *[_Tasks.question] * 10, *_OTHERS)


def sample_records(num_records: int = 3000, *, seed: int = 0) -> list[dict[str, str]]:
    """Generate instruction records: sentences to rewrite (two of three), arithmetic, word order, short stories.

    Args:
        num_records: how many; a shorter sample is the beginning of a longer one.
        seed: another seed gives other records.

    Returns:
        Records with `instruction`, `input` (empty for some of them) and `output`, a pure function of the arguments.
        No two ask the same, so that what is split off is not trained on.
    """
    tasks = _Tasks(seed)
    found: dict[tuple[str, str], str] = {}
    while len(found) < num_records:
        instruction, text, output = tasks.one_of(_KINDS)(tasks)
        found.setdefault((instruction, text), output)
    return [{"instruction": asked[0], "input": asked[1], "output": output} for asked, output in found.items()]
