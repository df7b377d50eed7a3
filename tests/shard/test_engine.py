"""Steps through the engine over a model that is a table: the next token depends on the last only."""

import pytest
import torch
from torch import Tensor

from tessera.proto import shard_pb2
from tessera.shard.backends import load_backend
from tessera.shard.backends.base import LayerCache, StepLayout
from tessera.shard.engine import Engine
from tessera.shard.errors import DeviceError, DivergenceError
from tessera.shard.models.base import ImageTiles, Placement
from tessera.shard.parallel import Group
from tessera.shard.warmup import warm_up

VOCABULARY = 32
BLOCK_SIZE = 4
POISON = 13  # a token after which the model's output is NaN
IMAGE_TOKEN = 31


class TableModel:
    """Logits of a token are its row of a table; a picture's features are one-hot rows."""

    num_layers, num_kv_heads, head_size = 1, 1, 8
    vocab_size, max_positions = VOCABULARY, 1000

    def __init__(self) -> None:
        self.table_VV = torch.randn(
            VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(3)
        )
        self.layouts: list[StepLayout] = []

    def embed(self, ids_T: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(ids_T, VOCABULARY).float()

    def encode_images(self, images: list[ImageTiles]) -> list[Tensor]:
        # Feature k of a picture looks like the token with the value of the first pixel plus k.
        return [self.embed(torch.arange(6) + int(image.tiles[0, 0, 0, 0])) for image in images]

    def forward(self, x_TD: Tensor, caches: list[LayerCache], layout: StepLayout) -> Tensor:
        self.layouts.append(layout)
        hidden_TD = x_TD @ self.table_VV
        hidden_TD[x_TD.argmax(-1) == POISON] = float("nan")
        return hidden_TD

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return hidden_RD


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
    blocks = range(10 * sequence_id + already, 10 * sequence_id - (-end // BLOCK_SIZE))
    sampling = extra.pop("sampling", shard_pb2.SamplingParams())
    return shard_pb2.Chunk(
        sequence_id=sequence_id,
        first_position=first,
        token_ids=ids,
        new_block_ids=blocks,
        is_last=is_last,
        sampling=sampling,  # type: ignore[arg-type]
        num_prompt_tokens=end,
        **extra,  # type: ignore[arg-type]
    )


def tokens(reply: shard_pb2.StepReply) -> dict[int, int]:
    return {token.sequence_id: token.token_id for token in reply.tokens}


def test_decode_goes_on_from_the_token_sampled_last(engine: Engine, model: TableModel) -> None:
    first = tokens(engine.run(shard_pb2.Step(chunks=[chunk(1, [5, 6])])))[1]
    assert first == int(model.table_VV[6].argmax())
    row = shard_pb2.DecodeRow(sequence_id=1, context_len=3)
    assert tokens(engine.run(shard_pb2.Step(decodes=[row])))[1] == int(
        model.table_VV[first].argmax()
    )


def test_a_token_the_router_names_wins_over_the_one_sampled_last(
    engine: Engine, model: TableModel
) -> None:
    engine.run(shard_pb2.Step(chunks=[chunk(1, [5, 6])]))
    row = shard_pb2.DecodeRow(sequence_id=1, context_len=3, token_id=9)
    assert tokens(engine.run(shard_pb2.Step(decodes=[row])))[1] == int(model.table_VV[9].argmax())


def test_layout_of_a_mixed_step(engine: Engine, model: TableModel) -> None:
    engine.run(shard_pb2.Step(chunks=[chunk(1, [1, 2, 3])]))
    row = shard_pb2.DecodeRow(sequence_id=1, context_len=4)
    engine.run(shard_pb2.Step(decodes=[row], chunks=[chunk(0, [7] * 6, is_last=False)]))
    row = shard_pb2.DecodeRow(sequence_id=1, context_len=5, new_block_ids=[17])
    engine.run(shard_pb2.Step(decodes=[row], chunks=[chunk(0, [8] * 5, 6)]))
    layout = model.layouts[-1]
    assert layout.positions_T.tolist() == [4, 6, 7, 8, 9, 10]
    assert layout.query_start == (0, 1, 6) and layout.context_lens == (5, 11)
    assert layout.block_tables_SM.tolist() == [[10, 17, 0], [0, 1, 2]]
    assert layout.slots_T.tolist() == [17 * 4, 1 * 4 + 2, 1 * 4 + 3, 8, 9, 10]
    assert layout.max_query_len == 5


def test_nan_fails_its_own_sequence_only(engine: Engine, model: TableModel) -> None:
    reply = engine.run(shard_pb2.Step(chunks=[chunk(0, [POISON]), chunk(1, [4])]))
    assert tokens(reply) == {1: int(model.table_VV[4].argmax())}
    assert [failure.sequence_id for failure in reply.failures] == [0]
    assert "not finite" in reply.failures[0].message


def image_step(content_hash: bytes, *, with_pixels: bool) -> shard_pb2.Step:
    tiles = torch.full((1, 2, 2, 3), 7, dtype=torch.uint8).numpy().tobytes()
    image = shard_pb2.Image(content_hash=content_hash, height=2, width=2, num_tiles=1, tiles=tiles)
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
    assert not reply.tokens


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
        shard_pb2.Step(decodes=[shard_pb2.DecodeRow(sequence_id=5, context_len=3)]),
        shard_pb2.Step(chunks=[chunk(0, [1], first=4, sampling=None)]),
    ],
)
def test_a_step_about_an_unknown_sequence_is_a_divergence(
    engine: Engine, step: shard_pb2.Step
) -> None:
    with pytest.raises(DivergenceError, match="no such sequence"):
        engine.run(step)


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


def test_warm_up_that_does_not_fit_names_settings_and_a_value_that_fits(engine: Engine) -> None:
    with pytest.raises(DeviceError, match=r"Set MAX_TOTAL_TOKENS to at most 40,.*NUM_SHARD"):
        warm_up(engine, request(max_blocks=10), memory_fraction=1.0, layout=None)
