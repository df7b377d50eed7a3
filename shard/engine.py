"""Runs steps on one rank: images, forward pass, sampling. One thread, one step after the other.

A device that runs ahead of the host may be given the next step before this one is finished: then
the host reads tokens and writes replies while the device computes.
"""

import logging
import time
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import TypeVar

import torch
from torch import Tensor

from tessera.proto import shard_pb2
from tessera.shard.backends.base import CacheShape, LayerCache
from tessera.shard.batch import Batch, BatchBuilder, last_rows, slice_layout
from tessera.shard.decode_graphs import DecodeGraphs, batch_sizes
from tessera.shard.errors import DeviceError, GroupLost
from tessera.shard.launched import Launched
from tessera.shard.models.base import ImageTiles, Model, Placement
from tessera.shard.prompt_scores import score_prompt
from tessera.shard.resilience import in_halves, one_by_one, part_of
from tessera.shard.sequence import SequenceState
from tessera.shard.token_choice import choose_tokens, report_tokens
from tessera.shard.token_masks import TokenMaskBox
from tessera.shard.unread_tokens import is_placeholder, placeholder
from tessera.shard.upload import upload
from tessera.shard.vision_cache import VisionCache

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Engine:
    """A loaded model, its KV cache and the sequences in flight."""

    def __init__(self, model: Model, placement: Placement, block_size: int) -> None:
        self.model = model
        self.placement = placement
        self.block_size = block_size
        self.masks = TokenMaskBox()  # of guided sequences
        self._builder = BatchBuilder(block_size, placement.backend.device)
        self._vision = VisionCache()
        self._caches: list[LayerCache] = []
        self._graphs: DecodeGraphs | None = None  # recordings over these caches
        self._chosen_R: Tensor | None = None  # tokens of the step launched last

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be launched before the one before it is finished.

        Ranks of a group wait for the device in each step, to agree on what failed.
        """
        return self.placement.backend.runs_ahead and self.placement.group.world_size == 1

    @property
    def cache_shape(self) -> CacheShape:
        """Sizes of this rank's KV cache."""
        return CacheShape(
            num_layers=self.model.num_layers,
            num_kv_heads=self.model.num_kv_heads,
            head_size=self.model.head_size,
            block_size=self.block_size,
            dtype=self.placement.cache_dtype or self.placement.dtype,
        )

    @property
    def used_memory_bytes(self) -> int:
        """See `Backend.used_memory_bytes`."""
        return self.placement.backend.used_memory_bytes()

    def allocate_cache(self, num_blocks: int) -> None:
        """Allocate `num_blocks` usable blocks and the scratch block 0.

        Raises:
            DeviceError: the device has no room for them.
        """
        self._caches, self._graphs = [], None
        try:
            self._caches = self.placement.backend.new_cache(self.cache_shape, num_blocks + 1)
        except (RuntimeError, MemoryError) as error:
            needed = (num_blocks + 1) * self.cache_shape.block_bytes
            raise DeviceError(
                f"no room for a KV cache of {num_blocks} blocks ({needed / 2**20:.0f} MiB); "
                "lower MAX_BATCH_TOTAL_TOKENS"
            ) from error

    def record_decodes(self, max_batch: int, max_context_len: int) -> int:
        """Record decode steps over the cache, where the device can; bytes they hold.

        Steps of several ranks are not recorded, so that they can agree on what failed.
        """
        max_blocks = -(-max_context_len // self.block_size)
        if self.runs_ahead:
            self._graphs = DecodeGraphs.recorded(
                self.placement.backend, self.model, self._caches, batch_sizes(max_batch), max_blocks
            )
        return self._graphs.num_bytes if self._graphs is not None else 0

    def trial_caches(self, num_layers: int) -> list[LayerCache]:
        """The caches of the first layers, for the warm-up."""
        return self._caches[:num_layers]

    def reset(self) -> None:
        """Forget every sequence and image, as when a router connects anew."""
        self._builder.clear()
        self._vision.clear()
        self.masks.reset()
        self._chosen_R = None

    def run(self, step: shard_pb2.Step) -> shard_pb2.StepReply:
        """Compute one step.

        Best called in `torch.inference_mode`, entered once for many steps: to enter and to leave it
        takes a tenth of the time that a step spends around the model.

        A sequence whose logits are not finite, or whose image features are absent, fails alone;
        its neighbours' tokens are in the same reply.

        Raises:
            DivergenceError: router and shard disagree; nothing of the step can be trusted.
        """
        return self._finish(self._launch(step))

    def launch(self, step: shard_pb2.Step) -> Launched:
        """Begin a step. Where the device runs ahead, this waits for nothing.

        The step before it must be finished, unless it `may_be_followed`.

        Raises:
            DivergenceError: see `run`.
        """
        with torch.inference_mode():
            return self._launch(step)

    def finish(self, launched: Launched) -> shard_pb2.StepReply:
        """Wait until the step is computed, and say what came out."""
        with torch.inference_mode():
            return self._finish(launched)

    def wait(self, launched: Launched) -> None:
        """Until a step that `may_be_followed` is computed. From any thread."""
        self.placement.backend.wait(launched.done)

    def _launch(self, step: shard_pb2.Step) -> Launched:
        backend, started_ns = self.placement.backend, time.perf_counter_ns()
        self._builder.release(step.released_sequence_ids)
        for content_hash in step.released_images:
            self._vision.release(content_hash)
        started = backend.mark()
        if step.images:
            self._encode_images(step.images)
        encoded = backend.mark()
        batch = self._builder.build(step, self._chosen_R)
        reply = shard_pb2.StepReply(step_id=step.step_id)
        launched = Launched(reply, batch, started_ns, started, encoded, computed=encoded)
        if batch is not None:
            launched.hidden_TD = self._hidden_states(batch, launched.failures)
            if self.runs_ahead and not any(s.guided for s in batch.sampled):
                self._choose(launched, batch, launched.hidden_TD)
                if launched.tokens is not None:
                    launched.tokens.fetch()
                launched.done = backend.mark()
        self._chosen_R = launched.tokens.ids_R if launched.tokens is not None else None
        return launched

    def _finish(self, launched: Launched) -> shard_pb2.StepReply:
        backend, reply, batch = self.placement.backend, launched.reply, launched.batch
        if batch is not None and launched.hidden_TD is not None:
            hidden_TD, group = launched.hidden_TD, self.placement.group
            for span in batch.prompt_spans:
                score_prompt(self.model, group, hidden_TD, batch.ids_T, span, reply)
            if launched.done is None:
                self._choose(launched, batch, hidden_TD)
            else:
                backend.wait(launched.done)
            if batch.sampled:
                self._report(launched, batch)
        for sequence_id, message in launched.failures.items():
            reply.failures.add(sequence_id=sequence_id, message=message)
        # Here the device is waited for where reading tokens has not done so.
        reply.vision_ns = backend.elapsed_ns(launched.started, launched.encoded)
        reply.forward_ns = backend.elapsed_ns(launched.encoded, launched.computed)
        if launched.done is None:
            on_device_ns = reply.vision_ns + reply.forward_ns
            took_ns = time.perf_counter_ns() - launched.started_ns
            reply.sample_ns = max(0, took_ns - on_device_ns)
        else:
            reply.sample_ns = backend.elapsed_ns(launched.computed, launched.done)
        return reply

    def _choose(self, launched: Launched, batch: Batch, hidden_TD: Tensor) -> None:
        """Sample on rank 0. On all ranks placeholders are remembered; who reads replaces them."""
        logits_RV = None
        if batch.sample_rows:
            if len(batch.sample_rows) < batch.num_tokens:
                rows_R = upload(torch.tensor(batch.sample_rows), hidden_TD.device)
                hidden_TD = hidden_TD[rows_R]
            logits_RV = self._logits(hidden_TD)
        launched.computed = self.placement.backend.mark()
        if logits_RV is not None:
            masks = self._masks_of(launched.reply.step_id, batch.sampled, launched.failures)
            launched.tokens = choose_tokens(
                logits_RV,
                masks,
                batch.sampled,
                launched.failures,
                self.placement.backend.draw,
                self._chosen_R,
                self.placement.backend.survey,
            )
        for row, sequence in enumerate(batch.sampled):
            launched.places.append(len(sequence.token_ids))
            sequence.token_ids.append(placeholder(row))

    def _report(self, launched: Launched, batch: Batch) -> None:
        """Read the tokens on rank 0, tell the other ranks, remember them on all."""
        tokens = launched.tokens.read(launched.failures) if launched.tokens is not None else None
        token_ids = tokens.ids if tokens is not None else [0] * len(batch.sampled)
        if self.placement.group.world_size > 1:
            ids_R = upload(torch.tensor(token_ids), self.placement.backend.device)
            token_ids = self.placement.group.broadcast(ids_R).tolist()
        for sequence, place, token_id in zip(
            batch.sampled, launched.places, token_ids, strict=True
        ):
            if is_placeholder(sequence.token_ids[place]):  # the router may have named another
                sequence.token_ids[place] = token_id
        if tokens is not None:
            report_tokens(launched.reply, batch.sampled, tokens, launched.failures)

    def _hidden_states(self, batch: Batch, failures: dict[int, str]) -> Tensor:
        """The model's output [T, D]; rows of sequences that failed are zero.

        On a single rank only the last row of each sequence counts, but where prompts are scored.
        """
        if self._graphs is not None:
            replayed_TD = self._graphs.hidden_states(batch)
            if replayed_TD is not None:
                return replayed_TD

        # A rank that fails goes through exchanges it has missed: each has as many rows as the step.
        every_row = bool(batch.prompt_spans) or self.placement.group.world_size > 1

        def forward(first: int, last: int) -> Tensor:
            x_TD = self._embed(batch, first, last, failures)
            layout = slice_layout(batch.layout, first, last)
            wanted = None if every_row else last_rows(layout)
            return self.model.forward(x_TD, self._caches, layout, wanted)

        def compute(first: int, last: int) -> Tensor:
            return self._together("forward", last - first, lambda: forward(first, last))

        try:
            return _joined(in_halves(compute, 0, batch.num_tokens))
        except GroupLost:
            raise
        except Exception:
            logger.exception("a step failed; computing its sequences one by one")
        spans = list(pairwise(batch.layout.query_start))
        parts = one_by_one(lambda span: _joined(in_halves(compute, *span)), spans)
        backend, dtype = self.placement.backend, self.placement.dtype
        hidden_TD = torch.zeros(
            batch.num_tokens, self.model.width, dtype=dtype, device=backend.device
        )
        for sequence, (first, last), part in zip(batch.sequences, spans, parts, strict=True):
            if isinstance(part, str):
                failures[sequence.sequence_id] = part
            else:
                hidden_TD[first:last] = part
        return hidden_TD

    def _embed(self, batch: Batch, first: int, last: int, failures: dict[int, str]) -> Tensor:
        """Embeddings of the rows [first, last), image features in their places."""
        x_TD = self.model.embed(part_of(batch.ids_T, first, last))
        for splice in batch.splices:
            start = max(splice.first_row, first)
            end = min(splice.first_row + splice.length, last)
            if start >= end:
                continue
            first_feature = splice.first_feature + start - splice.first_row
            last_feature = first_feature + end - start
            features_TD = self._vision.get(splice.content_hash)
            if features_TD is None or last_feature > features_TD.shape[0]:
                have = 0 if features_TD is None else features_TD.shape[0]
                failures[splice.sequence_id] = (
                    f"a picture needs {last_feature} features, the shard has {have} of them"
                )
            else:
                features_TD = features_TD[first_feature:last_feature]
                x_TD[start - first : end - first] = features_TD.to(x_TD.dtype)
        return x_TD

    def _encode_images(self, images: Sequence[shard_pb2.Image]) -> None:
        """Encode together what is new; a picture that fails is absent, which fails its users."""
        new = [image for image in images if image.content_hash not in self._vision]
        if not new:
            return
        device = self.placement.backend.device

        def encode(first: int, last: int) -> list[Tensor]:
            part = new[first:last]
            num_tiles = sum(image.num_tiles for image in part)
            return self._together(
                "vision",
                num_tiles,
                lambda: self.model.encode_images([_tiles(image, device) for image in part]),
            )

        features: Sequence[Tensor | str]
        try:
            features = list(chain.from_iterable(in_halves(encode, 0, len(new))))
        except GroupLost:
            raise
        except Exception:
            logger.exception("encoding pictures failed; trying them one by one")
            features = one_by_one(lambda n: encode(n, n + 1)[0], range(len(new)))
        for image, features_TD in zip(new, features, strict=True):
            if isinstance(features_TD, Tensor):
                self._vision.put(image.content_hash, features_TD)

    def _logits(self, hidden_RD: Tensor) -> Tensor | None:
        """float32 [R, V] on rank 0, None on the others."""

        def compute(first: int, last: int) -> Tensor | None:
            return self._together(
                "logits", last - first, lambda: self.model.logits(part_of(hidden_RD, first, last))
            )

        parts = [x for x in in_halves(compute, 0, hidden_RD.shape[0]) if x is not None]
        return _joined(parts) if parts else None

    def _masks_of(
        self, step_id: int, sequences: Sequence[SequenceState], failures: dict[int, str]
    ) -> dict[int, bytes]:
        """Wait for the masks of guided sequences; one whose mask does not come fails."""
        guided = [s.sequence_id for s in sequences if s.guided]
        if not guided:
            return {}
        masks = self.masks.take(step_id, guided)
        for sequence_id in guided:
            if sequence_id not in masks:
                failures.setdefault(sequence_id, "the router did not say which tokens may follow")
        return masks

    def _together(self, kind: str, num_items: int, work: Callable[[], T]) -> T:
        return self.placement.group.together(kind, num_items, work)


def _joined(parts_TD: list[Tensor]) -> Tensor:
    return parts_TD[0] if len(parts_TD) == 1 else torch.cat(parts_TD)


def _tiles(image: shard_pb2.Image, device: torch.device) -> ImageTiles:
    side = int((len(image.tiles) // (3 * image.num_tiles)) ** 0.5)
    flat = torch.frombuffer(bytearray(image.tiles), dtype=torch.uint8)
    tiles = upload(flat, device).view(image.num_tiles, side, side, 3)
    return ImageTiles(tiles, image.height, image.width, (image.grid_rows, image.grid_columns))
