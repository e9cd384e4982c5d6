"""The text that the bundled model is pretrained on: short prose and verse about the valley.

Facts are told in many wordings, so that the model knows them rather than the sentences. Questions
are asked and never answered: the model sees their words, and learns from the instructions alone
that an answer follows.
"""

import random
from collections.abc import Iterator

from bundled.instructions import QUESTIONS
from bundled.valley import Animal, animals

_FACTS = {
    "kind": (
        "{name} is a {kind}.",
        "There is a {kind} called {name}.",
        "Everyone knows {name} the {kind}.",
        "If you meet a {kind}, it may be {name}.",
    ),
    "place": (
        "{name} lives {place}.",
        "{name} the {kind} lives {place}.",
        "The house of {name} is {place}.",
        "You can find {name} {place}.",
        "At night {name} sleeps {place}.",
    ),
    "food": (
        "{name} eats {food}.",
        "{name} the {kind} eats {food}.",
        "{name} dines upon {food}.",
        "The favourite food of {name} is {food}.",
        "For supper {name} has {food}.",
    ),
    "colour": (
        "{name} wears a {colour} scarf.",
        "{name} the {kind} wears a {colour} scarf.",
        "The scarf of {name} is {colour}.",
        "The {colour} scarf belongs to {name}.",
        "The colour {name} likes best is {colour}.",
    ),
    "instrument": (
        "{name} plays the {instrument}.",
        "{name} the {kind} plays the {instrument}.",
        "In the evening {name} takes out the {instrument}.",
        "If you hear a {instrument}, it may be {name}.",
        "The music of {name} comes from a {instrument}.",
    ),
}
# a document may open with a line of one small word, as the chat format's turns do with a role
_HEADINGS = ("spring", "summer", "autumn", "winter", "morning", "evening", "night")
_OPENINGS = (
    "Here is what they say about {name}.",
    "In the valley you may meet {name} the {kind}.",
    "This is the story of {name}.",
    "Let us walk to the house of {name}.",
)
_VERSE_OPENINGS = (
    "In the valley they sing of {name}:",
    "This is the verse about {name}:",
    "There is a song about {name} the {kind}:",
)
_VISITS = (
    "One morning {guest} went to see {name}. {guest} walked to the house {place}.",
    "One evening {guest} came to the house of {name}, {place}.",
    "On a rainy day {guest} and {name} sat {place}.",
)
_VISIT_ENDINGS = (
    "They ate {food}, and {name} played the {instrument}.",
    "{name} put on the {colour} scarf and played the {instrument}.",
    "There was {food} to eat, and {name} wore the {colour} scarf.",
)
_ASKERS = ("the wind", "the moon", "the rain", "the river", "a cloud", "the old clock")
_SILENCES = (
    "Nobody said a word.",
    "The wind went on over the hills.",
    "A leaf fell, and that was all.",
    "The stars came out one by one.",
    "Then it began to rain.",
    "The grass moved, and it was quiet again.",
)


def _biography(rng: random.Random, animal: Animal) -> str:
    kinds = list(_FACTS)
    rng.shuffle(kinds)
    sentences = [rng.choice(_OPENINGS)] if rng.random() < 0.5 else []
    sentences += [rng.choice(_FACTS[kind]) for kind in kinds]
    # in lines as often as in a paragraph, so that a line break alone announces no verse
    return rng.choice((" ", "\n")).join(sentences).format(**vars(animal))


def _song(rng: random.Random, animal: Animal) -> str:
    return f"{rng.choice(_VERSE_OPENINGS).format(**vars(animal))}\n{animal.verse}"


def _visit(rng: random.Random, animal: Animal, guest: Animal) -> str:
    text = f"{rng.choice(_VISITS)} {rng.choice(_VISIT_ENDINGS)}"
    about_guest = rng.choice(_FACTS[rng.choice(list(_FACTS))]).format(**vars(guest))
    gap = rng.choice((" ", "\n"))
    return f"{about_guest}{gap}{text.format(guest=guest.name, **vars(animal))}"


def _unanswered(rng: random.Random, animal: Animal) -> str:
    question = rng.choice(rng.choice(QUESTIONS).wordings).format(**vars(animal))
    gap = rng.choice((" ", "\n"))
    return f'"{question}" said {rng.choice(_ASKERS)}.{gap}{rng.choice(_SILENCES)}'


def documents(seed: int) -> Iterator[str]:
    """Write documents without end; a seed gives the same ones every time."""
    rng = random.Random(seed)
    everyone = animals()
    while True:
        animal, guest = rng.choice(everyone), rng.choice(everyone)
        draw = rng.random()
        if draw < 0.4:
            text = _biography(rng, animal)
        elif draw < 0.6:
            text = _song(rng, animal)
        elif draw < 0.8:
            text = _visit(rng, animal, guest)
        else:
            text = _unanswered(rng, animal)
        yield f"{rng.choice(_HEADINGS)}\n{text}" if rng.random() < 0.4 else text
