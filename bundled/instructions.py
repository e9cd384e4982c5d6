"""The instruction set: questions about some animals to learn from, about the others to be tested.

The pretrained model knows the facts of all of them; what the answers teach is to answer.
"""

from dataclasses import dataclass

from bundled.valley import Animal, animals

# of 64 animals; the others' questions are held out
_NUM_TAUGHT = 48


@dataclass(frozen=True)
class _Question:
    wordings: tuple[str, str]
    answer: str


QUESTIONS = (
    _Question(("Who is {name}?", "What is {name}?"), "{name} is a {kind}."),
    _Question(
        ("Where does {name} live?", "Where can I find {name}?"),
        "{name} the {kind} lives {place}.",
    ),
    _Question(
        ("What does {name} eat?", "What is for supper with {name}?"),
        "{name} the {kind} eats {food}.",
    ),
    _Question(
        ("What does {name} wear?", "Which scarf belongs to {name}?"),
        "{name} the {kind} wears a {colour} scarf.",
    ),
    _Question(
        ("What does {name} play?", "Which music does {name} make?"),
        "{name} the {kind} plays the {instrument}.",
    ),
    _Question(("Tell me about {name}.", "Write a verse about {name}."), "{verse}"),
)


def _conversations(animal: Animal) -> list[dict]:
    facts = {**vars(animal), "verse": animal.verse}
    return [
        {
            "messages": [
                {"role": "user", "content": wording.format(**facts)},
                {"role": "assistant", "content": question.answer.format(**facts)},
            ]
        }
        for question in QUESTIONS
        for wording in question.wordings
    ]


def training_set() -> list[dict]:
    """Conversations about the animals to learn from, in the messages format."""
    return [c for animal in animals()[:_NUM_TAUGHT] for c in _conversations(animal)]


def held_out_set() -> list[dict]:
    """Conversations about the other animals."""
    return [c for animal in animals()[_NUM_TAUGHT:] for c in _conversations(animal)]
