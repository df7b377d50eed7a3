"""docker/models says what is true of each model."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from model_envs import CONFIGS, ENVS, names, with_needs

from tessera.launcher.settings import Settings, read_env_file
from tessera.shard.footprint import footprint
from tests.shard.models.test_hub_geometry import HUB, UNUSED_PARAMETERS

FILES = sorted(ENVS.glob("*.env"))


def test_the_main_models_are_there() -> None:
    assert set(names()) == set(HUB)
    assert {path.stem for path in FILES} == {"demo", *names()}


@pytest.mark.parametrize("name", names())
def test_the_numbers_are_the_plans(name: str) -> None:
    text = (ENVS / f"{name}.env").read_text()
    assert with_needs(name, text) == text, "run `make docs`"


@pytest.mark.parametrize("name", names())
def test_the_kept_configurations_are_the_hubs_models(name: str) -> None:
    """As many numbers as the files of the hub have, two bytes each."""
    told = footprint(CONFIGS / name, 1, "cuda")
    model_type, text, _, num_parameters = HUB[name]
    assert told.parameters == num_parameters - UNUSED_PARAMETERS
    assert (told.model_type, told.dtype) == (model_type, "float16")
    assert told.weights == 2 * told.parameters
    assert told.max_positions == text["max_position_embeddings"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_launcher_takes_the_files(path: Path) -> None:
    settings = Settings.read(["--env-file", str(path)], {})
    assert settings.warnings == ()
    name, model_id = read_env_file(path)["MODEL_NAME"], settings.router.model_id
    if path.stem != "demo":
        assert (name, model_id) == (path.stem, f"llava-hf/{path.stem}-hf")
