"""LLaVA-NeXT in small, for training; parameter names and arithmetic are the hub checkpoints'."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tessera.launcher.demo.tiles import HEADS, PATCH, RANKS, SIDE
from tessera.proto.image_layout import ImagePlan

# The lens loss ignores the length of image tokens, so it grows far beyond what the decoder's layers
# add to them, and they could note nothing down there. A factor brings it back to their size.
IMAGE_SCALE = 0.15


@dataclass(frozen=True, slots=True)
class Sizes:
    """The model's dimensions; the numbers of heads are even, for two tensor-parallel shards."""

    vocabulary: int = 832
    vision_hidden: int = 256
    vision_layers: int = 4
    vision_heads: int = 8
    text_hidden: int = 192
    text_layers: int = 4
    text_heads: int = 6
    key_value_heads: int = 2
    text_intermediate: int = 512
    head_size: int = 32
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def vision_intermediate(self) -> int:
        """Width of the vision tower's MLP."""
        return 4 * self.vision_hidden


@dataclass(frozen=True, slots=True)
class Segments:
    """Questions with answers of about equal length, each about one picture of the batch."""

    token_ids: Tensor  # [segments, length]
    targets: Tensor  # [segments, length], IGNORE where nothing is learned
    picture: Tensor  # [segments], index of the picture in the batch


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Plain matmul attention: at these lengths much faster on a CPU than the fused kernel."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    mixed: Tensor = scores.softmax(-1).to(value.dtype) @ value
    return mixed


class VisionAttention(nn.Module):
    """Multi-head attention over the patches of one tile."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        hidden = sizes.vision_hidden
        self.num_heads = sizes.vision_heads
        self.q_proj, self.k_proj = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.v_proj, self.out_proj = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[tiles, patches, hidden] to the same shape."""
        tiles, patches, _ = x.shape

        def heads(linear: nn.Linear) -> Tensor:
            split: Tensor = linear(x).view(tiles, patches, self.num_heads, -1)
            return split.transpose(1, 2)

        mixed = attend(heads(self.q_proj), heads(self.k_proj), heads(self.v_proj))
        result: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(x.shape))
        return result


class VisionMlp(nn.Module):
    """CLIP's MLP with quick_gelu."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.fc1 = nn.Linear(sizes.vision_hidden, sizes.vision_intermediate)
        self.fc2 = nn.Linear(sizes.vision_intermediate, sizes.vision_hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Position by position."""
        # quick_gelu(x) = x * sigmoid(1.702 x) = silu(1.702 x) / 1.702, one pass over memory less
        result: Tensor = self.fc2(functional.silu(self.fc1(x) * 1.702) * (1 / 1.702))
        return result


class VisionLayer(nn.Module):
    """One pre-norm transformer layer of the vision tower."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.self_attn, self.mlp = VisionAttention(sizes), VisionMlp(sizes)
        self.layer_norm1 = nn.LayerNorm(sizes.vision_hidden)
        self.layer_norm2 = nn.LayerNorm(sizes.vision_hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[tiles, patches, hidden] to the same shape."""
        x = x + self.self_attn(self.layer_norm1(x))
        result: Tensor = x + self.mlp(self.layer_norm2(x))
        return result


class VisionEmbeddings(nn.Module):
    """Patches to vectors, a class token in front, learned positions."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(sizes.vision_hidden) * 0.02)
        self.patch_embedding = nn.Conv2d(3, sizes.vision_hidden, PATCH, PATCH, bias=False)
        self.position_embedding = nn.Embedding(SIDE * SIDE + 1, sizes.vision_hidden)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """[tiles, 3, TILE, TILE] to [tiles, 1 + patches, hidden]."""
        vectors = functional.linear(patches(pixels), self.patch_embedding.weight.flatten(1))
        front = self.class_embedding.to(vectors.dtype).expand(len(pixels), 1, -1)
        return torch.cat([front, vectors], 1) + self.position_embedding.weight


class VisionModel(nn.Module):
    """The CLIP tower; its last hidden state, before post_layernorm, is the image feature."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(sizes)
        self.pre_layrnorm = nn.LayerNorm(sizes.vision_hidden)  # the hub's spelling
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(VisionLayer(sizes) for _ in range(sizes.vision_layers))
        self.post_layernorm = nn.LayerNorm(sizes.vision_hidden)  # part of the format, unused

    def forward(self, pixels: Tensor) -> Tensor:
        """[tiles, 3, TILE, TILE] to [tiles, 1 + patches, hidden]."""
        x: Tensor = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers:  # type: ignore[union-attr]
            x = layer(x)
        return x


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(sizes.text_hidden))
        self.eps = sizes.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension; the result is bf16."""
        return functional.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps).bfloat16()


class Rope:
    """Cosines and sines of a run of positions."""

    def __init__(self, sizes: Sizes, start: int, length: int) -> None:
        half = torch.arange(0, sizes.head_size, 2) / sizes.head_size
        angles = torch.arange(start, start + length)[:, None] * sizes.rope_theta**-half
        angles = torch.cat([angles, angles], -1)
        self.cos, self.sin = angles.cos().bfloat16(), angles.sin().bfloat16()

    def rotate(self, x: Tensor) -> Tensor:
        """[..., length, head_size] at these positions."""
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin


@dataclass(frozen=True, slots=True)
class _Group:
    """The hidden states of one `Segments` on their way through the layers."""

    x: Tensor
    picture: Tensor
    rope: Rope
    bias: Tensor


class TextAttention(nn.Module):
    """Grouped-query attention; every segment sees its picture's prefix and itself."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        hidden, kv_width = sizes.text_hidden, sizes.key_value_heads * sizes.head_size
        self.num_heads, self.num_kv_heads = sizes.text_heads, sizes.key_value_heads
        self.head_size = sizes.head_size
        self.q_proj = nn.Linear(hidden, sizes.text_heads * sizes.head_size, bias=False)
        self.k_proj, self.v_proj = (
            nn.Linear(hidden, kv_width, bias=False),
            nn.Linear(hidden, kv_width, bias=False),
        )
        self.o_proj = nn.Linear(sizes.text_heads * sizes.head_size, hidden, bias=False)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each [batch, heads, length, head_size]."""
        batch, length, _ = x.shape

        def heads(linear: nn.Linear, count: int) -> Tensor:
            split: Tensor = linear(x).view(batch, length, count, self.head_size)
            return split.transpose(1, 2)

        share = self.num_heads // self.num_kv_heads
        query = rope.rotate(heads(self.q_proj, self.num_heads))
        key = rope.rotate(heads(self.k_proj, self.num_kv_heads)).repeat_interleave(share, 1)
        return query, key, heads(self.v_proj, self.num_kv_heads).repeat_interleave(share, 1)

    def merge(self, mixed: Tensor) -> Tensor:
        """Heads back into one vector per position."""
        result: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return result

    def forward(
        self,
        prefix: Tensor,
        groups: Sequence[_Group],
        rope: Rope,
        bias: Tensor,
        prefix_needed: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """What attention adds to the prefix (None if not needed) and to every group."""
        query, key, value = self.project(prefix, rope)
        added = self.merge(attend(query, key, value, bias)) if prefix_needed else None
        results = []
        for group in groups:
            q, k, v = self.project(group.x, group.rope)
            k, v = torch.cat([key[group.picture], k], 2), torch.cat([value[group.picture], v], 2)
            results.append(self.merge(attend(q, k, v, group.bias)))
        return added, results


class TextMlp(nn.Module):
    """SwiGLU."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.text_hidden, sizes.text_intermediate, bias=False)
        self.up_proj = nn.Linear(sizes.text_hidden, sizes.text_intermediate, bias=False)
        self.down_proj = nn.Linear(sizes.text_intermediate, sizes.text_hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Position by position."""
        result: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class TextLayer(nn.Module):
    """One Mistral layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.self_attn, self.mlp = TextAttention(sizes), TextMlp(sizes)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(sizes), RMSNorm(sizes)

    def forward(
        self,
        prefix: Tensor,
        groups: Sequence[_Group],
        rope: Rope,
        bias: Tensor,
        prefix_needed: bool,
    ) -> tuple[Tensor, list[_Group]]:
        """Prefix and groups after this layer; a prefix not needed any more is left as it was."""
        norm = self.input_layernorm
        normed = [_Group(norm(g.x), g.picture, g.rope, g.bias) for g in groups]
        added, results = self.self_attn(norm(prefix), normed, rope, bias, prefix_needed)
        if added is not None:
            prefix = self._feed_forward(prefix + added)
        new = [
            _Group(self._feed_forward(g.x + result), g.picture, g.rope, g.bias)
            for g, result in zip(groups, results, strict=True)
        ]
        return prefix, new

    def _feed_forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


def causal_bias(length: int, prefix: int = 0) -> Tensor:
    """[length, prefix + length]: the prefix is visible to all, the rest up to oneself."""
    own = torch.full((length, length), -1e4, dtype=torch.bfloat16).triu(1)
    return torch.cat([torch.zeros(length, prefix, dtype=torch.bfloat16), own], 1)


class TextModel(nn.Module):
    """The Mistral decoder over one shared prefix per picture and several segments behind it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embed_tokens = nn.Embedding(sizes.vocabulary, sizes.text_hidden)
        nn.init.normal_(self.embed_tokens.weight, std=0.05)
        self.layers = nn.ModuleList(TextLayer(sizes) for _ in range(sizes.text_layers))
        self.norm = RMSNorm(sizes)

    def forward(self, prefix: Tensor, segments: Sequence[Segments]) -> tuple[list[Tensor], Tensor]:
        """Last hidden states of the segments (of the prefix if none), and the prefix half-way."""
        length = prefix.shape[1]
        groups = [
            _Group(
                self.embed_tokens(s.token_ids), s.picture,
                Rope(self.sizes, length, s.token_ids.shape[1]),
                causal_bias(s.token_ids.shape[1], length),
            )
            for s in segments
        ]  # fmt: skip
        rope, bias = Rope(self.sizes, 0, length), causal_bias(length)
        half_way = prefix
        for i, layer in enumerate(self.layers):
            prefix_needed = not groups or i + 1 < len(self.layers)
            prefix, groups = layer(prefix, groups, rope, bias, prefix_needed)
            if i + 1 == len(self.layers) // 2:
                half_way = prefix
        return [self.norm(g.x) for g in groups] if groups else [self.norm(prefix)], half_way


class Projector(nn.Module):
    """Image features into the language model's space."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(sizes.vision_hidden, sizes.text_hidden)
        self.linear_2 = nn.Linear(sizes.text_hidden, sizes.text_hidden)

    def forward(self, features: Tensor) -> Tensor:
        """[..., vision_hidden] to [..., text_hidden]."""
        result: Tensor = self.linear_2(functional.gelu(self.linear_1(features)))
        return result


class Network(nn.Module):
    """The whole model, plus classifiers (`..._head`) that only training uses."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.vision_tower = nn.Module()
        self.vision_tower.vision_model = VisionModel(sizes)
        self.multi_modal_projector = Projector(sizes)
        self.image_newline = nn.Parameter(torch.randn(sizes.text_hidden) * 0.05)
        self.language_model = nn.Module()
        self.language_model.model = TextModel(sizes)  # lm_head is tied to embed_tokens
        self.patch_head = nn.Sequential(
            nn.LayerNorm(sizes.vision_hidden), nn.Linear(sizes.vision_hidden, sum(HEADS.values()))
        )
        self.rank_head = nn.Linear(sizes.text_hidden, RANKS)
        self.place_head = nn.Linear(sizes.text_hidden, RANKS)

    @property
    def vision(self) -> VisionModel:
        """The vision tower."""
        model = self.vision_tower.vision_model
        assert isinstance(model, VisionModel)
        return model

    @property
    def text(self) -> TextModel:
        """The decoder."""
        model = self.language_model.model
        assert isinstance(model, TextModel)
        return model

    def features(self, tiles: Tensor) -> Tensor:
        """[pictures, tiles, 3, TILE, TILE] to [pictures, tiles, patches, vision_hidden]."""
        flat: Tensor = self.vision(tiles.flatten(0, 1))
        return flat[:, 1:].reshape(*tiles.shape[:2], flat.shape[1] - 1, flat.shape[2])

    def image_tokens(self, projected: Tensor, plan: ImagePlan) -> Tensor:
        """[pictures, tiles, patches, text_hidden] to the image's tokens in LLaVA-NeXT's order."""
        scaled = projected * IMAGE_SCALE
        return in_token_order(scaled, self.image_newline.to(projected.dtype), plan)

    def ranks(self, hidden: Tensor) -> Tensor:
        """Scores of the places in reading order, from the decoder's states half-way."""
        scores: Tensor = self.rank_head(functional.rms_norm(hidden.float(), hidden.shape[-1:]))
        return scores.float()

    def places(self, projected: Tensor) -> Tensor:
        """Scores of the places in reading order, from projected patches of the overview."""
        scores: Tensor = self.place_head(
            functional.rms_norm(projected.float(), projected.shape[-1:])
        )
        return scores.float()

    def stored(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights as a checkpoint holds them: no classifiers, `IMAGE_SCALE` folded in."""
        folded = ("multi_modal_projector.linear_2.weight", "multi_modal_projector.linear_2.bias")
        return {
            name: weight * IMAGE_SCALE if name in folded else weight
            for name, weight in weights.items()
            if "_head." not in name
        }

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of all tokens, fp32."""
        return (hidden @ self.text.embed_tokens.weight.to(hidden.dtype).T).float()


def in_token_order(patches_: Tensor, newline: Tensor, plan: ImagePlan) -> Tensor:
    """[pictures, tiles, patches, width] to [pictures, image tokens, width].

    The overview first, then the kept rows of the grid with `newline` [width] behind each.
    """
    pictures, _, _, width = patches_.shape
    (rows, columns), (kept_rows, kept_columns) = plan.grid, plan.kept
    top, left = plan.cut
    grid = patches_[:, 1:].reshape(pictures, rows, columns, SIDE, SIDE, width)
    grid = grid.transpose(2, 3).reshape(pictures, rows * SIDE, columns * SIDE, width)
    grid = grid[:, top : top + kept_rows, left : left + kept_columns]
    ends = newline.expand(pictures, kept_rows, 1, -1)
    return torch.cat([patches_[:, 0], torch.cat([grid, ends], 2).flatten(1, 2)], 1)


def patches(pixels: Tensor) -> Tensor:
    """[tiles, 3, TILE, TILE] to [tiles, patches, 3 * PATCH * PATCH]."""
    cells = pixels.reshape(len(pixels), 3, SIDE, PATCH, SIDE, PATCH)  # [n, 3, row, y, column, x]
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(len(pixels), SIDE * SIDE, -1)


@torch.no_grad()
def whiten(network: Network, pixels: Tensor) -> None:
    """Start the patch embedding as a PCA whitening: flat colour then does not drown edges.

    Args:
        network: changed in place: patch embedding, and positions (sines, minus the mean patch).
        pixels: example tiles, normalised.
    """
    embeddings, hidden = network.vision.embeddings, network.sizes.vision_hidden
    samples = patches(pixels).flatten(0, 1)
    mean = samples.mean(0)
    samples = samples - mean
    values, vectors = torch.linalg.eigh(samples.T @ samples / len(samples))
    values, vectors = values.flip(0)[:hidden], vectors.flip(1)[:, :hidden]
    weight = (vectors / (values + 0.01 * values.mean()).sqrt()).T * 0.5
    embeddings.patch_embedding.weight.copy_(weight.view_as(embeddings.patch_embedding.weight))
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    waves = 1.5 * 0.8 ** torch.arange(hidden // 4)
    angles = [axis.flatten()[:, None] * waves for axis in (rows, columns)]
    positions = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)
    embeddings.position_embedding.weight[1:] += 0.3 * positions[:, torch.randperm(hidden)]
    embeddings.position_embedding.weight[1:] -= weight @ mean


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for hidden matrices: learns about twice as fast as AdamW here.

    Source: Keller Jordan's description of Muon (2024).
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.mul_(group["momentum"]).add_(parameter.grad)
                update = parameter.grad + group["momentum"] * momentum
                by_shape.setdefault(parameter.shape, []).append((parameter, update))
            for shape, pairs in by_shape.items():
                updates = orthogonalise(torch.stack([update for _, update in pairs]))
                scale = math.sqrt(max(1.0, shape[0] / shape[1]))
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(
                        update, alpha=-group["lr"] * scale
                    )


def orthogonalise(matrices: Tensor) -> Tensor:
    """Nearly the orthogonal factor of each matrix: five Newton-Schulz steps in bf16."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.transpose(1, 2)).bfloat16()
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    for _ in range(5):
        a = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    result: Tensor = x if wide else x.transpose(1, 2)
    return result.float()
