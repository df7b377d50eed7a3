"""Steps through the engine over a table of a model: the next token depends on the last only."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera.proto import shard_pb2
from tessera.shard.backends import load_backend
from tessera.shard.backends.base import LastRows, LayerCache, StepLayout
from tessera.shard.backends.reference import ReferenceBackend
from tessera.shard.choice import Choice
from tessera.shard.engine import Engine
from tessera.shard.errors import DeviceError, DivergenceError
from tessera.shard.models.base import ImageTiles, Placement
from tessera.shard.parallel import Group
from tessera.shard.sampler import SampleRow, choose
from tessera.shard.warmup import warm_up
from tests.step_columns import DecodeRow, columns

VOCABULARY = 32
BLOCK_SIZE = 4
POISON = 13  # a token after which the model's output is NaN
BAD = 14  # a token with which the model raises
BROKEN = 99  # a pixel with which the vision tower raises
IMAGE_TOKEN = 31


class TableModel:
    """Logits of a token are its row of a table; a picture's features are one-hot rows."""

    width, num_layers, num_kv_heads, head_size = VOCABULARY, 1, 1, 8
    vocab_size, max_positions = VOCABULARY, 1000

    def __init__(self) -> None:
        self.table_VV = torch.randn(
            VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(3)
        )
        self.layouts: list[StepLayout] = []
        self.room = 1_000_000  # tokens, or pictures, that fit into memory at once
        self.shortage: Exception = torch.OutOfMemoryError("no room")

    def embed(self, ids_T: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(ids_T, VOCABULARY).float()

    def encode_images(self, images: list[ImageTiles]) -> list[Tensor]:
        if len(images) > self.room:
            raise self.shortage
        if any(int(image.tiles[0, 0, 0, 0]) == BROKEN for image in images):
            raise ValueError("a picture that the model cannot take")
        # Feature k of a picture looks like the token with the value of the first pixel plus k.
        return [self.embed(torch.arange(6) + int(image.tiles[0, 0, 0, 0])) for image in images]

    def forward(
        self,
        x_TD: Tensor,
        caches: list[LayerCache],
        layout: StepLayout,
        wanted: LastRows | None = None,
    ) -> Tensor:
        self.layouts.append(layout)
        if x_TD.shape[0] > self.room:
            raise self.shortage
        if BAD in x_TD.argmax(-1).tolist():
            raise IndexError("a token that the model cannot take")
        hidden_TD = x_TD @ self.table_VV
        hidden_TD[x_TD.argmax(-1) == POISON] = float("nan")
        return hidden_TD

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return hidden_RD


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """As on a shard's thread."""
    with torch.inference_mode():
        yield


@pytest.fixture
def model() -> TableModel:
    return TableModel()


@pytest.fixture
def engine(model: TableModel) -> Engine:
    placement = Placement(load_backend("cpu", "reference"), Group(), torch.float32)
    engine = Engine(model, placement, BLOCK_SIZE)
    engine.allocate_cache(20)
    return engine


def chunk(
    sequence_id: int, ids: list[int], first: int = 0, *, is_last: bool = True, **extra: object
) -> shard_pb2.Chunk:
    end = first + len(ids)
    already = -(-first // BLOCK_SIZE)
    needed = range(10 * sequence_id + already, 10 * sequence_id - (-end // BLOCK_SIZE))
    blocks = extra.pop("blocks", needed)
    sampling = extra.pop("sampling", shard_pb2.SamplingParams())
    return shard_pb2.Chunk(
        sequence_id=sequence_id,
        first_position=first,
        token_ids=ids,
        new_block_ids=blocks,  # type: ignore[arg-type]
        is_last=is_last,
        sampling=sampling,  # type: ignore[arg-type]
        num_prompt_tokens=end,
        **extra,  # type: ignore[arg-type]
    )


def tokens(reply: shard_pb2.StepReply) -> dict[int, int]:
    return dict(zip(reply.tokens.sequence_ids, reply.tokens.token_ids, strict=True))


def test_decode_goes_on_from_the_token_sampled_last(engine: Engine, model: TableModel) -> None:
    first = tokens(engine.run(shard_pb2.Step(chunks=[chunk(1, [5, 6])])))[1]
    assert first == int(model.table_VV[6].argmax())
    row = DecodeRow(sequence_id=1, context_len=3)
    assert tokens(engine.run(shard_pb2.Step(decodes=columns(row))))[1] == int(
        model.table_VV[first].argmax()
    )


def test_a_token_the_router_names_wins_over_the_one_sampled_last(
    engine: Engine, model: TableModel
) -> None:
    engine.run(shard_pb2.Step(chunks=[chunk(1, [5, 6])]))
    row = DecodeRow(sequence_id=1, context_len=3, token_id=9)
    assert tokens(engine.run(shard_pb2.Step(decodes=columns(row))))[1] == int(
        model.table_VV[9].argmax()
    )


def test_layout_of_a_mixed_step(engine: Engine, model: TableModel) -> None:
    engine.run(shard_pb2.Step(chunks=[chunk(1, [1, 2, 3])]))
    row = DecodeRow(sequence_id=1, context_len=4)
    engine.run(shard_pb2.Step(decodes=columns(row), chunks=[chunk(0, [7] * 6, is_last=False)]))
    row = DecodeRow(sequence_id=1, context_len=5, new_block_ids=[17])
    engine.run(shard_pb2.Step(decodes=columns(row), chunks=[chunk(0, [8] * 5, 6)]))
    layout = model.layouts[-1]
    assert layout.positions_T.tolist() == [4, 6, 7, 8, 9, 10]
    assert layout.query_start == (0, 1, 6) and layout.context_lens == (5, 11)
    assert layout.block_tables_SM.tolist() == [[10, 17, 0], [0, 1, 2]]
    assert layout.slots_T.tolist() == [17 * 4, 1 * 4 + 2, 1 * 4 + 3, 8, 9, 10]


def test_nan_fails_its_own_sequence_only(engine: Engine, model: TableModel) -> None:
    reply = engine.run(shard_pb2.Step(chunks=[chunk(0, [POISON]), chunk(1, [4])]))
    assert tokens(reply) == {1: int(model.table_VV[4].argmax())}
    assert [failure.sequence_id for failure in reply.failures] == [0]
    assert "not finite" in reply.failures[0].message


def test_an_exception_fails_its_own_sequence_only(engine: Engine, model: TableModel) -> None:
    reply = engine.run(shard_pb2.Step(chunks=[chunk(0, [1, BAD, 2]), chunk(1, [4])]))
    assert tokens(reply) == {1: int(model.table_VV[4].argmax())}
    (failure,) = reply.failures
    assert failure.sequence_id == 0 and "internal error" in failure.message


@pytest.mark.parametrize("room", [1, 2, 3, 5])
def test_a_step_that_runs_out_of_memory_is_done_in_parts(
    engine: Engine, model: TableModel, room: int
) -> None:
    step = shard_pb2.Step(chunks=[chunk(0, [5, 6, 7, 8, 9]), chunk(1, [4, 3])])
    expected = tokens(engine.run(step))
    engine.reset()
    model.room = room
    model.layouts.clear()
    reply = engine.run(step)
    assert tokens(reply) == expected and not reply.failures
    done = [layout for layout in model.layouts if layout.query_start[-1] <= room]
    assert sum(layout.query_start[-1] for layout in done) == 7
    positions = [p for layout in done for p in layout.positions_T.tolist()]
    assert positions == [0, 1, 2, 3, 4, 0, 1]
    for layout in done:  # the last token of each row sees exactly what lies before it
        ends = [layout.positions_T[end - 1].item() + 1 for end in layout.query_start[1:]]
        assert ends == list(layout.context_lens) == layout.context_lens_S.tolist()


@pytest.mark.parametrize(
    "shortage",
    [
        torch.OutOfMemoryError("no room"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_no_room_for_a_single_token_fails_the_sequence_with_the_setting_to_lower(
    engine: Engine, model: TableModel, shortage: Exception
) -> None:
    model.room, model.shortage = 0, shortage
    reply = engine.run(shard_pb2.Step(chunks=[chunk(0, [5])]))
    assert "MAX_BATCH_PREFILL_TOKENS" in reply.failures[0].message and not reply.tokens.token_ids


def make_image(content_hash: bytes, pixel: int) -> shard_pb2.Image:
    tiles = torch.full((1, 2, 2, 3), pixel, dtype=torch.uint8).numpy().tobytes()
    return shard_pb2.Image(content_hash=content_hash, height=2, width=2, num_tiles=1, tiles=tiles)


@pytest.mark.parametrize("room", [1, 2])
def test_pictures_that_do_not_fit_together_are_encoded_in_parts(
    engine: Engine, model: TableModel, room: int
) -> None:
    model.room = room
    images = [make_image(bytes([n] * 16), n) for n in range(5)]
    engine.run(shard_pb2.Step(images=images))
    for n in range(5):
        features = engine._vision.get(bytes([n] * 16))
        assert features is not None and int(features[0].argmax()) == n


def test_a_picture_that_cannot_be_encoded_fails_its_own_request_only(
    engine: Engine, model: TableModel
) -> None:
    step = image_step(b"a" * 16, with_pixels=True)
    step.images.append(make_image(b"b" * 16, BROKEN))
    span = shard_pb2.ImageSpan(content_hash=b"b" * 16, length=1)
    step.chunks.append(chunk(1, [IMAGE_TOKEN], images=[span]))
    reply = engine.run(step)
    assert tokens(reply) == {0: int(model.table_VV[11].argmax())}
    assert [failure.sequence_id for failure in reply.failures] == [1]


def image_step(content_hash: bytes, *, with_pixels: bool) -> shard_pb2.Step:
    image = make_image(content_hash, 7)
    span = shard_pb2.ImageSpan(content_hash=content_hash, offset=1, first_feature=2, length=3)
    ids = [1, IMAGE_TOKEN, IMAGE_TOKEN, IMAGE_TOKEN]
    return shard_pb2.Step(
        images=[image] if with_pixels else [], chunks=[chunk(0, ids, images=[span])]
    )


def test_features_replace_placeholders(engine: Engine, model: TableModel) -> None:
    reply = engine.run(image_step(b"a" * 16, with_pixels=True))
    assert tokens(reply)[0] == int(model.table_VV[7 + 4].argmax())  # feature 2 + 3 - 1


def test_features_stay_until_released(engine: Engine) -> None:
    engine.run(image_step(b"a" * 16, with_pixels=True))
    again = shard_pb2.Step(released_sequence_ids=[0])
    engine.run(again)
    assert not engine.run(image_step(b"a" * 16, with_pixels=False)).failures
    engine.run(shard_pb2.Step(released_sequence_ids=[0], released_images=[b"a" * 16]))
    reply = engine.run(image_step(b"a" * 16, with_pixels=False))
    assert "needs 5 features, the shard has 0" in reply.failures[0].message
    assert not reply.tokens.token_ids


def test_a_sequence_may_start_behind_blocks_that_others_computed(
    engine: Engine, model: TableModel
) -> None:
    penalty = shard_pb2.SamplingParams(repetition_penalty=1000.0)
    favourite = int(model.table_VV[7].argmax())
    start = shard_pb2.Chunk(
        sequence_id=2,
        first_position=4,
        token_ids=[6, 7],
        cached_token_ids=[favourite, 1, 2, 3],
        new_block_ids=[10, 11],
        is_last=True,
        sampling=penalty,
        num_prompt_tokens=6,
    )
    reply = engine.run(shard_pb2.Step(chunks=[start]))
    assert tokens(reply)[2] != favourite  # it stands in the part that was not computed again
    layout = model.layouts[-1]
    assert layout.positions_T.tolist() == [4, 5]
    assert layout.slots_T.tolist() == [44, 45] and layout.context_lens == (6,)


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_prompt_logprobs_are_the_models_whatever_the_chunks(
    engine: Engine, model: TableModel, cut: int
) -> None:
    ids = [3, 1, 4, 1, 5]
    sampling = shard_pb2.SamplingParams(prompt_logprobs=True)
    got: dict[int, float] = {}
    parts = [(0, ids[:cut], False), (cut, ids[cut:], True)]
    for first, part, is_last in parts:
        reply = engine.run(
            shard_pb2.Step(chunks=[chunk(0, part, first, is_last=is_last, sampling=sampling)])
        )
        for scored in reply.prompt_logprobs:
            got |= dict(enumerate(scored.logprobs, scored.first_position))
    logprobs = model.table_VV.log_softmax(-1)
    expected = {n: float(logprobs[ids[n - 1], ids[n]]) for n in range(1, 5)}
    assert got == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "step",
    [
        shard_pb2.Step(decodes=columns(DecodeRow(sequence_id=5, context_len=3))),
        shard_pb2.Step(chunks=[chunk(0, [1], first=4, sampling=None)]),
    ],
)
def test_a_step_about_an_unknown_sequence_is_a_divergence(
    engine: Engine, step: shard_pb2.Step
) -> None:
    with pytest.raises(DivergenceError, match="no such sequence"):
        engine.run(step)


def test_a_token_without_a_block_is_a_divergence(engine: Engine) -> None:
    with pytest.raises(DivergenceError, match="sequence 0: 5 tokens do not fit into its 1 blocks"):
        engine.run(shard_pb2.Step(chunks=[chunk(0, [1] * 5, blocks=[1])]))
    engine.reset()
    engine.run(shard_pb2.Step(chunks=[chunk(0, [1] * 4, blocks=[1])]))
    with pytest.raises(DivergenceError, match="sequence 0: 5 tokens do not fit into its 1 blocks"):
        engine.run(shard_pb2.Step(decodes=columns(DecodeRow(sequence_id=0, context_len=5))))


def test_many_sequences_come_and_go(engine: Engine) -> None:
    for sequence_id in range(100):
        engine.run(
            shard_pb2.Step(
                released_sequence_ids=[sequence_id - 3] if sequence_id > 2 else [],
                chunks=[
                    shard_pb2.Chunk(
                        sequence_id=sequence_id,
                        token_ids=[1],
                        new_block_ids=[1],
                        is_last=True,
                        sampling=shard_pb2.SamplingParams(),
                    )
                ],
            )
        )


def request(**changes: int) -> shard_pb2.WarmupRequest:
    values = {"max_step_tokens": 64, "max_batch_size": 4, "max_context_len": 256}
    return shard_pb2.WarmupRequest(**(values | changes))


def test_warm_up_gives_what_is_asked_for_and_leaves_no_sequence(engine: Engine) -> None:
    reply = warm_up(engine, request(max_blocks=77), memory_fraction=1.0, layout=None)
    assert reply.num_blocks == 77
    assert reply.block_bytes == engine.cache_shape.block_bytes == 2 * 4 * 8 * 4
    engine.run(shard_pb2.Step(chunks=[chunk(0, [1])]))


class SmallDevice(ReferenceBackend):
    """A device of so many bytes, on which every stage of a step takes `step_bytes`."""

    def __init__(self, free_bytes: int, step_bytes: int) -> None:
        super().__init__(torch.device("cpu"))
        self.free_bytes, self.step_bytes = free_bytes, step_bytes

    def free_memory_bytes(self) -> int:
        return self.free_bytes

    def used_memory_bytes(self) -> int:
        return 0

    def peak_memory_bytes(self) -> int:
        return self.step_bytes


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices of some kilobytes; no megabytes are left alone on them."""
    monkeypatch.setattr("tessera.shard.warmup.LEAST_WORKSPACE_BYTES", 0)


def test_warm_up_leaves_room_for_messages_however_little_there_is(model: TableModel) -> None:
    engine = small_engine(model, 50 << 20, 1 << 20)
    reply = warm_up(engine, request(), memory_fraction=1.0, layout=None)
    assert reply.num_blocks == (50 - 1 - 40 << 20) // 256


def small_engine(model: TableModel, free_bytes: int, step_bytes: int) -> Engine:
    backend = SmallDevice(free_bytes, step_bytes)
    return Engine(model, Placement(backend, Group(), torch.float32), BLOCK_SIZE)


@pytest.mark.usefixtures("small")
def test_warm_up_fills_what_the_largest_step_leaves(model: TableModel) -> None:
    engine = small_engine(model, 100_000, 20_000)
    reply = warm_up(engine, request(), memory_fraction=0.5, layout=None)
    assert reply.num_blocks == (50_000 - 20_000 - 2_500) // 256
    assert reply.peak_step_bytes == 20_000


@pytest.mark.usefixtures("small")
def test_warm_up_counts_the_bytes_of_a_cache_in_8_bits(model: TableModel) -> None:
    placement = Placement(
        SmallDevice(100_000, 20_000), Group(), torch.float32, cache_dtype=torch.float8_e4m3fn
    )
    engine = Engine(model, placement, BLOCK_SIZE)
    reply = warm_up(engine, request(), memory_fraction=0.5, layout=None)
    assert reply.block_bytes == 256 // 4
    assert reply.num_blocks == (50_000 - 20_000 - 2_500) // 64


@pytest.mark.usefixtures("small")
def test_warm_up_that_does_not_fit_names_settings_values_that_fit_and_what_takes_the_memory(
    model: TableModel,
) -> None:
    engine = small_engine(model, 20_000, 6_000)
    with pytest.raises(DeviceError) as error:
        warm_up(engine, request(), memory_fraction=1.0, layout=None)
    message = str(error.value)
    for part in ("64 prompt tokens", "image tiles", "4 sequences", "image features", "NUM_SHARD"):
        assert part in message
    assert "MAX_TOTAL_TOKENS=200" in message
    fitting = int(message.split("MAX_BATCH_PREFILL_TOKENS=")[1].split(",")[0])
    assert 6_000 * fitting / 64 <= 20_000 - 1_000 - 64 * 256
    # The values it names do fit.
    warm_up(small_engine(model, 20_000, 6_000), request(max_context_len=200), 1.0, None)


@pytest.mark.usefixtures("small")
def test_a_step_that_runs_out_of_memory_while_it_is_tried_names_one_that_does_not(
    model: TableModel,
) -> None:
    model.room = 20  # of the 64 tokens
    with pytest.raises(DeviceError, match=r"MAX_BATCH_PREFILL_TOKENS=64 .*TOKENS=16.*NUM_SHARD"):
        warm_up(small_engine(model, 100_000, 20_000), request(), 1.0, None)
    warm_up(small_engine(model, 100_000, 20_000), request(max_step_tokens=16), 1.0, None)


def test_a_sampler_that_fails_for_one_sequence_fails_it_alone(
    engine: Engine, model: TableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fragile(logits_RV: Tensor, rows: list[SampleRow], *more: Any) -> Choice:
        if len(rows) > 2:
            raise torch.OutOfMemoryError("no room")
        if any(row.params.seed == 1 for row in rows):
            raise ValueError("a seed that the sampler cannot take")
        return choose(logits_RV, rows, *more)

    monkeypatch.setattr("tessera.shard.token_choice.choose", fragile)
    seeds = {0: 5, 1: 1, 2: 7}
    params = {n: shard_pb2.SamplingParams(seed=seed) for n, seed in seeds.items()}
    reply = engine.run(shard_pb2.Step(chunks=[chunk(n, [4], sampling=params[n]) for n in params]))
    likeliest = int(model.table_VV[4].argmax())
    assert tokens(reply) == {0: likeliest, 2: likeliest}
    assert [failure.sequence_id for failure in reply.failures] == [1]


GUIDED = shard_pb2.SamplingParams(guided=True)


def test_a_guided_sequence_samples_what_its_mask_allows(engine: Engine, model: TableModel) -> None:
    engine.masks.put(0, {1: (1 << 30).to_bytes(4, "little")})
    step = shard_pb2.Step(chunks=[chunk(1, [5, 6], sampling=GUIDED), chunk(0, [6])])
    assert tokens(engine.run(step)) == {1: 30, 0: int(model.table_VV[6].argmax())}


def test_the_forward_pass_does_not_wait_for_masks(engine: Engine, model: TableModel) -> None:
    def tell() -> None:
        deadline = time.monotonic() + 20
        while not model.layouts and time.monotonic() < deadline:
            time.sleep(0.01)
        engine.masks.put(0, {1: (1 << 30).to_bytes(4, "little")})

    teller = threading.Thread(target=tell)
    teller.start()
    reply = engine.run(shard_pb2.Step(chunks=[chunk(1, [5, 6], sampling=GUIDED)]))
    teller.join()
    assert tokens(reply) == {1: 30}


def test_a_released_row_samples_anything(engine: Engine, model: TableModel) -> None:
    engine.masks.put(0, {1: b""})
    reply = engine.run(shard_pb2.Step(chunks=[chunk(1, [5, 6], sampling=GUIDED)]))
    assert tokens(reply) == {1: int(model.table_VV[6].argmax())}


def test_a_guided_sequence_without_a_mask_fails_alone(engine: Engine) -> None:
    engine.masks.close()
    step = shard_pb2.Step(chunks=[chunk(1, [5, 6], sampling=GUIDED), chunk(0, [6])])
    reply = engine.run(step)
    assert list(tokens(reply)) == [0]
    assert [failure.sequence_id for failure in reply.failures] == [1]
    assert "which tokens may follow" in reply.failures[0].message
