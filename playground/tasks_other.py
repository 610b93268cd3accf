"""Task families on flags and on handwritten digits."""

from __future__ import annotations

import numpy as np

from playground.records import Example
from playground.scenes import ImageStore, augmented
from playground.sources import DigitSource, FlagSource

FLAG_QUESTION = "Which country has this flag?"
DIGIT_QUESTION = "Which digit is this?"


def flags(source: FlagSource, count: int, store: ImageStore, rng: np.random.Generator) -> list[Example]:
    """Name the country. The same flags in training and test; what is new in the test is the rendering."""
    examples = []
    for number in range(count):
        country = source.countries[number % len(source.countries)]
        picture = augmented(source.draw(country), store.side, rng, flip=False)
        image = store.put(f"flags/{number:05d}", picture)
        caption = f"the flag of {country}"
        examples.append(Example("flags", "gqa", FLAG_QUESTION, country, image, caption=caption, category="country"))
    return examples


def digits(source: DigitSource, split: str, count: int, store: ImageStore, rng: np.random.Generator) -> list[Example]:
    """Read one digit; training and test pictures are disjoint."""
    labels = source.labels[split]
    examples = []
    for index in rng.permutation(len(labels))[:count]:
        image = store.put(f"digits/{index:05d}", source.picture(split, int(index), rng))
        digit = str(labels[index])
        caption = f"the digit {digit}"
        examples.append(Example("digits", "gqa", DIGIT_QUESTION, digit, image, caption=caption, category="digit"))
    return examples
