"""The generator of the demo model's pictures: deterministic, and its answers are true."""

import random
import re
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from tessera.launcher.demo import pictures
from tessera.launcher.demo.pictures import HELD_OUT, TRAIN, Question, Scene, Shape

FOLDER = Path(pictures.__file__).parent


def scenes(count: int, family: str = TRAIN) -> list[Scene]:
    found = []
    for index in range(count):
        rng = pictures.seeded(family, 7, index)
        found.append(pictures.random_scene(rng, *pictures.random_size(rng)))
    return found


def asked(scene: Scene, kind: str) -> list[Question]:
    """Questions of one kind about the scene; several draws, as some kinds are drawn at random."""
    return [
        question
        for attempt in range(5)
        for question in pictures.questions(random.Random(attempt), scene)
        if question.kind == kind
    ]


def test_same_seed_gives_same_scene_pixels_and_questions() -> None:
    for index in range(20):
        scene, image, questions = pictures.held_out(3, index)
        again = pictures.held_out(3, index)
        assert again[0] == scene
        assert again[1].tobytes() == image.tobytes()
        assert again[2] == questions


def test_another_seed_or_index_gives_another_picture() -> None:
    found = {pictures.held_out(seed, index)[0] for seed in range(5) for index in range(20)}
    assert len(found) == 100


def test_held_out_pictures_are_not_training_pictures() -> None:
    assert not set(scenes(300, TRAIN)) & set(scenes(300, HELD_OUT))


def test_sizes_cover_several_aspect_ratios() -> None:
    sizes = [(scene.width, scene.height) for scene in scenes(200)]
    ratios = {round(width / height, 1) for width, height in sizes}
    assert min(ratios) == 0.5
    assert max(ratios) == 2.0
    assert all(min(size) >= 75 and max(size) <= 320 for size in sizes)


def test_shapes_are_inside_and_apart_and_differ_from_the_background() -> None:
    for scene in scenes(300):
        assert len(scene.shapes) <= 4
        for i, shape in enumerate(scene.shapes):
            assert shape.radius <= shape.x <= scene.width - shape.radius
            assert shape.radius <= shape.y <= scene.height - shape.radius
            assert shape.color != scene.background
            for other in scene.shapes[:i]:
                gap = max(abs(shape.x - other.x), abs(shape.y - other.y))
                assert gap >= shape.radius + other.radius


def test_text_is_drawn_inside_the_picture_in_the_domain() -> None:
    seen = 0
    for scene in scenes(300):
        if not scene.lines:
            continue
        seen += 1
        text = scene.text
        assert text in pictures.WORDS or 1 <= len(text) <= 4
        assert set(text) <= set(pictures.CHARACTERS)
        with_text = pictures.draw(scene)
        without = pictures.draw(
            Scene(scene.width, scene.height, scene.background, scene.background_fill, scene.shapes)
        )
        box = ImageChops.difference(with_text, without).getbbox()
        assert box is not None
        middles = list(pictures.character_centres(scene.lines[0]))
        assert "".join(character for character, _, _ in middles) == text
        assert all(box[0] <= x <= box[2] and box[1] <= y <= box[3] for _, x, y in middles)
    assert seen > 100


def test_the_middle_of_a_shape_has_its_color() -> None:
    for scene in scenes(100):
        image = pictures.draw(scene)
        for shape in scene.shapes:
            assert image.getpixel((int(shape.x), int(shape.y))) == shape.fill


def test_count_answers_agree_with_the_scene() -> None:
    for scene in scenes(150):
        for question in asked(scene, "count"):
            assert question.answer == f"{pictures.NUMBERS[len(scene.shapes)]}."
        for question in asked(scene, "count_of"):
            match = re.search(r"many (\w+)", question.text.lower())
            assert match
            what = match[1]
            there = [s for s in scene.shapes if what in (s.color, pictures.plural(s.name))]
            assert question.answer == f"{pictures.NUMBERS[len(there)]}."


def test_shape_and_color_answers_are_the_only_possible_ones() -> None:
    for scene in scenes(150):
        for question in asked(scene, "shape"):
            named = [s for s in scene.shapes if re.search(rf"\b{s.color}\b", question.text)]
            assert [s.name for s in named] == [question.answer.rstrip(".").lower()]
        for question in asked(scene, "color"):
            named = [s for s in scene.shapes if re.search(rf"\b{s.name}\b", question.text)]
            named = named or list(scene.shapes)
            assert [s.color for s in named] == [question.answer.rstrip(".").lower()]


def test_reading_answers_quote_the_text() -> None:
    for scene in scenes(150):
        for question in asked(scene, "read"):
            assert question.answer == f'"{scene.text}"'
        assert bool(asked(scene, "read_none")) == (not scene.lines)


def test_caption_names_everything_in_reading_order() -> None:
    def shape(color: str, name: str, x: float, y: float) -> Shape:
        return Shape(name, color, pictures.COLORS[color][0], x, y, 10, 0.0)

    scene = Scene(
        100, 100, "white", (255, 255, 255),
        (shape("red", "cross", 80, 20), shape("orange", "star", 20, 20),
         shape("red", "cross", 50, 80)),
    )  # fmt: skip
    assert pictures.caption(scene) == "An orange star and two red crosses on a white background."


@pytest.mark.parametrize("name", list(pictures.examples()))
def test_example_files_are_what_the_code_draws(name: str) -> None:
    file = FOLDER / name
    assert file.stat().st_size < 20_000
    assert (
        Image.open(file).convert("RGB").tobytes()
        == pictures.draw(pictures.examples()[name]).tobytes()
    )
