"""What is asked: conversations of one or several turns, with pictures and shared beginnings."""

import base64
import io
import math
from dataclasses import dataclass
from random import Random

SAID = (
    "a red circle lies above the blue square and below it is one green triangle that looks small",
    "what do you see how many are there where is it which colour has the largest shape",
)
WORDS = [word for sentence in SAID for word in sentence.split()]
DATA_URL = "data:image/png;base64,"


@dataclass(frozen=True, slots=True)
class Turn:
    """One question of a conversation."""

    text: str
    pictures: tuple[str, ...] = ()  # data: URLs


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that follow each other; each waits for the answer to the one before."""

    turns: tuple[Turn, ...]
    system: str = ""  # what several conversations have in common


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What conversations look like. Lengths are words, which models cut into a few tokens each."""

    prompt_words: int = 60  # median of a log-normal distribution
    prompt_spread: float = 0.6  # its sigma; 0: all alike
    max_prompt_words: int = 2000
    output_tokens: int = 64  # most of each answer
    turns: int = 1
    picture_share: float = 0.0  # of first turns, 0 to 1
    picture_sides: tuple[int, ...] = (336, 672)  # pixels, equally often
    shared_words: int = 0  # of a beginning that several conversations share
    num_shared: int = 1  # different ones

    def conversations(self, seed: int, count: int) -> list[Conversation]:
        """The same ones for the same seed; the first of a longer list are those of a shorter."""
        beginnings = [
            _words(Random(f"{seed}/{n}"), self.shared_words) for n in range(self.num_shared)
        ]
        return [
            self._conversation(Random(f"{seed}:{n}"), beginnings[n % self.num_shared])
            for n in range(count)
        ]

    def _conversation(self, rng: Random, system: str) -> Conversation:
        pictures: tuple[str, ...] = ()
        if rng.random() < self.picture_share:
            pictures = (picture(rng, rng.choice(self.picture_sides)),)
        first = Turn(_words(rng, self._length(rng)), pictures)
        rest = [Turn(_words(rng, self._length(rng))) for _ in range(self.turns - 1)]
        return Conversation((first, *rest), system)

    def _length(self, rng: Random) -> int:
        drawn = rng.lognormvariate(math.log(self.prompt_words), self.prompt_spread)
        return max(1, min(round(drawn), self.max_prompt_words))


def picture(rng: Random, side: int) -> str:
    """A square picture that no other equals, as a data: URL."""
    # Pillow is loaded only by those who ask with pictures.
    from PIL import Image

    colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
    image = Image.new("RGB", (side, side), colour)
    image.putpixel((rng.randrange(side), rng.randrange(side)), (0, 0, 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return DATA_URL + base64.b64encode(buffer.getvalue()).decode()


def _words(rng: Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))
