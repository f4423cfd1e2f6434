"""Questions with worked examples in the prompt, so that base models understand them, too.

Answers are longer than the engine's warm-up, whose tokens are dense, so that slices write most of
them. The words are made up or drawn from small lists; nothing needs knowledge of the world.
"""

import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


def _words(text: str) -> list[str]:
    return text.split()


_NAMES = _words(
    "Ann Bela Carl Dora Emil Fay Gus Hana Igor Jana Kurt Lena Milo Nora Otto Pia Quin Rosa "
    "Sven Tess"
)
_CITIES = _words("Oslo Paris Rome Lima Cairo Delhi Berlin Tokyo Dublin Madrid Vienna Athens")
_JOBS = _words("nurse baker pilot farmer teacher painter doctor driver singer lawyer")
_COLORS = _words("red blue green black white yellow brown orange purple gray")
_ANIMALS = _words("cat dog horse rabbit parrot hamster turtle goat")
_SYLLABLES = _words(
    "ba be bo da de do fa fi ka ko la le li lo ma me mi mo na no pa ra ri ro sa ta to"
)

_WORDS = _words(
    "river apple window stone music winter paper bread garden silver mountain letter horse summer "
    "table forest yellow morning kitchen bottle island market doctor engine flower bridge candle "
    "ocean planet basket jacket finger shadow tunnel village copper dinner ladder mirror pencil "
    "rabbit saddle ticket velvet wagon blanket castle desert feather hammer insect jungle lemon "
    "needle orange pillow ribbon spider temple valley"
)

_SUBJECTS = ("The old man", "A small bird", "My neighbor", "The tall woman", "A gray cat")
_VERBS = ("walked slowly to", "looked for a while at", "often dreamed of", "came back from")
_PLACES = ("the market", "the river", "the empty station", "a garden", "the house on the hill")

_ONES = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
_TENS = _words(". . twenty thirty forty fifty sixty seventy eighty ninety")


class Question(NamedTuple):
    """A question and its correct answer.

    Attributes:
        text: the prompt, with worked examples.
        answer: the correct answer.
        tests: for code, expressions that must be true; see `scorers.mark_code`.
    """

    text: str
    answer: str
    tests: tuple[str, ...] = ()


class Task(NamedTuple):
    """A kind of questions.

    Attributes:
        ask: writes a question.
        scorer: the name of the function in `scorers` that marks answers.
        until: the texts that end an answer.
        max_tokens: the maximum number of tokens of an answer.
        count: the number of questions by default.
    """

    ask: Callable[[np.random.Generator], Question]
    scorer: str
    until: tuple[str, ...]
    max_tokens: int
    count: int = 100


def _examples(
    rng: np.random.Generator, count: int, write: Callable[[np.random.Generator], tuple[str, str]]
) -> Question:
    """Return a question after some worked examples of the same kind.

    Args:
        rng: the source of all choices.
        count: the number of examples.
        write: writes the text of a question, up to its answer, and the answer.
    """
    worked = "".join(f"{text}{answer}\n\n" for text, answer in (write(rng) for _ in range(count)))
    text, answer = write(rng)
    return Question(worked + text, answer)


def _arithmetic(rng: np.random.Generator) -> tuple[str, str]:
    value = int(rng.integers(1, 10))
    asked, steps = [f"Start with {value}."], []
    for change in (int(n) for n in rng.integers(1, 4, 4)):
        asked.append(f"Add {change}.")
        steps.append(f"{value} + {change} = {value + change}.")
        value += change
    return f"Question: {' '.join(asked)}\nAnswer:", f" {' '.join(steps)} The result is {value}."


def _pseudo_word(rng: np.random.Generator) -> str:
    return "".join(rng.choice(_SYLLABLES, 2))


def _copying(rng: np.random.Generator) -> tuple[str, str]:
    words = " ".join(_pseudo_word(rng) for _ in range(16))
    return f"Text: {words}\nCopy:", f" {words}"


def _passage(rng: np.random.Generator, fillers: int) -> tuple[str, str]:
    """Write sentences with a message of 20 words among them, and ask for the message."""
    name, words = rng.choice(_NAMES), " ".join(rng.choice(_WORDS, 20, replace=False))
    sentences = [
        f"{rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} {rng.choice(_PLACES)}."
        for _ in range(fillers)
    ]
    message = f"The message for {name} is: {words}."
    sentences.insert(int(rng.integers(fillers + 1)), message)
    question = f"Question: What is the message for {name}?"
    return (
        f"Text: {' '.join(sentences)}\n{question}\nAnswer: The message for {name} is:",
        f" {words}.",
    )


def _retrieval(rng: np.random.Generator) -> Question:
    first, second = _passage(rng, 2), _passage(rng, 4)
    text, expected = _passage(rng, 84)
    worked = "".join(f"{passage}{answer}\n\n" for passage, answer in (first, second))
    return Question(worked + text, expected)


def _json(rng: np.random.Generator) -> tuple[str, str]:
    record = {
        "name": str(rng.choice(_NAMES)),
        "age": int(rng.integers(18, 90)),
        "city": str(rng.choice(_CITIES)),
        "job": str(rng.choice(_JOBS)),
        "pets": [str(animal) for animal in rng.choice(_ANIMALS, 2, replace=False)],
        "colors": [str(color) for color in rng.choice(_COLORS, 2, replace=False)],
    }
    text = (
        f"{record['name']} is {record['age']} years old, lives in {record['city']} and works as a "
        f"{record['job']}. Pets: {' and '.join(record['pets'])}. Favorite colors: "
        f"{' and '.join(record['colors'])}."
    )
    return f"Text: {text}\nJSON:", f" {json.dumps(record)}"


def _number_words(n: int) -> str:
    """Return a number from 0 to 99 in words."""
    if n < 20:
        return _ONES[n]
    return _TENS[n // 10] + (f"-{_ONES[n % 10]}" if n % 10 else "")


def _numerals(rng: np.random.Generator) -> tuple[str, str]:
    # Small models add ones to tens that have none.
    numbers = [int(10 * tens + ones) for tens, ones in rng.integers((2, 1), (10, 10), (4, 2))]
    answer = "; ".join(f"{n} = {_number_words(n)}" for n in numbers)
    return f"Digits: {'; '.join(map(str, numbers))}\nWords:", f" {answer}"


def _function(rng: np.random.Generator) -> tuple[str, str, tuple[str, ...]]:
    """Return a comment, the function that it asks for, and tests."""
    limit, factor = int(rng.integers(2, 10)), int(rng.integers(2, 10))
    comparison, word = [(">", "above"), ("<", "below")][int(rng.integers(2))]
    change, verb = [(f"x * {factor}", f"x times {factor}"), (f"x + {factor}", f"x plus {factor}")][
        int(rng.integers(2))
    ]
    name = _pseudo_word(rng)
    asked = f"# {name}: the sum of {verb} over all x in the list that are {word} {limit}."
    lines = [
        f"def {name}(numbers):",
        "    total = 0",
        "    for x in numbers:",
        f"        if x {comparison} {limit}:",
        f"            total += {change}",
        "    return total",
    ]
    tests = []
    for _ in range(3):
        numbers = [limit, *(int(n) for n in rng.integers(0, 12, 5))]
        kept = [x for x in numbers if (x > limit if comparison == ">" else x < limit)]
        total = sum(x * factor if "*" in change else x + factor for x in kept)
        tests.append(f"{name}({numbers}) == {total}")
    return f"{asked}\n", "\n".join(lines), tuple(tests)


def _code(rng: np.random.Generator) -> Question:
    worked = "".join(f"{asked}{code}\n\n" for asked, code, _ in (_function(rng) for _ in range(3)))
    asked, code, tests = _function(rng)
    return Question(worked + asked, code, tests)


def _notes(rng: np.random.Generator, count: int) -> tuple[str, str]:
    """Write notes on people, and the report that has a sentence for each."""
    notes, sentences = [], []
    for n in range(1, count + 1):
        name, job, city = (str(rng.choice(words)) for words in (_NAMES, _JOBS, _CITIES))
        age = int(rng.integers(18, 90))
        notes.append(f"{n}. {name}, {age}, {job}, {city}")
        sentences.append(f"{n}. {name} is {age} years old and works as a {job} in {city}.")
    return "Notes:\n" + "\n".join(notes) + "\nReport:\n", "\n".join(sentences)


def _report(rng: np.random.Generator) -> Question:
    worked, answer = _notes(rng, 3)
    text, expected = _notes(rng, 12)
    return Question(f"{worked}{answer}\n\n{text}", expected)


TASKS: dict[str, Task] = {
    "arithmetic": Task(lambda rng: _examples(rng, 6, _arithmetic), "mark_steps", ("\n",), 96),
    "copying": Task(lambda rng: _examples(rng, 3, _copying), "mark_words", ("\n",), 128),
    "retrieval": Task(_retrieval, "mark_words", ("\n",), 128, 50),
    "json": Task(lambda rng: _examples(rng, 4, _json), "mark_json", ("\n",), 128),
    "code": Task(_code, "mark_code", ("\n\n", "\n#"), 96),
    "numerals": Task(lambda rng: _examples(rng, 8, _numerals), "mark_list", ("\n",), 128),
    "report": Task(_report, "mark_lines", ("\n\n",), 400, 30),
}


def write_questions(name: str, count: int, seed: int) -> list[Question]:
    """Write the questions of a task. Each depends on its number and the seed alone.

    Args:
        name: a key of `TASKS`.
        count: the number of questions.
        seed: the seed.
    """
    kind = [*TASKS].index(name)
    return [TASKS[name].ask(np.random.default_rng([seed, kind, n])) for n in range(count)]
