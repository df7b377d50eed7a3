"""Trains the demo model from scratch on the CPU and saves it in the hub's format.

    python -m tessera.launcher.demo.train --state /tmp/demo-state --out launcher/demo/model

One process trains, a second one draws the pictures. First the vision tower learns to name what
each patch shows on pages full of characters and shapes; then the whole model learns to answer
questions. The state is saved every few minutes; the same command goes on where it stopped.
`--steps` instead of `--minutes` makes the schedule independent of the machine's speed.
"""

import argparse
import json
import multiprocessing
import multiprocessing.synchronize
import time
from dataclasses import asdict, dataclass, field
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from queue import Full
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from tessera.launcher.demo import pictures
from tessera.launcher.demo.batches import Batch, Encoder, TextBatch, page_batch, scene_batch
from tessera.launcher.demo.checkpoint import build_tokenizer, save
from tessera.launcher.demo.network import Muon, Network, Segments, Sizes, in_token_order, whiten
from tessera.launcher.demo.tiles import (
    CENTRE,
    COLOR,
    HEADS,
    IGNORE,
    LEFT,
    RANK,
    RANKS,
    RIGHT,
    SHAPE,
)
from tessera.proto.processors import usable_processors

VISION_SHARE = 0.18  # of the training: the vision tower alone
PAGE_EVERY = 6  # afterwards every sixth step is a page again
VISION_EVERY = 2  # steps in which scenes train the vision tower; in others it is only run: cheaper
CHATS_EVERY = 8
PAGES, SCENES, QUESTIONS = 48, 32, 5  # per batch; questions per scene
HEAD_WEIGHTS = dict(zip(HEADS, (1.0, 0.7, 0.2, 1.0, 1.0, 0.7), strict=True))
NONE_WEIGHTS = dict(zip(HEADS, (0.3, 0.3, 1.0, 0.1, 0.1, 0.2), strict=True))  # of class 0
ADAMW_RATE, MUON_RATE = 2e-3, 0.02
VISION_RATE = 0.3  # of MUON_RATE for the vision tower, once the language model learns too
SCENE_PATCH_WEIGHT = 0.8  # of the patch losses beside the language loss
RANK_WEIGHT = 1.0  # of the reading order
EMA_DECAY = 0.998
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to train: wall-clock minutes, or steps."""

    minutes: float
    steps: int

    def progress(self, step: int, elapsed_s: float) -> float:
        """0 at the start, 1 at the end."""
        return min(1.0, step / self.steps if self.steps else elapsed_s / (60 * self.minutes))


@dataclass(slots=True)
class Progress:
    """What has been done so far; saved with the state."""

    step: int = 0
    elapsed_s: float = 0.0
    cpu_s: float = 0.0
    pictures: int = 0
    questions: int = 0
    log: list[dict[str, float]] = field(default_factory=list)


# ---- the process that draws ----


def make_batch(seed: int, index: int, progress: float, encode: Encoder) -> Batch:
    """Batch `index` of the training; depends on nothing but the arguments."""
    rng = pictures.seeded(pictures.TRAIN, seed, index)
    if progress < VISION_SHARE:
        return page_batch(rng, PAGES, plain_share=max(0.1, 1 - 2 * progress / VISION_SHARE))
    if index % PAGE_EVERY == 0:
        return page_batch(rng, PAGES, plain_share=0.1)
    return scene_batch(rng, SCENES, QUESTIONS, encode, with_chats=index % CHATS_EVERY == 1)


def draw_batches(
    seed: int, first: int, steps: int, progress: "Synchronized[float]",
    out: "multiprocessing.Queue[Batch]", stop: multiprocessing.synchronize.Event,
) -> None:  # fmt: skip
    """Body of the drawing process: fills the queue until told to stop."""
    torch.set_num_threads(1)
    encode = Encoder(build_tokenizer())
    parent = multiprocessing.parent_process()

    def wanted() -> bool:
        return not stop.is_set() and (parent is None or parent.is_alive())

    index = first
    while wanted():
        batch = make_batch(seed, index, index / steps if steps else progress.value, encode)
        while wanted():
            try:
                out.put(batch, timeout=1)
                break
            except Full:
                continue
        index += 1
    out.cancel_join_thread()


# ---- losses ----


class Losses:
    """The training objectives, with the tokens that name what patches show."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        def first(text: str) -> int:
            return int(tokenizer.encode(text, add_special_tokens=False).ids[0])

        self._shape = torch.tensor([0, *[first(name) for name in pictures.SHAPE_NAMES]])
        self._color = torch.tensor([0, *[first(name) for name in pictures.COLOR_NAMES]])
        self._character = torch.tensor(
            [0, *[tokenizer.token_to_id(c) for c in pictures.CHARACTERS]]
        )
        self._rank_weights = torch.tensor([0.1, *[1.0] * (RANKS - 1)])
        self._class_weights = [
            torch.tensor([NONE_WEIGHTS[name], *[1.0] * (size - 1)]) for name, size in HEADS.items()
        ]

    def patch(self, network: Network, features: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of every per-patch label."""
        scores = network.patch_head(features).float().flatten(0, 2).split(list(HEADS.values()), -1)
        total = torch.zeros(())
        for i, name in enumerate(HEADS):
            total = total + HEAD_WEIGHTS[name] * functional.cross_entropy(
                scores[i],
                labels[..., i].flatten(),
                weight=self._class_weights[i],
                ignore_index=IGNORE,
            )
        return total

    def lens(self, network: Network, projected: Tensor, labels: Tensor) -> Tensor:
        """Pull a patch's image token towards the (tied) token embedding of what the patch shows.

        Characters, colour and name at a shape's centre, and <unk> on some empty patches: the
        language model then only has to copy.
        """
        flat = labels.flatten(0, 2)
        left, right = flat[:, LEFT], flat[:, RIGHT]
        character = (left > 0) ^ (right > 0)
        centre = (flat[:, CENTRE] == 1) & ~character & (flat[:, SHAPE] > 0)
        empty = (flat[:, SHAPE] == 0) & (left == 0) & (right == 0) & (flat[:, CENTRE] == 0)
        empty &= torch.rand(len(flat)) < 0.1
        width = projected.shape[-1]
        loss = torch.zeros(())

        def pull(chosen: Tensor, *targets: Tensor) -> Tensor:
            hidden = functional.rms_norm(
                projected.flatten(0, 2)[chosen].float(), (width,)
            ).bfloat16()
            scores = network.logits(hidden).log_softmax(-1)
            return -sum((scores.gather(1, t[:, None]).mean() for t in targets), torch.zeros(()))

        if character.any():
            loss = loss + pull(character, self._character[torch.maximum(left, right)[character]])
        if centre.any():
            loss = loss + 0.5 * pull(
                centre, self._shape[flat[centre, SHAPE]], self._color[flat[centre, COLOR]]
            )
        if empty.any():
            loss = loss + 0.3 * pull(empty, torch.zeros(int(empty.sum()), dtype=torch.long))
        return loss

    def place(self, network: Network, projected: Tensor, labels: Tensor) -> Tensor:
        """Teach the vision tower the reading order too: on the overview it sees everything."""
        return functional.cross_entropy(
            network.places(projected[:, 0]).flatten(0, 1),
            labels[:, 0, :, RANK].flatten(),
            weight=self._rank_weights,
            ignore_index=IGNORE,
        )

    def rank(self, network: Network, half_way: Tensor, batch: Batch) -> Tensor:
        """Teach the decoder's first half which character or shape of the picture comes when.

        Without it, reading a text in the right order is learned last and slowly.
        """
        labels = torch.from_numpy(batch.labels[..., RANK : RANK + 1]).long()
        targets = in_token_order(labels, torch.tensor([IGNORE]), batch.plan)[..., 0]
        scores = network.ranks(half_way)
        return functional.cross_entropy(
            scores.flatten(0, 1), targets.flatten(), weight=self._rank_weights, ignore_index=IGNORE
        )

    @staticmethod
    def language(
        network: Network, hidden: list[Tensor], texts: list[TextBatch]
    ) -> tuple[Tensor, float]:
        """Weighted next-token cross-entropy, and the share of tokens that were right."""
        states, targets, weights = [], [], []
        for h, text in zip(hidden, texts, strict=True):
            target = torch.from_numpy(text.targets)[:, 1:]
            chosen = target != IGNORE
            states.append(h[:, :-1][chosen])
            targets.append(target[chosen])
            weights.append(torch.from_numpy(text.weights)[:, 1:][chosen])
        scores, target, weight = (
            network.logits(torch.cat(states)),
            torch.cat(targets),
            torch.cat(weights),
        )
        loss = (
            functional.cross_entropy(scores, target, reduction="none") * weight
        ).sum() / weight.sum()
        return loss, float((scores.argmax(-1) == target).float().mean())


def patch_accuracy(network: Network, features: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of right answers among the patches that show something, per label."""
    scores = network.patch_head(features).float().split(list(HEADS.values()), -1)
    result = {}
    for i, name in enumerate(HEADS):
        shown = labels[..., i] > 0
        if shown.any():
            result[name] = float((scores[i].argmax(-1) == labels[..., i])[shown].float().mean())
    return result


# ---- training ----


class Trainer:
    """The network, its optimisers, the moving average of its weights, and how far it has come."""

    def __init__(self, seed: int, budget: Budget, tokenizer: Tokenizer) -> None:
        torch.manual_seed(seed)
        self.seed, self.budget, self.tokenizer = seed, budget, tokenizer
        self.network, self.losses, self.progress = Network(Sizes()), Losses(tokenizer), Progress()
        named = [(n, p) for n, p in self.network.named_parameters() if p.dim() == 2]
        vision = [p for n, p in named if "encoder.layers" in n]
        hidden = [p for n, p in named if "model.layers" in n or "multi_modal_projector" in n]
        chosen = {id(p) for p in (*vision, *hidden)}
        self.rest = [p for p in self.network.parameters() if id(p) not in chosen]
        self.muon = Muon([{"params": vision}, {"params": hidden}], lr=MUON_RATE)
        self.adamw = torch.optim.AdamW(
            [
                {"params": [p for p in self.rest if p.dim() > 1], "weight_decay": 0.01},
                {"params": [p for p in self.rest if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=ADAMW_RATE, betas=(0.9, 0.98), fused=True,
        )  # fmt: skip
        self.average: dict[str, Tensor] = {}
        self.smooth: dict[str, float] = {}

    def fraction(self) -> float:
        """Training progress, 0 to 1."""
        return self.budget.progress(self.progress.step, self.progress.elapsed_s)

    def start(self) -> None:
        """First initialisation, from example pictures."""
        examples = [
            page_batch(pictures.seeded("whiten", self.seed, i), 16, 0.3).tiles for i in range(12)
        ]
        whiten(
            self.network,
            torch.cat([normalise(torch.from_numpy(e)).flatten(0, 1) for e in examples]),
        )

    def step(self, batch: Batch) -> None:
        """One update of all weights."""
        self._set_rates()
        tiles, labels = (
            normalise(torch.from_numpy(batch.tiles)),
            torch.from_numpy(batch.labels).long(),
        )
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(not self._vision_frozen(batch)):
                features = self.network.features(tiles)
            projected = self.network.multi_modal_projector(features)
            patch = self.losses.patch(self.network, features, labels)
            lens = self.losses.lens(self.network, projected, labels)
            loss = patch + lens
            if batch.segments:
                language, rank, accuracy = self._language(batch, projected)
                place = self.losses.place(self.network, projected, labels)
                loss = language + SCENE_PATCH_WEIGHT * loss + RANK_WEIGHT * (rank + place)
                self._note(place=place.item())
                self._note(language=language.item(), rank=rank.item(), token_accuracy=accuracy)
                self._note(scene_patch=patch.item(), scene_lens=lens.item())
            else:
                self._note(page_patch=patch.item(), page_lens=lens.item())
        self.adamw.zero_grad(set_to_none=True)
        self.muon.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.rest, 1.0)
        self.adamw.step()
        self.muon.step()
        self._update_average()
        self.progress.step += 1
        self.progress.pictures += len(batch.tiles)
        self.progress.questions += sum(len(s.token_ids) for s in batch.segments)
        if self.progress.step % 20 == 0:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                kind = "scene" if batch.segments else "page"
                found = patch_accuracy(self.network, features.detach(), labels)
                self._note(0.7, **{f"{kind}_{name}": value for name, value in found.items()})

    def _vision_frozen(self, batch: Batch) -> bool:
        return bool(batch.segments) and self.progress.step % VISION_EVERY != 1

    def _language(self, batch: Batch, projected: Tensor) -> tuple[Tensor, Tensor, float]:
        text = self.network.text
        image = self.network.image_tokens(projected, batch.plan).float()
        before = text.embed_tokens(torch.tensor(batch.prefix)).expand(len(image), -1, -1)
        segments = [
            Segments(
                torch.from_numpy(s.token_ids),
                torch.from_numpy(s.targets),
                torch.from_numpy(s.picture),
            )
            for s in batch.segments
        ]
        hidden, half_way = text(torch.cat([before, image], 1), segments)
        rank = self.losses.rank(self.network, half_way[:, before.shape[1] :], batch)
        loss, accuracy = self.losses.language(self.network, hidden, batch.segments)
        if batch.chats is not None:
            states, _ = text(text.embed_tokens(torch.from_numpy(batch.chats.token_ids)), [])
            loss = loss + 0.05 * self.losses.language(self.network, states, [batch.chats])[0]
        return loss, rank, accuracy

    def _set_rates(self) -> None:
        """A warm-up at the start and when language begins; from half-time on down to zero."""
        progress, step = self.fraction(), self.progress.step
        factor = min(1.0, (step + 1) / 60, 2 * (1 - progress))
        if progress >= VISION_SHARE:
            factor *= min(1.0, 60 * (progress - VISION_SHARE) + 0.05)
        for group in self.adamw.param_groups:
            group["lr"] = ADAMW_RATE * factor
        vision, hidden = self.muon.param_groups
        vision["lr"] = MUON_RATE * factor * (1.0 if progress < VISION_SHARE else VISION_RATE)
        hidden["lr"] = MUON_RATE * factor

    @torch.no_grad()
    def _update_average(self) -> None:
        if not self.average:
            self.average = {n: p.detach().clone() for n, p in self.network.named_parameters()}
        decay = min(EMA_DECAY, (self.progress.step + 1) / (self.progress.step + 20))
        values = [p.detach() for p in self.network.parameters()]
        torch._foreach_lerp_(list(self.average.values()), values, 1 - decay)

    def _note(self, keep: float = 0.98, **values: float) -> None:
        for name, value in values.items():
            self.smooth[name] = keep * self.smooth.get(name, value) + (1 - keep) * value

    def report(self) -> None:
        """One line to the log."""
        entry = {
            "minutes": round(self.progress.elapsed_s / 60, 1), "step": float(self.progress.step),
            "pictures": float(self.progress.pictures),
            **{k: round(v, 4) for k, v in self.smooth.items()},
        }  # fmt: skip
        self.progress.log.append(entry)
        print(" ".join(f"{k}={v:g}" for k, v in entry.items()), flush=True)

    def export(self, folder: Path) -> None:
        """The averaged weights as a checkpoint in the hub's format, and how they came about."""
        weights = self.network.stored(self.average)
        save(folder, self.network.sizes, weights, self.tokenizer)
        record = {
            "seed": self.seed, "budget": asdict(self.budget), "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "parameters": sum(w.numel() for w in weights.values()), **asdict(self.progress),
        }  # fmt: skip
        (folder / "training.json").write_text(json.dumps(record) + "\n")

    def save_state(self, folder: Path) -> None:
        """Everything needed to go on, written atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "network": self.network.state_dict(), "muon": self.muon.state_dict(),
            "adamw": self.adamw.state_dict(), "average": self.average,
            "progress": asdict(self.progress),
        }  # fmt: skip
        torch.save(state, folder / "state.pt.partial")
        (folder / "state.pt.partial").rename(folder / "state.pt")

    def load_state(self, folder: Path) -> None:
        """Go on from `save_state`."""
        state: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True)
        self.network.load_state_dict(state["network"])
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
        self.average = state["average"]
        self.progress = Progress(**state["progress"])


def normalise(tiles: Tensor) -> Tensor:
    """uint8 to the vision tower's range."""
    return (tiles.float() / 255 - MEAN) / STD


def run(trainer: Trainer, state: Path, out: Path, save_every_s: float) -> None:
    """Train until the budget is used up; every save of the state is an export, too."""
    context = multiprocessing.get_context("spawn")
    progress, stop = context.Value("d", trainer.fraction()), context.Event()
    queue: multiprocessing.Queue[Batch] = context.Queue(8)
    first = trainer.progress.step
    worker = context.Process(
        target=draw_batches,
        args=(trainer.seed, first, trainer.budget.steps, progress, queue, stop),
        daemon=True,
    )
    worker.start()
    saved = reported = time.monotonic()
    try:
        while trainer.fraction() < 1:
            begin, cpu = time.monotonic(), time.process_time()
            batch = queue.get(timeout=120)
            trainer._note(wait_s=time.monotonic() - begin)
            trainer.step(batch)
            now = time.monotonic()
            trainer._note(step_s=now - begin)
            trainer.progress.elapsed_s += now - begin
            trainer.progress.cpu_s += time.process_time() - cpu
            progress.value = trainer.fraction()
            if now - reported > 30:
                trainer.report()
                reported = now
            if now - saved > save_every_s:
                trainer.save_state(state)
                trainer.export(out)
                saved = now
    finally:
        stop.set()
        worker.terminate()
    trainer.report()
    trainer.save_state(state)
    trainer.export(out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=85.0, help="wall-clock training time")
    parser.add_argument("--steps", type=int, default=0, help="number of steps; overrides --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(usable_processors()))
    parser.add_argument("--state", type=Path, required=True, help="folder of the resumable state")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument(
        "--save-every", type=float, default=240.0, help="seconds between saved states"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    trainer = Trainer(arguments.seed, Budget(arguments.minutes, arguments.steps), build_tokenizer())
    if (arguments.state / "state.pt").exists():
        trainer.load_state(arguments.state)
    else:
        trainer.start()
    run(trainer, arguments.state, arguments.out, arguments.save_every)


if __name__ == "__main__":
    main()
