"""Entry point of tessera-chat: one question, or a conversation at the terminal."""

import argparse
import signal
import sys
from collections.abc import Sequence

from tessera.proto.env import process_environment

DEFAULT_URL = "http://localhost:3000"
SAMPLING = ("temperature", "top_p", "max_tokens", "seed")
INTERRUPTED = 128 + signal.SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Chat.

    Returns:
        0; 1 when something failed, 130 after Ctrl-C while one question was answered. A wrong flag
        exits with 2.
    """
    given = _parser().parse_args(arguments)
    try:
        return _chat(given)
    except ModuleNotFoundError as error:
        told = f"Error: tessera-chat needs {error.name}; pip install 'tessera[client]' has it."
        print(told, file=sys.stderr)
        return 1


def _chat(given: argparse.Namespace) -> int:
    # Only now: an installation that serves has no need for these.
    from tessera.launcher.chat.errors import ChatError
    from tessera.launcher.chat.server import Server
    from tessera.launcher.chat.session import HELP, Session
    from tessera.launcher.chat.terminal import Prompt, Terminal, is_interactive

    question = " ".join(given.question)
    interactive = not question and is_interactive()
    terminal = Terminal(interactive)
    key = given.api_key or process_environment().get("API_KEY", "")
    sampling = {name: getattr(given, name) for name in SAMPLING}
    try:
        server = Server(given.url, key)
        model = server.model_name()
        chosen = {name: value for name, value in sampling.items() if value is not None}
        session = Session(server, model, terminal, chosen, given.system)
        session.attach(given.image)
        if interactive:
            terminal.note(f"{model} at {given.url}; /help lists the commands, Ctrl-D leaves")
            session.run(Prompt(tuple(HELP)))
        else:
            session.ask(question or _piped())
    except ChatError as error:
        terminal.fail(str(error))
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _piped() -> str:
    from tessera.launcher.chat.errors import ChatError

    question = sys.stdin.buffer.read().decode("utf-8", "replace").strip()
    if not question:
        raise ChatError("there is no question: give it as an argument or on stdin.")
    return question


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tessera-chat",
        description="Chat with a running server about pictures.",
        epilog="Without a question: a conversation at a terminal, else the question is read from "
        "stdin. The answer goes to stdout, numbers and errors to stderr.",
    )
    parser.add_argument("question", nargs="*", help="ask this, print the answer, and end")
    parser.add_argument("--url", default=DEFAULT_URL, help="the server (default: %(default)s)")
    parser.add_argument("--api-key", default="", help="its key (default: the variable API_KEY)")
    parser.add_argument(
        "--image", action="append", default=[], metavar="PATH-OR-URL", help="may be repeated"
    )
    parser.add_argument("--system", default="", help="system prompt")
    parser.add_argument("--temperature", type=float, help="0: always the likeliest token")
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--max-tokens", type=int, help="longest answer in tokens")
    parser.add_argument("--seed", type=int, help="the same seed gives the same answer")
    return parser


if __name__ == "__main__":
    sys.exit(main())
