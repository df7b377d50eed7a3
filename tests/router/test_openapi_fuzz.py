"""Requests made up from the API's description are answered as it says: schemathesis, bounded."""

from collections.abc import Callable

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.applications import Starlette

from tessera.router.operations import OPERATIONS, Operation
from tests.router.http_fakes import FakeGenerator, Script

App = Callable[..., Starlette]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
BOUNDED = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(
    "operation", OPERATIONS, ids=lambda one: f"{one.method.upper()} {one.path}"
)
def test_any_request_is_answered_as_described(
    vision_app: App, operation: Operation, mode: GenerationMode
) -> None:
    if mode is GenerationMode.NEGATIVE and operation.body is None:
        return  # there is nothing in it to get wrong
    generator = FakeGenerator(Script(texts=("a", "b")))
    schema = schemathesis.openapi.from_asgi("/openapi.json", vision_app(generator))

    @BOUNDED
    @given(schema[operation.path][operation.method].as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS)
        assert generator.all_closed

    check()
