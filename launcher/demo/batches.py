"""Training batches: pictures as tiles with patch labels, and tokenised questions with answers."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tessera.launcher.demo import pictures
from tessera.launcher.demo.checkpoint import EOS, IMAGE, PAD
from tessera.launcher.demo.pictures import Question, Scene
from tessera.launcher.demo.tiles import IGNORE, cut, labels, layout
from tessera.proto.image_layout import ImagePlan

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)
INSTRUCT_SYSTEM = "<<SYS>>\nYou are a helpful assistant.\n<</SYS>>\n\n"
# What stands before the image -> its share, and the ways to write the question behind it.
FORMATS: dict[str, tuple[float, tuple[str, ...]]] = {
    "[INST] ": (0.56, ("\n{} [/INST]",) * 8 + (" {} [/INST]", "{} [/INST]")),
    "": (0.27, ("\n{}", "\n{}", "\n{}\n", "{}", "{}\n", " {}")),
    "USER: ": (0.11, ("\n{} ASSISTANT:", "\n{} ASSISTANT:", "\n{}\nASSISTANT:")),
    SYSTEM + "USER: ": (0.03, ("\n{} ASSISTANT:",)),
    INSTRUCT_SYSTEM + "[INST] ": (0.03, ("\n{} [/INST]",)),
}
CHAT_FORMATS = ("[INST] {} [/INST]", "[INST] {} [/INST]", "{}", "USER: {} ASSISTANT:")
SAMPLING_WEIGHT = {  # how eagerly a kind of question is drawn; kinds under acceptance more often
    "caption": 2.0, "read": 5.0, "read_none": 0.4, "has_text": 0.6, "background": 0.5, "count": 2.5,
    "count_of": 1.5, "colors": 0.5, "color": 2.5, "absent": 0.5, "shape": 2.5, "classify": 1.5,
    "exists": 1.5, "position": 1.2, "layout": 1.0,
}  # fmt: skip
LONG_KINDS = ("caption", "layout", "colors")  # many easy tokens: each counts half
SCENE_KINDS = {"shapes": 42, "text": 40, "both": 16, "blank": 2}  # reading is learned last
FOLLOW_UP_SHARE = 0.06  # of [INST] segments that hold a second turn


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Padded rows of tokens with what is to be learned from them."""

    token_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]
    picture: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures of one size, and (except for pages) questions about them."""

    plan: ImagePlan
    tiles: NDArray[np.uint8]
    labels: NDArray[np.int16]
    prefix: list[int]
    segments: list[TextBatch]
    chats: TextBatch | None


class Encoder:
    """Text to token ids, remembering what it has seen."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """Ids with the leading <s>."""
        ids = self._known.get(text)
        if ids is None:
            if len(self._known) > 50_000:
                self._known.clear()
            ids = self._known[text] = self._tokenizer.encode(text).ids
        return ids


def page_batch(rng: random.Random, size: int, plain_share: float) -> Batch:
    """Pages full of characters or shapes, for the vision tower alone."""
    width, height = pictures.random_size(rng)

    def scene() -> Scene:
        if rng.random() < 0.15:
            return pictures.random_scene(rng, width, height)
        return pictures.random_page(rng, width, height, rng.random() < plain_share)

    return _batch(rng, [scene() for _ in range(size)], [], [], None)


def scene_batch(
    rng: random.Random, size: int, questions: int, encode: Encoder, with_chats: bool
) -> Batch:
    """Pictures of the domain with a few questions about each."""
    width, height = pictures.random_size(rng, largest=320 if rng.random() < 0.9 else 640)
    scenes = [pictures.random_scene(rng, width, height, SCENE_KINDS) for _ in range(size)]
    prefixes = list(FORMATS)
    prefix = rng.choices(prefixes, [FORMATS[p][0] for p in prefixes])[0]
    rows: list[tuple[list[int], list[float], int]] = []
    for picture, scene in enumerate(scenes):
        asked = _choose(rng, pictures.questions(rng, scene), questions)
        while asked:
            question = asked.pop()
            follow_up = (
                asked.pop()
                if asked and "[INST]" in prefix and rng.random() < FOLLOW_UP_SHARE
                else None
            )
            rows.append((*_segment(rng, encode, prefix, question, follow_up), picture))
    rows.sort(key=lambda row: len(row[0]))
    cuts = (
        0,
        len(rows) // 2,
        len(rows) * 5 // 6,
        len(rows),
    )  # groups of similar length: little padding
    groups = [_pad(rows[a:b]) for a, b in itertools.pairwise(cuts)]
    before = encode(f"{prefix}<image>\nx")
    chats = chat_batch(rng, encode) if with_chats else None
    return _batch(rng, scenes, before[: before.index(IMAGE)], groups, chats)


def chat_batch(rng: random.Random, encode: Encoder, size: int = 12) -> TextBatch:
    """Conversation without a picture."""
    rows = []
    for _ in range(size):
        question, answer = rng.choice(pictures.CHAT)
        text = rng.choice(CHAT_FORMATS).format(question)
        ids = [*encode(f"{text} {answer}"), EOS]
        asked = len(encode(text))
        rows.append((ids, [0.0] * asked + [1.0] * (len(ids) - asked), 0))
    return _pad(rows)


def _choose(rng: random.Random, questions: list[Question], count: int) -> list[Question]:
    """A weighted sample without replacement."""

    def key(question: Question) -> float:
        return float(rng.random() ** (1 / SAMPLING_WEIGHT[question.kind]))

    return sorted(questions, key=key, reverse=True)[:count]


def _segment(
    rng: random.Random, encode: Encoder, prefix: str, question: Question, follow_up: Question | None
) -> tuple[list[int], list[float]]:
    """Token ids behind the image, and the weight of each as a target."""
    asked = f"{prefix}<image>{rng.choice(FORMATS[prefix][1]).format(question.text)}"
    turns = [(asked, question)]
    if follow_up:
        turns.append((f"{asked} {question.answer}</s> [INST] {follow_up.text} [/INST]", follow_up))
    ids = [*encode(f"{turns[-1][0]} {turns[-1][1].answer}"), EOS]
    weights = [0.0] * len(ids)
    for text, turn in turns:
        start = len(encode(text))
        end = len(encode(f"{text} {turn.answer}")) + 1
        weights[start:end] = [0.5 if turn.kind in LONG_KINDS else 1.0] * (end - start)
    behind = ids.index(IMAGE) + 1
    return ids[behind:], weights[behind:]


def _pad(rows: Sequence[tuple[list[int], list[float], int]]) -> TextBatch:
    length = max(len(ids) for ids, _, _ in rows)
    token_ids = np.full((len(rows), length), PAD, np.int64)
    weights = np.zeros((len(rows), length), np.float32)
    for row, (ids, weight, _) in enumerate(rows):
        token_ids[row, : len(ids)] = ids
        weights[row, : len(ids)] = weight
    targets = np.where(weights > 0, token_ids, IGNORE)
    return TextBatch(token_ids, targets, weights, np.array([picture for _, _, picture in rows]))


def _batch(
    rng: random.Random,
    scenes: list[Scene],
    prefix: list[int],
    segments: list[TextBatch],
    chats: TextBatch | None,
) -> Batch:
    plan = layout(scenes[0].width, scenes[0].height)
    tiles = []
    for scene in scenes:
        image = pictures.draw(scene)
        if rng.random() < 0.1:
            image = pictures.jpeg(image, rng.randint(70, 95))
        tiles.append(cut(image, plan))
    return Batch(
        plan,
        np.stack(tiles),
        np.stack([labels(scene, plan) for scene in scenes]),
        prefix,
        segments,
        chats,
    )
