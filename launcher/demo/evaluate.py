"""Measures a checkpoint of the demo model on held-out pictures: exact match per kind of question.

    python -m tessera.launcher.demo.evaluate --out benchmark/results/demo_accuracy.json
    python -m tessera.launcher.demo.evaluate --url http://127.0.0.1:3000 --pictures 100

Without `--url` the checkpoint runs through transformers, independent of this project's own stack;
with `--url` a running server is asked through huggingface_hub's InferenceClient.
"""

import argparse
import base64
import collections
import io
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from tessera.launcher.demo.pictures import DIGITS, LETTERS, Question, Scene, held_out

MODEL = Path(__file__).parent / "model"
HELD_OUT_SEED = 2026
MAX_NEW_TOKENS = 48
FORMATS = (
    "[INST] <image>\n{} [/INST]",
    "<image>\n{}",
    "<image>{}",
    "<image>\n{}\n",
    "USER: <image>\n{} ASSISTANT:",
)
# Groups under acceptance -> what must be reached, and the kinds of question they consist of.
ACCEPTANCE: dict[str, tuple[float, tuple[str, ...]]] = {
    "shape": (0.95, ("shape", "classify")),
    "colour": (0.95, ("color",)),
    "count": (0.90, ("count", "count_of")),
    "reading 1-4 characters": (0.80, ("read",)),
}


class Answerer(Protocol):
    """Something that answers prompts about one picture."""

    def __call__(self, image: Image.Image, prompts: Sequence[str]) -> list[str]:
        """The generated text for each prompt, which holds `<image>` once."""
        ...


class Transformers:
    """The checkpoint through transformers' Auto classes, greedy decoding."""

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        import torch
        import transformers

        if threads:
            torch.set_num_threads(threads)
        library: Any = transformers  # its Auto classes are only partly typed
        self._torch, self._dtype = torch, getattr(torch, dtype)
        self._processor = library.AutoProcessor.from_pretrained(folder)
        self._model, info = library.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=self._dtype, output_loading_info=True
        )
        self._model.eval()
        wrong = {kind: keys for kind, keys in info.items() if keys}
        if wrong:
            raise SystemExit(f"the checkpoint does not fit the model: {wrong}")

    def __call__(self, image: Image.Image, prompts: Sequence[str]) -> list[str]:
        """All prompts in one batch."""
        inputs = self._processor(
            images=[image] * len(prompts), text=list(prompts), return_tensors="pt", padding=True
        )
        inputs["pixel_values"] = inputs["pixel_values"].to(self._dtype)
        with self._torch.inference_mode():
            ids = self._model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        return [
            text.strip() for text in self._processor.batch_decode(new, skip_special_tokens=True)
        ]


class Server:
    """A running server, asked as text-generation-inference is: the picture inside the prompt."""

    def __init__(self, url: str) -> None:
        from huggingface_hub import InferenceClient

        self._client = InferenceClient(url, timeout=120)

    def __call__(self, image: Image.Image, prompts: Sequence[str]) -> list[str]:
        """One request per prompt."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        picture = f"<image>{base64.b64encode(buffer.getvalue()).decode()}</image>"
        return [
            str(
                self._client.text_generation(
                    prompt.replace("<image>", picture), max_new_tokens=MAX_NEW_TOKENS
                )
            ).strip()
            for prompt in prompts
        ]


@dataclass(frozen=True, slots=True)
class Result:
    """One question, the answer that came and the one that was right."""

    picture: int
    group: str
    kind: str
    prompt: str
    answer: str
    truth: str

    @property
    def right(self) -> bool:
        """Exact match."""
        return self.answer == self.truth


def evaluate(
    answer: Answerer, seed: int, pictures: int, formats: Sequence[str]
) -> Iterator[Result]:
    """Ask every question about every held-out picture; the prompt formats take turns."""
    for index in range(pictures):
        scene, image, questions = held_out(seed, index)
        form = formats[index % len(formats)]
        prompts = [form.format(question.text) for question in questions]
        for question, text in zip(questions, answer(image, prompts), strict=True):
            yield Result(index, _group(scene, question), question.kind, form, text, question.answer)


def _group(scene: Scene, question: Question) -> str:
    """The row of the report that a question belongs to."""
    if question.kind == "read" and len(scene.text) > 4:
        return "reading words of 5 letters"
    for name, (_, kinds) in ACCEPTANCE.items():
        if question.kind in kinds:
            return name
    if question.kind == "caption":
        return "caption with text" if scene.lines else f"caption of {len(scene.shapes)} shapes"
    return question.kind


def report(results: Sequence[Result]) -> dict[str, Any]:
    """Exact match per group and per prompt format, and the reading error per character."""
    return {
        "groups": _rates(results, [result.group for result in results]),
        "kinds": _rates(results, [result.kind for result in results]),
        "formats": _rates(results, [result.prompt for result in results]),
        "reading": _reading(results),
        "all": sum(result.right for result in results) / len(results),
        "questions": len(results),
    }


def _rates(results: Sequence[Result], names: Sequence[str]) -> dict[str, dict[str, float]]:
    right: collections.Counter[str] = collections.Counter()
    asked = collections.Counter(names)
    for result, name in zip(results, names, strict=True):
        right[name] += result.right
    return {
        name: {
            "right": right[name],
            "asked": asked[name],
            "exact_match": round(right[name] / asked[name], 4),
        }
        for name in sorted(asked)
    }


def _reading(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Reading by what is written, from the easiest to the hardest to guess."""
    reads = [result for result in results if result.kind == "read"]

    def what(text: str) -> str:
        letters, digits = sum(c in LETTERS for c in text), sum(c in DIGITS for c in text)
        kind = "letters" if not digits else "digits" if not letters else "mixed"
        return f"{len(text)} {kind}"

    return _rates(reads, [what(result.truth.strip('"')) for result in reads])


def table(found: dict[str, Any]) -> str:
    """The report's groups as a markdown table, those under acceptance first."""
    lines = ["| question | asked | exact match | required |", "|---|---:|---:|---:|"]
    groups = found["groups"]
    for name in [*ACCEPTANCE, *sorted(set(groups) - set(ACCEPTANCE))]:
        if name not in groups:
            continue
        required = f"{ACCEPTANCE[name][0]:.0%}" if name in ACCEPTANCE else ""
        asked, rate = groups[name]["asked"], groups[name]["exact_match"]
        lines.append(f"| {name} | {asked:.0f} | {rate:.1%} | {required} |")
    lines.append(f"| all | {found['questions']} | {found['all']:.1%} | |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="checkpoint folder")
    parser.add_argument("--url", default="", help="ask this server instead of transformers")
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED, help="of the held-out pictures")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    parser.add_argument(
        "--format", default="", help="use only this prompt, with {} for the question"
    )
    parser.add_argument("--out", type=Path, help="write the report to this JSON file")
    parser.add_argument("--show", type=int, default=0, help="print up to this many wrong answers")
    arguments = parser.parse_args()
    answer: Answerer
    if arguments.url:
        answer = Server(arguments.url)
    else:
        answer = Transformers(arguments.model, arguments.dtype, arguments.threads)
    formats = (arguments.format,) if arguments.format else FORMATS
    begin = time.monotonic()
    results = list(evaluate(answer, arguments.seed, arguments.pictures, formats))
    found = report(results)
    print(table(found))
    for wrong in [result for result in results if not result.right][: arguments.show]:
        print(f"picture {wrong.picture}, {wrong.kind}: {wrong.answer!r}, truth {wrong.truth!r}")
    if arguments.out:
        packages = ("transformers", "torch", "pillow", "huggingface_hub")
        facts = {
            "command": shlex.join(
                ["python", "-m", "tessera.launcher.demo.evaluate", *sys.argv[1:]]
            ),
            "through": "server" if arguments.url else "transformers",
            "dtype": "" if arguments.url else arguments.dtype,
            "seed": arguments.seed,
            "pictures": arguments.pictures,
            "seconds": round(time.monotonic() - begin, 1),
            "versions": {name: version(name) for name in packages}
            | {"python": platform.python_version()},
        }
        arguments.out.write_text(json.dumps(facts | found, indent=2) + "\n")


if __name__ == "__main__":
    main()
