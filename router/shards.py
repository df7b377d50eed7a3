"""The ranks of one model as one: every step goes to all, the answer comes from rank 0."""

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import grpc

from tessera.proto import shard_pb2, shard_pb2_grpc
from tessera.proto.columns import SAMPLED_LAST
from tessera.router.request import SamplingParams
from tessera.router.scheduler import ChunkPlan, DecodePlan, StepPlan
from tessera.router.sequence import Sequence

logger = logging.getLogger(__name__)

OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # a proxy setting of the machine never concerns these sockets
]


WATCH_INTERVAL_S = 5.0
ANSWER_TIMEOUT_S = 10.0
"""A rank is asked twice, so that one that hangs is found within 25 s."""


class ShardsLost(Exception):
    """A shard is gone or answered out of order. The message names it."""


class WarmupFailed(Exception):
    """A rank cannot size its cache. The message names the settings to change."""


@dataclass(frozen=True, slots=True)
class ShardsInfo:
    """What rank 0 says of the model, the same on all ranks."""

    model_type: str
    dtype: str
    device: str
    backend: str
    block_size: int
    vocab_size: int
    world_size: int
    quantization: str = ""  # see `ServingLimits`
    cache_dtype: str = ""


@dataclass(slots=True)
class RankState:
    """What was last heard of a rank."""

    answers: bool = False  # to the last question, or to the last step
    info: shard_pb2.InfoReply | None = None  # None: its weights are not loaded yet


StepStream = grpc.aio.StreamStreamCall[shard_pb2.StepMessage, shard_pb2.StepReply]


class ShardGroup:
    """Connections to all ranks, in order of rank."""

    def __init__(self, targets: Seq[str]) -> None:
        self._targets = targets
        self.ranks = [RankState() for _ in targets]
        self._channels: list[grpc.aio.Channel] = []
        self._stubs: list[shard_pb2_grpc.ShardAsyncStub] = []  # a name of the typed stubs only
        self._streams: list[StepStream] = []
        self._next_step_id = 0
        self._writing = asyncio.Lock()  # a stream takes one message at a time
        self.incarnation = -1
        """Which one of the shards is or was last connected; ranks of it are not connected again."""

    async def connect(self, poll_s: float = 0.2) -> ShardsInfo:
        """Wait until every rank of a new incarnation has loaded its weights.

        Never gives up: the launcher does.
        """
        self._channels = [grpc.aio.insecure_channel(t, options=OPTIONS) for t in self._targets]
        self._stubs = [shard_pb2_grpc.ShardStub(channel) for channel in self._channels]
        infos = [await self._info(rank, poll_s) for rank in range(len(self._stubs))]
        # Should some be newer than others, the older ones are gone meanwhile.
        self.incarnation = min(info.incarnation for info in infos)
        first = infos[0]
        return ShardsInfo(
            first.model_type,
            first.dtype,
            first.device,
            first.backend,
            first.block_size,
            first.vocab_size,
            first.world_size,
            first.quantization,
            first.kv_cache_dtype,
        )

    async def warm_up(self, request: shard_pb2.WarmupRequest) -> int:
        """Let all ranks size their caches together; returns the blocks that all of them have.

        Raises:
            WarmupFailed: the model does not fit as configured.
            ShardsLost: a shard is gone.
        """
        calls = [stub.Warmup(request) for stub in self._stubs]
        try:
            replies = await asyncio.gather(*calls)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                raise ShardsLost(f"a shard is gone: {_reason(error)}") from error
            raise WarmupFailed(error.details() or "warm-up failed") from None
        for rank, reply in enumerate(replies):
            logger.info(
                "shard %d: %.0f MiB in use, up to %.0f MiB for a step, %d cache blocks of %.1f KiB",
                rank,
                reply.weights_bytes / 2**20,
                reply.peak_step_bytes / 2**20,
                reply.num_blocks,
                reply.block_bytes / 2**10,
            )
        self._next_step_id = 0
        self._streams = [stub.Steps() for stub in self._stubs]
        return min(reply.num_blocks for reply in replies)

    async def send(self, plan: StepPlan) -> int:
        """Send one step to all ranks; returns its id, to `receive` it by, in the order of sending.

        Raises:
            ShardsLost: a shard does not take it.
        """
        step = step_message(plan, self._next_step_id)
        self._next_step_id += 1
        message = shard_pb2.StepMessage(step=step)
        for rank in range(len(self._streams)):
            await self._write(rank, message)
        return step.step_id

    async def send_masks(self, step_id: int, masks: Mapping[int, bytes]) -> None:
        """Tell which tokens the guided sequences of a step may sample; only rank 0 does.

        Args:
            masks: by sequence id, as `TokenMask.bitmask`; all of a step's may come in parts.

        Raises:
            ShardsLost: the rank does not take it.
        """
        entries = [
            shard_pb2.TokenMask(sequence_id=sequence_id, bitmask=mask)
            for sequence_id, mask in masks.items()
        ]
        message = shard_pb2.TokenMasks(step_id=step_id, masks=entries)
        await self._write(0, shard_pb2.StepMessage(masks=message))

    async def _write(self, rank: int, message: shard_pb2.StepMessage) -> None:
        try:
            async with self._writing:
                await self._streams[rank].write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise self._lost(rank, f"is gone: {_reason(error)}") from error

    async def receive(self, step_id: int) -> shard_pb2.StepReply:
        """Rank 0's reply to a step, once all ranks have replied.

        Raises:
            ShardsLost: a shard did not answer this step.
        """
        replies = await asyncio.gather(
            *(self._reply(rank, stream, step_id) for rank, stream in enumerate(self._streams))
        )
        return replies[0]

    async def watch(
        self, interval_s: float = WATCH_INTERVAL_S, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> None:
        """Ask every shard now and then for a sign of life; a shard that computes still gives it.

        Raises:
            ShardsLost: a shard has ended, or did not answer twice in a row. Returns only by this.
        """
        ranks = range(len(self._stubs))
        watching = [self._watch(rank, interval_s, timeout_s) for rank in ranks]
        watching += [self._stream_end(rank, stream) for rank, stream in enumerate(self._streams)]
        tasks = [asyncio.ensure_future(each) for each in watching]
        try:
            await asyncio.gather(*tasks)
        finally:  # the others would go on, and watch the next incarnation
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """Close the streams, which makes the shards forget every sequence, and the channels."""
        for stream in self._streams:
            stream.cancel()
        for channel in self._channels:
            await channel.close()
        for state in self.ranks:
            state.answers = False

    async def _info(self, rank: int, poll_s: float) -> shard_pb2.InfoReply:
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                info = await self._ask(rank, 5)
                if info.incarnation > self.incarnation:
                    return info
            await asyncio.sleep(poll_s)

    async def _ask(self, rank: int, timeout_s: float) -> shard_pb2.InfoReply:
        state = self.ranks[rank]
        try:
            state.info = await self._stubs[rank].Info(shard_pb2.InfoRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError:
            state.answers = False
            raise
        state.answers = True
        return state.info

    async def _watch(self, rank: int, interval_s: float, timeout_s: float) -> None:
        num_missed = 0  # a machine that was paused as a whole misses one answer
        while num_missed < 2:
            if not num_missed:
                await asyncio.sleep(interval_s)
            try:
                info = await self._ask(rank, timeout_s)
                num_missed = 0
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise self._lost(rank, f"is gone: {_reason(error)}") from error
                num_missed += 1
            else:
                if info.incarnation != self.incarnation:
                    raise self._lost(rank, "was started anew")
        raise self._lost(rank, f"has not answered for {2 * timeout_s:g} seconds")

    async def _stream_end(self, rank: int, stream: StepStream) -> None:
        """Notices at once that a shard has ended, also while nobody asks for anything."""
        await stream.code()
        raise self._lost(rank, f"is gone: {await stream.details() or 'it closed its stream'}")

    async def _reply(self, rank: int, stream: StepStream, step_id: int) -> shard_pb2.StepReply:
        try:
            reply = await stream.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise self._lost(rank, f"is gone: {_reason(error)}") from error
        if not isinstance(reply, shard_pb2.StepReply):  # grpc.aio.EOF
            raise self._lost(rank, f"closed its stream: {await stream.details()}")
        if reply.step_id != step_id:
            raise self._lost(rank, f"answered step {reply.step_id}, not {step_id}")
        return reply

    def _lost(self, rank: int, what: str) -> ShardsLost:
        self.ranks[rank].answers = False
        return ShardsLost(f"shard {rank} {what}")


def step_message(plan: StepPlan, step_id: int) -> shard_pb2.Step:
    """The message of a planned step."""
    return shard_pb2.Step(
        step_id=step_id,
        released_sequence_ids=plan.released_sequence_ids,
        released_images=plan.released_images,
        images=[
            shard_pb2.Image(
                content_hash=image.content_hash,
                height=image.height,
                width=image.width,
                num_tiles=image.num_tiles,
                tiles=image.tiles,
                grid_rows=image.grid[0],
                grid_columns=image.grid[1],
            )
            for image in plan.images
        ],
        chunks=[_chunk_message(chunk) for chunk in plan.chunks],
        decodes=_decodes_message(plan.decodes),
    )


def _decodes_message(rows: Seq[DecodePlan]) -> shard_pb2.Decodes:
    return shard_pb2.Decodes(
        sequence_ids=[row.sequence.sequence_id for row in rows],
        token_ids=[SAMPLED_LAST if row.token_id is None else row.token_id for row in rows],
        context_lens=[row.context_len for row in rows],
        new_blocks=[
            shard_pb2.NewBlocks(sequence_id=row.sequence.sequence_id, block_ids=row.new_block_ids)
            for row in rows
            if row.new_block_ids
        ],
    )


def _chunk_message(chunk: ChunkPlan) -> shard_pb2.Chunk:
    sequence = chunk.sequence
    message = shard_pb2.Chunk(
        sequence_id=sequence.sequence_id,
        first_position=chunk.first,
        token_ids=sequence.token_ids[chunk.first : chunk.last],
        new_block_ids=chunk.new_block_ids,
        images=_spans(chunk),
        is_last=chunk.is_last,
    )
    if chunk.is_start:
        message.sampling.CopyFrom(sampling_message(sequence))
        message.num_prompt_tokens = sequence.num_prompt_tokens
        if _counts_tokens(sequence.request.sampling):
            message.cached_token_ids.extend(sequence.token_ids[: chunk.first])
    return message


def _counts_tokens(params: SamplingParams) -> bool:
    """Whether the shard must know the ids of tokens it does not compute."""
    return bool(
        params.repetition_penalty != 1 or params.frequency_penalty or params.presence_penalty
    )


def _spans(chunk: ChunkPlan) -> list[shard_pb2.ImageSpan]:
    spans = []
    for placed in chunk.sequence.images_between(chunk.first, chunk.last):
        start = max(placed.offset, chunk.first)
        end = min(placed.offset + placed.image.num_tokens, chunk.last)
        spans.append(
            shard_pb2.ImageSpan(
                content_hash=placed.image.content_hash,
                offset=start - chunk.first,
                first_feature=start - placed.offset,
                length=end - start,
            )
        )
    return spans


def sampling_message(sequence: Sequence) -> shard_pb2.SamplingParams:
    """A sequence's sampling parameters; neutral values stay absent."""
    params, stopping = sequence.request.sampling, sequence.request.stopping
    message = shard_pb2.SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        min_p=params.min_p,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        seed=params.seed,
        top_n_tokens=params.top_n_tokens,
        prompt_logprobs=params.prompt_logprobs,
        guided=sequence.request.guide is not None,
        logit_bias=[shard_pb2.LogitBias(token_id=i, bias=b) for i, b in params.logit_bias],
        min_tokens=stopping.min_tokens,
        end_token_ids=stopping.end_ids if stopping.min_tokens else (),
    )
    if params.top_p < 1:
        message.top_p = params.top_p
    if params.typical_p < 1:
        message.typical_p = params.typical_p
    if params.repetition_penalty != 1:
        message.repetition_penalty = params.repetition_penalty
    return message


def _reason(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return error.details() or error.code().name
    return "the stream is closed"
