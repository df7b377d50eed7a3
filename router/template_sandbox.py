"""Jinja for chat templates: what transformers offers them, in a sandbox, with limits.

A template comes with the model, so it is not trusted; the messages come from anyone. The sandbox
keeps a template away from Python. The limits bound what loops, repetition and concatenation can
cost; a template that is made to waste memory through a single filter is not stopped by them.
"""

import itertools
import json
import time
from collections.abc import Sized
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from tessera.router.errors import TemplateError

MAX_SECONDS = 5.0
"""Time one rendering may take; checked at every loop and every piece of output."""

MAX_ITERATIONS = 1_000_000
"""Loop passes of one rendering, nested loops included."""

MAX_CHARACTERS = 20_000_000
"""Length of the output, and of any text or list a template builds."""

_BUDGET = "_budget"


class Template:
    """One compiled template. Thread-safe."""

    def __init__(self, source: str) -> None:
        """Compile.

        Raises:
            TemplateError: a syntax error; the message names the line.
        """
        environment = _make_environment()
        try:
            tree = environment.parse(source)
            self.variables = frozenset(meta.find_undeclared_variables(tree))
            _Bounded().visit(tree)
            tree.set_environment(environment)
            code = environment.compile(tree)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"the chat template's line {error.lineno} cannot be read: {error.message}"
            ) from None
        except RecursionError:
            raise TemplateError("the chat template is nested too deeply") from None
        self._template = jinja2.Template.from_code(
            environment, code, environment.make_globals(None)
        )

    def render(self, **context: object) -> str:
        """The output for these variables.

        Raises:
            TemplateError: the template refused, failed, or went beyond a limit.
        """
        budget = _Budget()
        try:
            return "".join(
                budget.counted(piece)
                for piece in self._template.generate({**context, _BUDGET: budget})
            )
        except TemplateError:
            raise
        except jinja2.exceptions.SecurityError:
            raise TemplateError("the chat template does what the sandbox forbids") from None
        except jinja2.TemplateError as error:  # raise_exception, or a variable that is not there
            raise TemplateError(
                f"the chat template refuses these messages: {str(error)[:200]}"
            ) from None
        except Exception:  # a template is a program: it can fail in any way
            raise TemplateError(
                "the chat template cannot be rendered with these messages"
            ) from None


class _Budget:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self.iterations = MAX_ITERATIONS
        self._characters = MAX_CHARACTERS
        self._deadline = time.monotonic() + MAX_SECONDS

    def spend(self, iterations: int) -> None:
        self.iterations -= iterations
        if self.iterations < 0:
            raise TemplateError(f"the chat template loops more than {MAX_ITERATIONS} times")
        self._check_time()

    def counted(self, piece: str) -> str:
        self._characters -= len(piece)
        if self._characters < 0:
            _refuse_size()
        self._check_time()
        return piece

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise TemplateError(f"the chat template takes longer than {MAX_SECONDS:g} seconds")


class _Bounded(NodeTransformer):
    """Lets every loop and every `~` of a template pass through a filter that counts."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 - the visitor's naming
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_bounded")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802 - as above
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_joined")


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@jinja2.pass_context
def _bounded(context: Context, values: Any) -> Any:
    budget = context[_BUDGET]
    if not isinstance(values, Sized):
        values = list(itertools.islice(values, budget.iterations + 1))
    budget.spend(len(values))
    return values


def _joined(values: list[Any]) -> str:
    texts = [str(value) for value in values]
    if sum(map(len, texts)) > MAX_CHARACTERS:
        _refuse_size()
    return "".join(texts)


def _refuse_size() -> NoReturn:
    raise TemplateError(f"the chat template makes more than {MAX_CHARACTERS} characters")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "+"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and _product_size(left, right) > MAX_CHARACTERS:
            _refuse_size()
        if operator == "**" and isinstance(right, int) and right > 64:
            raise jinja2.exceptions.SecurityError("a power this large")
        if operator == "+" and _size(left) + _size(right) > MAX_CHARACTERS:
            _refuse_size()
        return super().call_binop(context, operator, left, right)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _product_size(left: Any, right: Any) -> int:
    if isinstance(left, int):
        return left * _size(right)
    return right * _size(left) if isinstance(right, int) else 0


class _GenerationTag(Extension):
    """`{% generation %}` marks what the model says, for training; it prints its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration is a plain set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TemplateNamespace(Namespace):
    """Refuses names through which a template could reach Python's internals."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError("a name that begins with an underscore")
        super().__setitem__(name, value)


def _namespace(**attributes: Any) -> _TemplateNamespace:
    namespace = _TemplateNamespace()
    for name, value in attributes.items():
        namespace[name] = value
    return namespace


def _dict(*args: Any, **items: Any) -> dict[Any, Any]:
    return dict(*args, **items)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without jinja's own escaping for HTML, as transformers has it."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _make_environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters |= {"_bounded": _bounded, "_joined": _joined, "tojson": _tojson}
    environment.globals |= {
        "dict": _dict,
        "namespace": _namespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    del environment.globals["lipsum"]
    return environment
