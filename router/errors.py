"""Every failure the router reports, and what its client sees.

    RouterError
      ValidationError    422  the request itself is wrong; retrying will not help
        MalformedBody    400  not JSON
        PayloadTooLarge  413  more bytes than PAYLOAD_LIMIT
        UnsupportedBody  415  not declared as JSON, or compressed
        TemplateError, ToolError, SuffixUnsupported, TooManyPrompts  422  as their names say
      Unauthorized       401  no or a wrong key
      NotFound           404  no such route or model
      MethodNotAllowed   405  the route exists, for another method
      OverloadedError    429  no room now; retry later
      GenerationError    424  a step failed on a shard; this request is lost, the server is not
      NotReadyError      503  still loading, draining, or the shards are gone

`error_type` values are those text-generation-inference's clients switch on. Messages say what was
wrong, the value, the limit and what to change; they never hold a path, an address, a traceback or
the client's own payload.
"""

from typing import ClassVar


class RouterError(Exception):
    """A failure that is safe to show to the client, with a message that says what to do."""

    status: ClassVar[int] = 500
    error_type: ClassVar[str] = "internal"


class ValidationError(RouterError):
    """The request cannot be served as it is."""

    status = 422
    error_type = "validation"
    begins: ClassVar[str] = "Input validation error"

    def __init__(self, detail: str, param: str | None = None) -> None:
        super().__init__(f"{self.begins}: {detail}" if self.begins else detail)
        self.detail = detail  # the message without its beginning
        self.param = param  # the field at fault, where there is exactly one


class MalformedBody(ValidationError):
    """The body is not what its route reads."""

    status = 400


class PayloadTooLarge(ValidationError):
    """The body has more bytes than the server reads."""

    status = 413


class UnsupportedBody(ValidationError):
    """The body is of a kind its route does not read."""

    status = 415


class TemplateError(ValidationError):
    """The chat template is absent or refuses these messages."""

    error_type = "template_error"
    begins = "Template error"


class SuffixUnsupported(ValidationError):
    """A text to be filled in before another."""

    error_type = "suffix not supported"
    begins = ""


class TooManyPrompts(ValidationError):
    """One request has more prompts than MAX_CLIENT_BATCH_SIZE."""

    error_type = "batch size exceeded"
    begins = ""


class ToolError(ValidationError):
    """The tools of a chat cannot be used as asked."""

    error_type = "tool_error"
    begins = "Tool error"


class Unauthorized(RouterError):
    """The request carries no valid key."""

    status = 401
    error_type = "unauthorized"


class NotFound(RouterError):
    """There is nothing at this address."""

    status = 404
    error_type = "not_found"


class MethodNotAllowed(RouterError):
    """The address exists, but not for this method."""

    status = 405
    error_type = "method_not_allowed"


class OverloadedError(RouterError):
    """The queue is full."""

    status = 429
    error_type = "overloaded"


class GenerationError(RouterError):
    """A shard failed while this request was running."""

    status = 424
    error_type = "generation"

    def __init__(self, cause: str) -> None:
        super().__init__(f"Request failed during generation: {cause}")


class NotReadyError(RouterError):
    """The server cannot generate now."""

    status = 503
    error_type = "healthcheck"
