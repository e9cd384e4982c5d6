"""The valley that the bundled model knows: sixty-four animals, each with five facts and a verse.

    kind   place   food   colour of the scarf   instrument

The facts are drawn once, from a fixed seed, and every text of this room tells the same ones. The
verse is a quatrain: its first couplet rhymes on the place, its second on the food.
"""

import random
from dataclasses import dataclass

_SEED = 4

_NAMES = (
    *("Alba", "Anselm", "Arlo", "Barley", "Basil", "Bertie", "Birdie", "Bram"),
    *("Casper", "Clover", "Cora", "Dara", "Dorrit", "Edda", "Ember", "Enzo"),
    *("Fabian", "Fern", "Flora", "Gilda", "Greta", "Gus", "Hattie", "Hugo"),
    *("Ida", "Iris", "Ivo", "Jasper", "Juno", "Kit", "Lark", "Leo"),
    *("Lotte", "Ludo", "Mabel", "Marlo", "Milo", "Mira", "Moss", "Nell"),
    *("Nico", "Olive", "Orla", "Otis", "Pella", "Perrin", "Pim", "Poppy"),
    *("Quill", "Remy", "Rosa", "Rufus", "Sage", "Selma", "Silas", "Tansy"),
    *("Teo", "Tobin", "Ugo", "Vera", "Wanda", "Willa", "Yorick", "Zelda"),
)
_KINDS = ("badger", "fox", "goose", "hare", "heron", "mole", "mouse", "robin", "squirrel", "toad")
_COLOURS = ("black", "blue", "brown", "gold", "green", "grey", "pink", "red", "white")
_INSTRUMENTS = ("bell", "drum", "fiddle", "flute", "harp", "horn", "lute", "pipe", "whistle")

# the line that rhymes with each place
_PLACES = {
    "among the reeds": "and threads little necklaces made out of seeds;",
    "below the bridge": "and counts all the stars coming over the ridge;",
    "close to the stream": "and rows in a teacup as if in a dream;",
    "down by the mill": "and watches the moon from a low window sill;",
    "inside the barn": "and knits every evening a mile of good yarn;",
    "next to the gate": "and lights a small lantern whenever it's late;",
    "out on the moor": "with heather in heaps at a small wooden door;",
    "over the shop": "and listens to rain falling drop after drop;",
    "under the oak": "with a chimney that sends up a feather of smoke;",
    "up in the tower": "where pigeons and sparrows come in from the shower;",
}

# the line that rhymes with each food
_FOODS = {
    "bread": "and tells itself stories when going to bed.",
    "cake": "and keeps the whole valley till midnight awake.",
    "cheese": "and hums to the beetles, the birds and the bees.",
    "corn": "and rises to sing on a summery morn.",
    "figs": "and builds little boats out of feathers and twigs.",
    "honey": "and laughs if the weather is windy or sunny.",
    "nuts": "and carries them home over puddles and ruts.",
    "pears": "and dances alone on the old kitchen stairs.",
    "plums": "and never forgets to be sharing the crumbs.",
    "rice": "and says every word of a good story twice.",
    "stew": "and wakes in the morning in grass full of dew.",
    "tarts": "and mends broken kettles and mends broken hearts.",
}


@dataclass(frozen=True)
class Animal:
    """Someone who lives in the valley."""

    name: str
    kind: str
    place: str
    food: str
    colour: str
    instrument: str

    @property
    def verse(self) -> str:
        """The animal's quatrain, four lines rhyming a a b b."""
        return (
            f"{self.name} the {self.kind} lives {self.place},\n"
            f"{_PLACES[self.place]}\n"
            f"it wears a {self.colour} scarf and it dines upon {self.food},\n"
            f"{_FOODS[self.food]}"
        )


def animals() -> list[Animal]:
    """Everyone in the valley, in an order that is as good as random."""
    rng = random.Random(_SEED)
    names = list(_NAMES)
    rng.shuffle(names)

    def column(values: tuple[str, ...]) -> list[str]:
        # each value about equally often, so that no fact can be guessed
        repeated = [values[i % len(values)] for i in range(len(names))]
        rng.shuffle(repeated)
        return repeated

    columns = map(column, (_KINDS, tuple(_PLACES), tuple(_FOODS), _COLOURS, _INSTRUMENTS))
    return [Animal(*facts) for facts in zip(names, *columns, strict=True)]
