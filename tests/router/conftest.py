"""Apps over tiny checkpoints and a scripted generator."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from tessera.router.app import create_app
from tessera.router.chat_template import ChatTemplate
from tessera.router.metrics import Metrics
from tessera.router.model_files import ModelFiles
from tessera.router.settings import RouterSettings
from tessera.router.tokenizer import Tokenizer
from tessera.router.validation import Validator
from tests.router.http_fakes import FakeGenerator

MakeValidator = Callable[..., Validator]


@pytest.fixture
def make_validator(checkpoint: Callable[[str], Path]) -> Iterator[MakeValidator]:
    """`make_validator("next-mistral", generator, max_images=2)`."""
    validators: list[Validator] = []

    def make(
        kind: str,
        generator: FakeGenerator | None = None,
        metrics: Metrics | None = None,
        **settings: Any,
    ) -> Validator:
        folder = checkpoint(kind)
        files = ModelFiles.read(folder)
        tokenizer = Tokenizer.from_folder(folder)
        template = ChatTemplate.from_folder(folder)
        options = RouterSettings(**settings)
        validators.append(
            Validator(
                options,
                generator or FakeGenerator(),
                tokenizer,
                files,
                template,
                metrics or Metrics(),
            )
        )
        return validators[-1]

    yield make
    for validator in validators:
        validator.close()


@pytest.fixture
def make_app(
    checkpoint: Callable[[str], Path], make_validator: MakeValidator
) -> Callable[..., Starlette]:
    """`make_app("llama", generator, api_key="x")`: the whole app, with the model's loop faked."""

    def make(kind: str, generator: FakeGenerator | None = None, **settings: Any) -> Starlette:
        generator = generator or FakeGenerator()
        files = ModelFiles.read(checkpoint(kind))
        metrics = Metrics()
        validator = make_validator(kind, generator, metrics, **settings)
        return create_app(RouterSettings(**settings), generator, validator, files, metrics)

    return make


@pytest.fixture
def text_app(make_app: Callable[..., Starlette]) -> Callable[..., Starlette]:
    """An app over a model without pictures."""
    return lambda generator=None, **settings: make_app("llama", generator, **settings)


@pytest.fixture
def vision_app(make_app: Callable[..., Starlette]) -> Callable[..., Starlette]:
    """An app over a model that sees."""
    return lambda generator=None, **settings: make_app("next-mistral", generator, **settings)
