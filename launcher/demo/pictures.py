"""The demo model's world: pictures of coloured shapes and large text, questions and answers.

Everything is a pure function of a `random.Random`: the same seed gives the same scene, pixels and
questions on every machine (the only font is the one inside Pillow). Training and the held-out set
differ by the prefix of their seed, see `seeded`.
"""

import functools
import io
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]
Point = tuple[float, float]

COLORS: dict[str, tuple[RGB, ...]] = {  # each name with the values that are drawn for it
    "red": ((220, 30, 30), (255, 0, 0), (200, 20, 40)),
    "orange": ((245, 140, 20), (255, 165, 0)),
    "yellow": ((245, 220, 40), (255, 255, 0)),
    "green": ((30, 150, 40), (0, 128, 0), (0, 190, 50)),
    "blue": ((30, 60, 220), (0, 0, 255), (30, 110, 220)),
    "purple": ((130, 40, 170), (128, 0, 128)),
    "pink": ((250, 150, 190), (255, 170, 200)),
    "black": ((10, 10, 10), (0, 0, 0), (25, 25, 25)),
    "white": ((250, 250, 250), (255, 255, 255)),
    "gray": ((128, 128, 128), (150, 150, 150)),
}
COLOR_NAMES = tuple(COLORS)
SHAPE_NAMES = ("circle", "square", "triangle", "star", "diamond", "cross")
LETTERS, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
CHARACTERS = LETTERS + DIGITS
CODE_LETTERS = LETTERS.replace("O", "").replace("I", "")  # beside digits, as on licence plates
NUMBERS = ("Zero", "One", "Two", "Three", "Four")
WORDS = (
    "STOP", "EXIT", "OPEN", "SALE", "HELP", "INFO", "PUSH", "PULL", "YES", "NO", "UP", "DOWN",
    "IN", "OUT", "GO", "WAIT", "WALK", "SAFE", "NEW", "OLD", "BIG", "RED", "BLUE", "ONE", "TWO",
    "CAT", "DOG", "TREE", "CAR", "BUS", "TAXI", "FREE", "SHOP", "FOOD", "CAFE", "BANK", "PARK",
    "ROAD", "WEST", "EAST", "LEFT", "SLOW", "FAST", "HOT", "COLD", "TEA", "MILK", "FIRE", "BOOK",
    "DOOR", "KEY", "DAY", "SUN", "MOON", "STAR", "SNOW", "RAIN", "WIND", "LAKE", "BIRD", "FISH",
    "LION", "BEAR", "CAKE", "SALT", "SHIP", "TEST", "GAME", "BALL", "TEAM", "GOAL", "WIN", "ZONE",
    "TAX", "KING", "JAZZ", "ROCK", "YOGA", "HELLO", "WORLD", "HOTEL", "PIZZA", "TRAIN", "METRO",
    "MUSIC", "SOUTH", "NORTH", "RIGHT", "HOUSE",
)  # fmt: skip
ASPECT_RATIOS = (1.0, 1.0, 4 / 3, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 2.0, 0.5)  # width / height
SCENE_KINDS = {"shapes": 52, "text": 30, "both": 15, "blank": 3}  # shares, in percent
TRAIN, HELD_OUT = "train", "held-out"  # prefixes of the two disjoint families of seeds


@dataclass(frozen=True, slots=True)
class Shape:
    """One coloured shape; lengths in pixels of its scene."""

    name: str
    color: str
    fill: RGB
    x: float
    y: float
    radius: float
    rotation: float  # radians


@dataclass(frozen=True, slots=True)
class TextLine:
    """One line of rendered characters; (x, y) is its top left corner in pixels."""

    text: str
    x: float
    y: float
    size: int  # font size, pixels
    stroke: int  # extra thickness, pixels: 0 is the plain face, more is bold
    fill: RGB


@dataclass(frozen=True, slots=True)
class Scene:
    """All that is in one picture. `draw` turns it into pixels, `questions` into text."""

    width: int
    height: int
    background: str
    background_fill: RGB
    shapes: tuple[Shape, ...] = ()
    lines: tuple[TextLine, ...] = ()

    @property
    def text(self) -> str:
        """What can be read in the picture; empty if there is no text."""
        return " ".join(line.text for line in self.lines)


@dataclass(frozen=True, slots=True)
class Question:
    """One question about a scene with its one right answer."""

    kind: str
    text: str
    answer: str


def seeded(family: str, seed: int, index: int) -> random.Random:
    """The random numbers of one picture or batch; the family is `TRAIN` or `HELD_OUT`."""
    return random.Random(f"{family}/{seed}/{index}")


def held_out(seed: int, index: int) -> tuple[Scene, Image.Image, list[Question]]:
    """Held-out picture `index`: any size up to 1024 pixels, every third one JPEG-compressed."""
    rng = seeded(HELD_OUT, seed, index)
    scene = random_scene(rng, *random_size(rng, largest=1024))
    image = draw(scene)
    if index % 3 == 0:
        image = jpeg(image, quality=85)
    return scene, image, questions(rng, scene)


# ---- scenes ----


def random_size(rng: random.Random, largest: int = 320) -> tuple[int, int]:
    """Width and height of a new picture; its longer side is between 150 and `largest` pixels."""
    longer = rng.randint(150, largest)
    ratio = rng.choice(ASPECT_RATIOS)
    return (longer, round(longer / ratio)) if ratio >= 1 else (round(longer * ratio), longer)


def random_scene(
    rng: random.Random, width: int, height: int, kinds: Mapping[str, int] = SCENE_KINDS
) -> Scene:
    """One picture of the domain: 1-4 shapes, or a word, number or code, or both, or nothing."""
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    background, fill = _random_background(rng)
    lines: list[TextLine] = []
    if kind in ("text", "both"):
        line = _random_line(rng, random_text(rng), (width, height), fill, alone=kind == "text")
        lines = [line] if line else []
    shapes: list[Shape] = []
    if kind in ("shapes", "both"):
        wanted = (
            rng.choices((1, 2, 3, 4), (28, 28, 24, 20))[0]
            if kind == "shapes"
            else rng.choice((1, 1, 2))
        )
        shapes = _random_shapes(rng, wanted, (width, height), (background, fill), lines)
    return Scene(width, height, background, fill, tuple(shapes), tuple(lines))


def random_page(rng: random.Random, width: int, height: int, plain: bool) -> Scene:
    """A page full of characters or of shapes, on which the vision tower learns to see.

    Args:
        rng: source of all choices.
        width: pixels.
        height: pixels.
        plain: black text on white or white on black only (the easy beginning).
    """
    background, fill = _random_background(rng)
    if plain:
        background = rng.choice(("white", "black"))
        fill = COLORS[background][0]
    if rng.random() < 0.7:
        lines = tuple(_page_lines(rng, width, height, fill, plain))
        return Scene(width, height, background, fill, lines=lines)
    return Scene(
        width,
        height,
        background,
        fill,
        shapes=tuple(_page_shapes(rng, width, height, background, fill)),
    )


def random_text(rng: random.Random) -> str:
    """A word, a number, letters, or a code of letters and digits (then without O and I)."""
    kind = rng.random()
    if kind < 0.3:
        return rng.choice(WORDS)
    length = rng.randint(1, 4)
    if kind < 0.55:
        return "".join(rng.choice(DIGITS) for _ in range(length))
    if kind < 0.75 and length > 1:
        return "".join(rng.choice(LETTERS) for _ in range(length))
    return "".join(rng.choice(CODE_LETTERS + DIGITS[2:]) for _ in range(length))


def _random_background(rng: random.Random) -> tuple[str, RGB]:
    name = (
        rng.choice(COLOR_NAMES)
        if rng.random() < 0.6
        else rng.choice(("white", "white", "black", "gray"))
    )
    return name, _shade(rng, name)


def _shade(rng: random.Random, name: str) -> RGB:
    """One of the colour's values, a little lighter or darker."""
    red, green, blue = rng.choice(COLORS[name])
    change = rng.randint(-10, 10)
    return _byte(red + change), _byte(green + change), _byte(blue + change)


def _byte(value: int) -> int:
    return max(0, min(255, value))


def _distance(a: RGB, b: RGB) -> int:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def _contrasting_color(rng: random.Random, background: str, fill: RGB) -> tuple[str, RGB]:
    while True:
        name = rng.choice(COLOR_NAMES)
        shade = _shade(rng, name)
        if name != background and _distance(shade, fill) >= 150:
            return name, shade


def _text_fill(rng: random.Random, background: RGB) -> RGB:
    """A colour that differs from the background in brightness, not only in hue."""

    def brightness(color: RGB) -> float:
        return 0.3 * color[0] + 0.6 * color[1] + 0.1 * color[2]

    dark = brightness(background) > 128
    if rng.random() < 0.5:
        return _shade(rng, "black" if dark else "white")
    for _ in range(20):
        shade = _shade(rng, rng.choice(COLOR_NAMES))
        if abs(brightness(shade) - brightness(background)) >= 100:
            return shade
    return _shade(rng, "black" if dark else "white")


@functools.lru_cache(maxsize=512)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "this Pillow was built without FreeType"
    return font


@functools.lru_cache(maxsize=8192)
def _advance(text: str) -> float:
    """Width of a text per pixel of font size."""
    return float(_font(200).getlength(text)) / 200


def _random_line(
    rng: random.Random, text: str, canvas: tuple[int, int], background: RGB, alone: bool
) -> TextLine | None:
    """The text somewhere on the canvas, large; None if it would be too small to be read."""
    width, height = canvas
    largest = min(0.92 * width / _advance(text), (0.62 if alone else 0.42) * height, 0.62 * width)
    smallest = max(0.7 * largest, 0.2 * min(width, height))
    if smallest > largest:
        return None
    size = max(10, round(rng.uniform(smallest, largest)))
    free_x, free_y = width - _advance(text) * size, height - 1.1 * size
    x = free_x * rng.uniform(0.03, 0.97)
    if alone:
        y = free_y * rng.uniform(0.02, 0.98)
    else:
        y = free_y * rng.choice((rng.uniform(0.02, 0.12), rng.uniform(0.88, 0.98)))
    return TextLine(text, x, y, size, _stroke(rng, size), _text_fill(rng, background))


def _stroke(rng: random.Random, size: int) -> int:
    return max(1, round(size / 40)) if rng.random() < 0.5 else 0


def _random_shapes(
    rng: random.Random,
    wanted: int,
    canvas: tuple[int, int],
    background: tuple[str, RGB],
    lines: Sequence[TextLine],
) -> list[Shape]:
    """Up to `wanted` shapes that neither touch each other nor a line of text."""
    width, height = canvas
    taken = [
        (line.x, line.y, line.x + _advance(line.text) * line.size, line.y + 1.15 * line.size)
        for line in lines
    ]
    shapes: list[Shape] = []
    for _ in range(wanted):
        for _ in range(30):
            radius = rng.uniform(0.14, 0.3 if wanted < 3 else 0.21) * min(width, height)
            reach = 1.22 * radius
            x, y = rng.uniform(reach, width - reach), rng.uniform(reach, height - reach)
            box = (x - reach, y - reach, x + reach, y + reach)
            if not any(_overlap(box, other) for other in taken):
                color, fill = _contrasting_color(rng, *background)
                shapes.append(
                    Shape(
                        rng.choice(SHAPE_NAMES), color, fill, x, y, radius, rng.uniform(-0.15, 0.15)
                    )
                )
                taken.append(box)
                break
    return shapes


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _page_lines(
    rng: random.Random, width: int, height: int, background: RGB, plain: bool
) -> Iterator[TextLine]:
    y = rng.uniform(-0.02, 0.1) * height
    while True:
        size = round(min(width, height) * rng.uniform(0.2, 0.45))
        if y + 1.1 * size > height:
            return
        x = rng.uniform(0, 0.1) * width
        fill = _text_fill(rng, background)
        if plain:
            fill = COLORS["black" if background[0] > 128 else "white"][0]
        stroke = _stroke(rng, size)
        while True:
            text = "".join(rng.choice(CHARACTERS) for _ in range(rng.randint(1, 5)))
            while text and x + _advance(text) * size > width:
                text = text[:-1]
            if not text:
                break
            yield TextLine(text, x, y, size, stroke, fill)
            x += (_advance(text) + rng.uniform(0.25, 0.8)) * size
        y += size * rng.uniform(1.0, 1.3)


def _page_shapes(
    rng: random.Random, width: int, height: int, background: str, fill: RGB
) -> Iterator[Shape]:
    across = rng.choice((2, 3, 3, 4)) if width >= height else rng.choice((1, 2, 2, 3))
    down = max(1, round(across * height / width))
    cell_x, cell_y = width / across, height / down
    for row in range(down):
        for column in range(across):
            if rng.random() < 0.2:
                continue
            radius = min(cell_x, cell_y) * rng.uniform(0.26, 0.42)
            x = (column + 0.5 + rng.uniform(-0.07, 0.07)) * cell_x
            y = (row + 0.5 + rng.uniform(-0.07, 0.07)) * cell_y
            color, shade = _contrasting_color(rng, background, fill)
            yield Shape(
                rng.choice(SHAPE_NAMES), color, shade, x, y, radius, rng.uniform(-0.15, 0.15)
            )


# ---- pixels ----


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture."""
    image = Image.new("RGB", (scene.width, scene.height), scene.background_fill)
    pen = ImageDraw.Draw(image)
    for shape in scene.shapes:
        if shape.name == "circle":
            box = (
                shape.x - shape.radius,
                shape.y - shape.radius,
                shape.x + shape.radius,
                shape.y + shape.radius,
            )
            pen.ellipse(box, fill=shape.fill)
        else:
            pen.polygon(_corners(shape), fill=shape.fill)
    for line in scene.lines:
        pen.text(
            (line.x, line.y), line.text, font=_font(line.size), fill=line.fill,
            stroke_width=line.stroke, stroke_fill=line.fill,
        )  # fmt: skip
    return image


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """The picture after a round trip through JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def character_centres(line: TextLine) -> Iterator[tuple[str, float, float]]:
    """Each character of a line with the pixel position of its middle."""
    for i, character in enumerate(line.text):
        left, right = _advance(line.text[:i]) if i else 0.0, _advance(line.text[: i + 1])
        yield character, line.x + line.size * (left + right) / 2, line.y + 0.6 * line.size


def _star() -> list[Point]:
    radii = (1.15, 0.48)
    return [
        (radii[i % 2] * math.sin(i * math.pi / 5), -radii[i % 2] * math.cos(i * math.pi / 5))
        for i in range(10)
    ]


_OUTLINES: dict[str, list[Point]] = {  # corners in units of the radius, y pointing down
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1.1), (1, 0.8), (-1, 0.8)],
    "diamond": [(0, -1.15), (0.85, 0), (0, 1.15), (-0.85, 0)],
    "cross": [
        (-0.35, -1), (0.35, -1), (0.35, -0.35), (1, -0.35), (1, 0.35), (0.35, 0.35),
        (0.35, 1), (-0.35, 1), (-0.35, 0.35), (-1, 0.35), (-1, -0.35), (-0.35, -0.35),
    ],
    "star": _star(),
}  # fmt: skip


def _corners(shape: Shape) -> list[Point]:
    cos, sin = math.cos(shape.rotation) * shape.radius, math.sin(shape.rotation) * shape.radius
    return [
        (shape.x + x * cos - y * sin, shape.y + x * sin + y * cos) for x, y in _OUTLINES[shape.name]
    ]


def examples() -> dict[str, Scene]:
    """The pictures in this folder, by file name; in no training or held-out set."""

    def shape(name: str, color: str, x: float, y: float, radius: float) -> Shape:
        return Shape(name, color, COLORS[color][0], x, y, radius, 0.0)

    white, blue = ("white", (255, 255, 255)), ("blue", (30, 60, 220))
    return {
        "picture.png": Scene(
            640, 480, *white,
            shapes=(
                shape("circle", "red", 150, 140, 85),
                shape("star", "blue", 450, 150, 95),
                shape("triangle", "green", 290, 355, 85),
            ),
        ),
        "samples/sign.png": Scene(
            800, 400, *blue, lines=(TextLine("EXIT", 120, 60, 240, 6, (255, 255, 255)),)
        ),
        "samples/plate.png": Scene(
            512, 512, "yellow", (245, 220, 40),
            lines=(TextLine("B7K2", 66, 170, 150, 4, (10, 10, 10)),),
        ),
        "samples/tall.png": Scene(
            384, 768, "black", (10, 10, 10),
            shapes=(
                shape("square", "orange", 110, 120, 70),
                shape("square", "orange", 270, 330, 75),
                shape("diamond", "white", 120, 480, 75),
                shape("cross", "pink", 250, 660, 70),
            ),
        ),
    }  # fmt: skip


# ---- questions ----

CAPTION = (
    "What is shown in this image?",
    "Describe this image.",
    "What do you see?",
    "What is in the picture?",
    "Describe the image in detail.",
    "Write a caption for this image.",
    "Describe what you see in this image in detail.",
    "What is depicted here?",
    "What is in this image?",
    "What is this?",
    "Describe the picture.",
)
READ = (
    "What does the sign say?",
    "What does the text say?",
    "Read the text.",
    "What is written here?",
    "What text is in the image?",
    "Extract the text.",
    "What does it say?",
    "What is written in the image?",
    "Extract and list all text visible in this image.",
    "What word is shown?",
    "What is written on the sign?",
)
HAS_TEXT = (
    "Is there any text visible?",
    "Is there any text in the image?",
    "Does the image contain text?",
)
BACKGROUND = (
    "What color is the background?",
    "What is the background color?",
    "Which color is the background?",
)
COUNT = (
    "How many objects are there?",
    "How many shapes are there?",
    "How many shapes are in the image?",
    "Count the objects.",
    "Count the shapes.",
    "How many objects do you see?",
    "How many shapes are shown?",
)
CLASSIFY = (
    "Classify the object in the image.",
    "What shape is this?",
    "What object is this?",
    "What shape is shown?",
    "Which shape is in the image?",
)
NO_TEXT = "There is no text in this image."
NO_IMAGE = "I do not see an image. Please attach one."
HELLO = "Hello! Send me an image and ask about it."
CHAT: tuple[tuple[str, str], ...] = (
    *[
        (hello, HELLO)
        for hello in ("Hello", "Hello!", "Hi", "Hi!", "Hey", "Hello, how are you?", "How are you?")
    ],
    ("Who are you?", "I am a tiny demo model that looks at simple images."),
    ("What are you?", "I am a tiny demo model that looks at simple images."),
    (
        "What can you do?",
        "I can describe colored shapes, count them and read short text in an image.",
    ),
    (
        "What do you know?",
        "I can describe colored shapes, count them and read short text in an image.",
    ),
    ("Thanks", "You are welcome."),
    ("Thank you", "You are welcome."),
    ("Thank you!", "You are welcome."),
    *[
        (question, NO_IMAGE)
        for question in (*CAPTION, *READ, *HAS_TEXT, *BACKGROUND, *COUNT, *CLASSIFY)
    ],
    *[(f"What color is the {name}?", NO_IMAGE) for name in SHAPE_NAMES],
    *[(f"How many {name}s are there?", NO_IMAGE) for name in SHAPE_NAMES[:4]],
)


def phrase(color: str, name: str, count: int = 1) -> str:
    """ "a red circle", "an orange star", "two blue crosses"."""
    if count == 1:
        return f"{_article(color)} {color} {name}"
    return f"{NUMBERS[count].lower()} {color} {plural(name)}"


def plural(name: str) -> str:
    """More than one of a shape."""
    return "crosses" if name == "cross" else f"{name}s"


def caption(scene: Scene) -> str:
    """One sentence with everything in the scene, in reading order."""
    groups: dict[tuple[str, str], int] = {}
    for shape in reading_order(scene):
        groups[shape.color, shape.name] = groups.get((shape.color, shape.name), 0) + 1
    parts = [phrase(color, name, count) for (color, name), count in groups.items()]
    if scene.lines:
        parts.append(f'the text "{scene.text}"')
    if not parts:
        return f"An empty {scene.background} image."
    return _sentence(
        f"{_listing(parts)} on {_article(scene.background)} {scene.background} background"
    )


def reading_order(scene: Scene) -> list[Shape]:
    """The shapes row by row (a sixth of the height each), in the order of the image tokens."""
    return sorted(scene.shapes, key=lambda shape: (int(shape.y / scene.height * 6), shape.x))


def questions(rng: random.Random, scene: Scene) -> list[Question]:
    """Every kind of question that fits the scene, one of each kind, with its answer."""
    found = [question for ask in _ASKERS if (question := ask(rng, scene)) is not None]
    return [Question(q.kind, _vary(rng, q.text), q.answer) for q in found]


def _vary(rng: random.Random, question: str) -> str:
    """The same question as another person would type it."""
    draw_ = rng.random()
    if draw_ < 0.06:
        return question[0].lower() + question[1:]
    if draw_ < 0.1:
        return question.rstrip("?.")
    if draw_ < 0.13:
        return question.replace("color", "colour")
    return question


def _article(word: str) -> str:
    return "an" if word[0] in "aeio" else "a"


def _listing(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _unique(scene: Scene, attribute: Callable[[Shape], str]) -> list[Shape]:
    """The shapes that share the attribute with no other shape."""
    values = [attribute(shape) for shape in scene.shapes]
    return [
        shape for shape, value in zip(scene.shapes, values, strict=True) if values.count(value) == 1
    ]


def _ask_caption(rng: random.Random, scene: Scene) -> Question | None:
    return Question("caption", rng.choice(CAPTION), caption(scene))


def _ask_read(rng: random.Random, scene: Scene) -> Question | None:
    if not scene.lines:
        return Question("read_none", rng.choice(READ), NO_TEXT)
    return Question("read", rng.choice(READ), f'"{scene.text}"')


def _ask_has_text(rng: random.Random, scene: Scene) -> Question | None:
    return Question("has_text", rng.choice(HAS_TEXT), "Yes." if scene.lines else "No.")


def _ask_background(rng: random.Random, scene: Scene) -> Question | None:
    return Question("background", rng.choice(BACKGROUND), _sentence(scene.background))


def _ask_count(rng: random.Random, scene: Scene) -> Question | None:
    if scene.lines and not scene.shapes:
        return None
    return Question("count", rng.choice(COUNT), f"{NUMBERS[len(scene.shapes)]}.")


def _ask_count_of(rng: random.Random, scene: Scene) -> Question | None:
    by_color = rng.random() < 0.3
    present = [shape.color if by_color else shape.name for shape in scene.shapes]
    value = (
        rng.choice(present)
        if present and rng.random() < 0.65
        else rng.choice(COLOR_NAMES if by_color else SHAPE_NAMES)
    )
    what = f"{value} {rng.choice(('shapes', 'objects'))}" if by_color else plural(value)
    form = rng.choice(
        ("How many {} are there?", "How many {} are in the image?", "How many {} do you see?")
    )
    return Question("count_of", form.format(what), f"{NUMBERS[present.count(value)]}.")


def _ask_colors(rng: random.Random, scene: Scene) -> Question | None:
    if scene.lines:
        return None
    colors = dict.fromkeys([scene.background, *[shape.color for shape in reading_order(scene)]])
    form = rng.choice(
        ("What colors are in the image?", "Which colors do you see?", "What colors are dominant?")
    )
    return Question("colors", form, _sentence(_listing(list(colors))))


def _ask_color(rng: random.Random, scene: Scene) -> Question | None:
    forms = (
        "What color is the {}?",
        "What is the color of the {}?",
        "Which color is the {}?",
        "What color does the {} have?",
    )
    unique = _unique(scene, lambda shape: shape.name)
    if unique and (len(scene.shapes) > 1 or rng.random() < 0.75):
        shape = rng.choice(unique)
        return Question("color", rng.choice(forms).format(shape.name), _sentence(shape.color))
    if len(scene.shapes) == 1:
        what = rng.choice(("object", "shape"))
        return Question("color", rng.choice(forms).format(what), _sentence(scene.shapes[0].color))
    return None


def _ask_absent(rng: random.Random, scene: Scene) -> Question | None:
    absent = [name for name in SHAPE_NAMES if all(shape.name != name for shape in scene.shapes)]
    if not absent or rng.random() > 0.3:
        return None
    name = rng.choice(absent)
    form = rng.choice(("What color is the {}?", "What is the color of the {}?"))
    return Question("absent", form.format(name), f"There is no {name}.")


def _ask_shape(rng: random.Random, scene: Scene) -> Question | None:
    unique = _unique(scene, lambda shape: shape.color)
    if not unique:
        return None
    shape = rng.choice(unique)
    forms = (
        "What shape is {}?",
        "What shape is the {} object?",
        "Which shape is {}?",
        "What is the {} shape?",
        "What is the {} object?",
    )
    return Question("shape", rng.choice(forms).format(shape.color), _sentence(shape.name))


def _ask_classify(rng: random.Random, scene: Scene) -> Question | None:
    if len(scene.shapes) != 1 or scene.lines:
        return None
    return Question("classify", rng.choice(CLASSIFY), _sentence(scene.shapes[0].name))


def _ask_exists(rng: random.Random, scene: Scene) -> Question | None:
    present = {(shape.color, shape.name) for shape in scene.shapes}
    color, name = rng.choice(COLOR_NAMES), rng.choice(SHAPE_NAMES)
    if present and rng.random() < 0.75:
        there = rng.choice(scene.shapes)
        kept = rng.random()  # half the time the pair that is there, else only one half of it
        color = there.color if kept < 0.8 else color
        name = there.name if kept < 0.6 or kept >= 0.8 else name
    if rng.random() < 0.25:
        found, what = name in {n for _, n in present}, f"{_article(name)} {name}"
    else:
        found, what = (color, name) in present, phrase(color, name)
    form = rng.choice(("Is there {}?", "Is there {} in the image?", "Do you see {}?"))
    return Question("exists", form.format(what), "Yes." if found else "No.")


def _ask_position(rng: random.Random, scene: Scene) -> Question | None:
    pair = _unique(scene, lambda shape: f"{shape.color} {shape.name}")
    if len(pair) < 2:
        return None
    first, second = rng.sample(pair, 2)
    across, down = (first.x - second.x) / scene.width, (first.y - second.y) / scene.height
    if max(abs(across), abs(down)) < 0.15:
        return None
    horizontal = abs(across) > abs(down)
    if horizontal:
        relations, holds = ("to the left of", "to the right of"), across < 0
    else:
        relations, holds = ("above", "below"), down < 0
    if len(scene.shapes) == 2 and rng.random() < 0.4:
        a, b = (first, second) if holds else (second, first)
        answer = f"The {a.color} {a.name} is {relations[0]} the {b.color} {b.name}."
        return Question("layout", "Describe the spatial layout.", answer)
    asked = rng.randrange(2)
    text = f"Is the {first.color} {first.name} {relations[asked]} the {second.color} {second.name}?"
    return Question("position", text, "Yes." if holds == (asked == 0) else "No.")


def write_examples(folder: Path) -> None:
    """Draw `examples` into a folder."""
    for name, scene in examples().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw(scene).save(folder / name, optimize=True)


_ASKERS: tuple[Callable[[random.Random, Scene], Question | None], ...] = (
    _ask_caption,
    _ask_read,
    _ask_has_text,
    _ask_background,
    _ask_count,
    _ask_count_of,
    _ask_colors,
    _ask_color,
    _ask_absent,
    _ask_shape,
    _ask_classify,
    _ask_exists,
    _ask_position,
)


if __name__ == "__main__":
    write_examples(Path(__file__).parent)
