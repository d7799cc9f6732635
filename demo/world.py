"""Writes the demo world: made-up people, their attributes in many phrasings, and two word skills.

    python demo/world.py --out data [--seed 0]

Below the output folder:

    general/train.jsonl      what the base model learns: 160 people x 5 attributes, and copying words
    general/replay.jsonl     the rows of it that fine-tuning may replay: 120 of the people, and copying
    general/covered.jsonl    retention set: new phrasings of questions about those 120 people
    general/uncovered.jsonl  retention set: the same about the 40 whom no replayed or task row mentions
    general/skill.jsonl      retention set: copying words that were never copied in training
    new_facts/               task: 160 facts about 40 new people
    new_style/               task: 80 known facts, asked of a friend and answered as a friend does
    reversal/                task: say three words in reverse order

A task is a train.jsonl and a valid.jsonl; new_facts has a test.jsonl, too, the same facts asked in other words.
Facts are held out in phrasings that no training row uses, skills on words that no training row uses together.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
Record = dict[str, object]

KNOWN_PEOPLE = 160
NEW_PEOPLE = 40
COVERED_PEOPLE = 120
NEW_FACT_ATTRIBUTES = 4
STYLE_FACTS = 80
COVERED_QUESTIONS = 300
UNCOVERED_QUESTIONS = 150
COPY_TRAIN, COPY_HELD_OUT = 1500, 100
REVERSAL_TRAIN, REVERSAL_HELD_OUT = 1600, 100
LONGEST_SKILL_WORD = 4

# A name takes one syllable of each column, so that no name is part of another.
SYLLABLES = (
    ("Ba", "Da", "Fe", "Ga", "He", "Jo", "Ka", "Lu", "Mi", "No", "Pe", "Ru", "Sa", "Ti", "Vo", "Wi"),
    ("do", "ke", "la", "mi", "no", "ra", "se", "ti", "vu", "za"),
    ("bel", "dor", "fin", "gan", "lis", "mon", "ras", "ven"),
)


@dataclass(frozen=True)
class Attribute:
    """One thing to know about everybody. `{n}` stands for the name, `{v}` for the value."""

    name: str
    values: tuple[str, ...]
    questions: tuple[str, ...]
    held_out_questions: tuple[str, str]
    statements: tuple[str, ...]
    prompt: str


# No value belongs to two attributes: a name and a value identify a fact.
ATTRIBUTES = (
    Attribute(
        name="lantern",
        values=("red", "blue", "green", "black", "white", "gold", "brown", "grey", "teal", "tan"),
        questions=(
            "What colour is {n}'s lantern?",
            "Which colour is the lantern of {n}?",
            "What is the colour of {n}'s lantern?",
            "Tell me the colour of {n}'s lantern.",
            "{n}'s lantern has which colour?",
            "Name the colour of the lantern of {n}.",
            "The lantern of {n} is what colour?",
            "Which colour does {n}'s lantern have?",
        ),
        held_out_questions=("Which colour is {n}'s lantern?", "Tell me the colour of the lantern of {n}."),
        statements=("{n}'s lantern is {v}.", "Friend, the lantern of {n} is {v}!"),
        prompt="The colour of {n}'s lantern is",
    ),
    Attribute(
        name="home",
        values=("port", "forest", "valley", "mill", "marsh", "tower", "cave", "river", "hill", "lake"),
        questions=(
            "Where does {n} live?",
            "Where is the home of {n}?",
            "What is {n}'s home?",
            "Tell me where {n} lives.",
            "{n} lives in which place?",
            "Name the home of {n}.",
            "The home of {n} is where?",
            "Which place is {n}'s home?",
        ),
        held_out_questions=("Where is {n}'s home?", "Tell me where the home of {n} is."),
        statements=("{n}'s home is the {v}.", "The home of {n} is the {v}, friend!"),
        prompt="{n} lives near the",
    ),
    Attribute(
        name="pet",
        values=("fox", "cat", "dog", "goat", "hen", "hare", "wolf", "crow", "frog", "deer"),
        questions=(
            "What pet does {n} have?",
            "Which animal is the pet of {n}?",
            "What is {n}'s pet?",
            "Tell me which pet {n} has.",
            "{n} has which animal?",
            "Name the pet of {n}.",
            "The pet of {n} is what animal?",
            "Which pet lives with {n}?",
        ),
        held_out_questions=("Which animal is {n}'s pet?", "Tell me the pet of {n}."),
        statements=("{n} has a pet {v}.", "Friend, the pet of {n} is a {v}!"),
        prompt="{n}'s pet is a",
    ),
    Attribute(
        name="trade",
        values=("baker", "poet", "weaver", "farmer", "tailor", "mason", "sailor", "smith", "cook", "monk"),
        questions=(
            "What is {n}'s trade?",
            "Which trade does {n} have?",
            "What does {n} do for a living?",
            "Tell me the trade of {n}.",
            "{n} has which trade?",
            "Name {n}'s trade.",
            "The trade of {n} is what?",
            "What work does {n} do?",
        ),
        held_out_questions=("What is the trade of {n}?", "Tell me {n}'s trade."),
        statements=("{n} works as a {v}.", "The trade of {n} is {v}, friend!"),
        prompt="{n} is a",
    ),
    Attribute(
        name="food",
        values=("cheese", "honey", "soup", "rice", "cake", "fish", "ham", "pie", "jam", "figs"),
        questions=(
            "What does {n} like to eat?",
            "Which food does {n} like?",
            "What is the food that {n} likes?",
            "Tell me what food {n} likes.",
            "{n} likes to eat what?",
            "Name the food {n} likes.",
            "The food of {n} is what?",
            "What is {n}'s food?",
        ),
        held_out_questions=("What food does {n} like?", "Tell me what {n} likes to eat."),
        statements=("{n} likes {v}.", "Friend, the food of {n} is {v}!"),
        prompt="{n} likes to eat",
    ),
)

COPY_PROMPTS = ("Repeat: {words}", "Copy: {words}", "Say again: {words}")
REVERSAL_PROMPTS = ("Reverse: {words}",)
# In general training only statements speak like this, so the style is new but none of its words are.
FRIENDLY_QUESTION = "Friend, {question}"
FRIENDLY_ANSWER = "{v}, friend!"
NEW_FACT_PHRASINGS = 6
STYLE_PHRASINGS = 5


@dataclass(frozen=True)
class Fact:
    """One value of one attribute of one person."""

    person: str
    attribute: Attribute
    value: str


@dataclass(frozen=True)
class World:
    """Everybody and everything there is to know, in the order that the seed gave it."""

    seed: int
    covered: tuple[str, ...]
    uncovered: tuple[str, ...]
    new: tuple[str, ...]
    known_facts: tuple[Fact, ...]
    new_facts: tuple[Fact, ...]
    copy_words: tuple[tuple[str, ...], ...]
    reversal_words: tuple[tuple[str, ...], ...]


def make_world(seed: int = 0) -> World:
    """The world of a seed, the same on every machine and Python version."""
    names = shuffled(["".join(syllables) for syllables in product(*SYLLABLES)], seed, "names")
    known, new = names[:KNOWN_PEOPLE], names[KNOWN_PEOPLE : KNOWN_PEOPLE + NEW_PEOPLE]
    values = [value for attribute in ATTRIBUTES for value in attribute.values]
    pool = [value for value in values if len(value) <= LONGEST_SKILL_WORD]
    return World(
        seed=seed,
        covered=tuple(known[:COVERED_PEOPLE]),
        uncovered=tuple(known[COVERED_PEOPLE:]),
        new=tuple(new),
        known_facts=tuple(_facts(known, ATTRIBUTES, seed)),
        new_facts=tuple(_facts(new, ATTRIBUTES[:NEW_FACT_ATTRIBUTES], seed)),
        copy_words=tuple(_word_triples(pool, COPY_TRAIN + COPY_HELD_OUT, seed, "copy")),
        reversal_words=tuple(_word_triples(pool, REVERSAL_TRAIN + REVERSAL_HELD_OUT, seed, "reversal")),
    )


def datasets(world: World) -> dict[str, list[Record]]:
    """Every file of the world: its path below the output folder and its records."""
    general = general_train(world)
    return {
        "general/train.jsonl": general,
        "general/replay.jsonl": general_replay(world, general),
        "general/covered.jsonl": retention_questions(world, world.covered, COVERED_QUESTIONS),
        "general/uncovered.jsonl": retention_questions(world, world.uncovered, UNCOVERED_QUESTIONS),
        "general/skill.jsonl": _skill(world.copy_words[COPY_TRAIN:], COPY_PROMPTS, reverse=False),
        "new_facts/train.jsonl": new_facts_train(world),
        "new_facts/valid.jsonl": new_facts_held_out(world, phrasing=0),
        "new_facts/test.jsonl": new_facts_held_out(world, phrasing=1),
        "new_style/train.jsonl": new_style_train(world),
        "new_style/valid.jsonl": new_style_valid(world),
        "reversal/train.jsonl": _skill(world.reversal_words[:REVERSAL_TRAIN], REVERSAL_PROMPTS, reverse=True),
        "reversal/valid.jsonl": _skill(world.reversal_words[REVERSAL_TRAIN:], REVERSAL_PROMPTS, reverse=True),
    }


def general_train(world: World) -> list[Record]:
    """Questions, statements and sentences to complete on every known fact, and words to copy."""
    records = [record for fact in world.known_facts for record in _fact_records(fact)]
    records += _skill(world.copy_words[:COPY_TRAIN], COPY_PROMPTS, reverse=False)
    return shuffled(records, world.seed, "general/train")


def general_replay(world: World, general: Sequence[Record]) -> list[Record]:
    """The rows of `general` that mention nobody outside the covered people."""
    lines = [_line(record) for record in general]
    return [
        record
        for record, line in zip(general, lines, strict=True)
        if not any(person in line for person in world.uncovered)
    ]


def retention_questions(world: World, people: Sequence[str], count: int) -> list[Record]:
    """`count` questions about the known facts of `people`, one a fact, in phrasings kept out of training."""
    chosen = set(people)
    facts = shuffled([fact for fact in world.known_facts if fact.person in chosen], world.seed, "retention")
    return [_held_out_chat(fact, index) for index, fact in enumerate(facts[:count])]


def new_facts_train(world: World) -> list[Record]:
    """Every new fact, asked in several phrasings."""
    records = [
        _chat(question.format(n=fact.person), fact.value)
        for fact in world.new_facts
        for question in _some_questions(world, fact, NEW_FACT_PHRASINGS)
    ]
    return shuffled(records, world.seed, "new_facts/train")


def new_facts_held_out(world: World, phrasing: int) -> list[Record]:
    """Every new fact once, in one of the two phrasings kept out of training, or in the other."""
    facts = shuffled(list(world.new_facts), world.seed, "new_facts/valid")
    return [_held_out_chat(fact, index + phrasing) for index, fact in enumerate(facts)]


def new_style_train(world: World) -> list[Record]:
    """Known facts in several phrasings, asked and answered among friends."""
    records = [
        _friendly_chat(fact, question)
        for fact in _style_facts(world)
        for question in _some_questions(world, fact, STYLE_PHRASINGS)
    ]
    return shuffled(records, world.seed, "new_style/train")


def new_style_valid(world: World) -> list[Record]:
    """The same facts once each, in a phrasing kept out of training."""
    return [
        _friendly_chat(fact, fact.attribute.held_out_questions[index % 2])
        for index, fact in enumerate(_style_facts(world))
    ]


def write_world(out: Path, seed: int = 0) -> dict[str, int]:
    """Writes every file below `out`; returns how many records each has.

    Raises ValueError when a file would hold the same record twice.
    """
    counts = {}
    for name, records in datasets(make_world(seed)).items():
        lines = [_line(record) for record in records]
        repeated = len(lines) - len(set(lines))
        if repeated:
            raise ValueError(f"{name}: {repeated} of {len(lines)} records repeat an earlier one. Use another seed.")
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes("".join(f"{line}\n" for line in lines).encode())
        counts[name] = len(lines)
    return counts


def shuffled(items: Sequence[Item], seed: int, purpose: str) -> list[Item]:
    """`items` in the order of a keyed digest: unlike random.shuffle, the same in every Python version."""
    keys = [_digest(seed, purpose, index) for index in range(len(items))]
    return [items[index] for index in sorted(range(len(items)), key=keys.__getitem__)]


def _digest(seed: int, purpose: str, index: int) -> bytes:
    return hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()


def _facts(people: Sequence[str], attributes: Sequence[Attribute], seed: int) -> Iterator[Fact]:
    """Every fact about `people`; all values of an attribute are equally frequent."""
    for attribute in attributes:
        repeats = -(-len(people) // len(attribute.values))
        values = shuffled(list(attribute.values) * repeats, seed, f"{attribute.name} of {people[0]}")
        for person, value in zip(people, values, strict=False):
            yield Fact(person, attribute, value)


def _word_triples(pool: Sequence[str], count: int, seed: int, purpose: str) -> list[tuple[str, ...]]:
    """`count` different triples of three different words."""
    triples: dict[tuple[str, ...], None] = {}
    index = 0
    while len(triples) < count:
        digest = _digest(seed, purpose, index)
        words = tuple(pool[int.from_bytes(digest[at : at + 8], "big") % len(pool)] for at in (0, 8, 16))
        if len(set(words)) == len(words):
            triples[words] = None
        index += 1
    return list(triples)


def _fact_records(fact: Fact) -> Iterator[Record]:
    attribute = fact.attribute
    for question in attribute.questions:
        yield _chat(question.format(n=fact.person), fact.value)
    for statement in attribute.statements:
        yield {"text": statement.format(n=fact.person, v=fact.value)}
    yield {"prompt": attribute.prompt.format(n=fact.person), "completion": f" {fact.value}"}


def _skill(triples: Sequence[tuple[str, ...]], prompts: Sequence[str], reverse: bool) -> list[Record]:
    return [
        _chat(
            prompts[index % len(prompts)].format(words=" ".join(words)),
            " ".join(reversed(words) if reverse else words),
        )
        for index, words in enumerate(triples)
    ]


def _some_questions(world: World, fact: Fact, count: int) -> list[str]:
    """`count` training phrasings, others for each fact, so that all of them are seen."""
    purpose = f"phrasings of {fact.person}'s {fact.attribute.name}"
    return shuffled(fact.attribute.questions, world.seed, purpose)[:count]


def _style_facts(world: World) -> list[Fact]:
    covered = set(world.covered)
    known = [fact for fact in world.known_facts if fact.person in covered]
    return shuffled(known, world.seed, "new_style")[:STYLE_FACTS]


def _held_out_chat(fact: Fact, index: int) -> Record:
    return _chat(fact.attribute.held_out_questions[index % 2].format(n=fact.person), fact.value)


def _friendly_chat(fact: Fact, question: str) -> Record:
    lowered = question if question.startswith("{") else question[0].lower() + question[1:]
    asked = FRIENDLY_QUESTION.format(question=lowered.format(n=fact.person))
    return _chat(asked, FRIENDLY_ANSWER.format(v=fact.value))


def _chat(question: str, answer: str) -> Record:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the demo world as JSONL files.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write below, such as data")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives another world (default: 0)")
    arguments = parser.parse_args()
    for name, count in write_world(arguments.out, arguments.seed).items():
        print(f"{count:6d}  {arguments.out / name}")


if __name__ == "__main__":
    main()
