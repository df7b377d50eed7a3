"""config.json as frozen values, with the defaults that the hub's files leave out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tessera.proto.image_layout import ImageLayout, ImageLayoutError, layout_from_config
from tessera.shard.errors import CheckpointError
from tessera.shard.layers.attention import AttentionShape
from tessera.shard.layers.rotary import Rotary

CLIP_L14_336: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""What an absent vision_config means (transformers 5.23, `sub_configs_defaults`)."""

CLIP_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""What a key absent from vision_config means (transformers 5.23, `CLIPVisionConfig`)."""


@dataclass(frozen=True, slots=True)
class TextConfig:
    """A llama-like decoder."""

    vocab_size: int
    width: int
    inner: int  # width of the feed-forward block
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    rms_eps: float
    act: str
    rotary: Rotary
    window: int | None  # positions a token can see; None: all before it
    attention_bias: bool
    mlp_bias: bool
    tied: bool  # the head's weight is the embedding's

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> "TextConfig":
        """Read a text model's configuration.

        Args:
            defaults: the values of absent keys. Only models whose defaults name `sliding_window`,
                `attention_bias` or `mlp_bias` have such a thing; others' configurations may carry
                the key and it means nothing.

        Raises:
            CheckpointError: names the key that is unusable.
        """
        values = {**defaults, **{k: v for k, v in config.items() if k in defaults}}
        width, num_heads = _count(values, "hidden_size"), _count(values, "num_attention_heads")
        if values["head_dim"] is None and width % num_heads:
            raise CheckpointError(
                f"hidden_size={width} is not a multiple of num_attention_heads={num_heads}"
            )
        head_size = _count(values, "head_dim", width // num_heads)
        num_kv_heads = _count(values, "num_key_value_heads", num_heads)
        if head_size % 2:
            raise CheckpointError(f"head size {head_size} is odd, which rotation cannot use")
        if num_heads % num_kv_heads:
            raise CheckpointError(
                f"num_attention_heads={num_heads} is not a multiple of "
                f"num_key_value_heads={num_kv_heads}"
            )
        return cls(
            vocab_size=_count(values, "vocab_size"),
            width=width,
            inner=_count(values, "intermediate_size"),
            num_layers=_count(values, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            rms_eps=_positive(values, "rms_norm_eps"),
            act=values["hidden_act"],
            rotary=Rotary.from_dict({**defaults, **config}),
            window=_window(values),
            attention_bias=bool(values.get("attention_bias")),
            mlp_bias=bool(values.get("mlp_bias")),
            tied=bool(values["tie_word_embeddings"]),
        )

    @property
    def attention(self) -> AttentionShape:
        """Sizes of the attention of one layer."""
        return AttentionShape(
            self.width,
            self.num_heads,
            self.num_kv_heads,
            self.head_size,
            self.attention_bias,
            self.window,
        )


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """A CLIP vision tower."""

    width: int
    inner: int
    num_layers: int
    num_heads: int
    tile: int  # side of the input, pixels
    patch: int  # side of a patch, pixels
    act: str
    eps: float

    @classmethod
    def from_dict(cls, config: Mapping[str, Any] | None) -> "VisionConfig":
        """Read a `vision_config`; None or empty means CLIP-L/14@336.

        Raises:
            CheckpointError: it is no CLIP tower, or names the key that is unusable.
        """
        kind = (config or {}).get("model_type", "clip_vision_model")
        if kind != "clip_vision_model":
            raise CheckpointError(
                f"vision_config.model_type={kind!r} is not supported, only 'clip_vision_model'"
            )
        values = {**CLIP_DEFAULTS, **(config or CLIP_L14_336)}
        width, num_heads = _count(values, "hidden_size"), _count(values, "num_attention_heads")
        if width % num_heads:
            raise CheckpointError(
                f"vision_config.hidden_size={width} is not a multiple of "
                f"num_attention_heads={num_heads}"
            )
        if values.get("num_channels", 3) != 3:
            raise CheckpointError(f"vision_config.num_channels={values['num_channels']} must be 3")
        return cls(
            width=width,
            inner=_count(values, "intermediate_size"),
            num_layers=_count(values, "num_hidden_layers"),
            num_heads=num_heads,
            tile=_count(values, "image_size"),
            patch=_count(values, "patch_size"),
            act=values["hidden_act"],
            eps=_positive(values, "layer_norm_eps"),
        )


@dataclass(frozen=True, slots=True)
class LlavaConfig:
    """LLaVA-1.5 or LLaVA-NeXT: how a vision tower's features become prompt tokens."""

    text: Mapping[str, Any]  # the text model's own configuration, `model_type` included
    vision: VisionConfig
    layout: ImageLayout
    feature_layers: tuple[int, ...]  # numbers of layers run before each feature is taken
    projector_act: str
    projector_bias: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "LlavaConfig":
        """Read a config.json of model_type `llava` or `llava_next`.

        Raises:
            CheckpointError: names the key that is unusable.
        """
        try:
            layout = layout_from_config(config)
        except ImageLayoutError as error:
            raise CheckpointError(str(error)) from None
        if layout is None:
            raise CheckpointError(f"model_type={config.get('model_type')!r} has no image layout")
        vision = VisionConfig.from_dict(config.get("vision_config"))
        layers = config.get("vision_feature_layer", -2)
        return cls(
            text=_text_config(config),
            vision=vision,
            layout=layout,
            feature_layers=_feature_layers(layers, vision.num_layers),
            projector_act=config.get("projector_hidden_act", "gelu"),
            projector_bias=bool(config.get("multimodal_projector_bias", True)),
        )


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's configuration; whether the head is tied is said at the top level.

    Source: transformers 5.23, `LlavaConfig.__post_init__`, listens to the text model's as well.
    """
    text = config.get("text_config") or {}
    if not isinstance(text, Mapping):
        raise CheckpointError(f"text_config={text!r} in config.json must be an object")
    text = dict(text)
    text.setdefault("model_type", "llama")
    tied = bool(config.get("tie_word_embeddings", False))
    if config.get("model_type") == "llava":
        tied = tied or bool(text.get("tie_word_embeddings", False))
    return text | {"tie_word_embeddings": tied}


def _feature_layers(layers: Any, num_layers: int) -> tuple[int, ...]:
    """Indices into the states before and after each layer, 0 to `num_layers`.

    Source: transformers 5.23, `hidden_states[vision_feature_layer]`, which has num_layers + 1
    entries; a list is concatenated in its order.
    """
    chosen = layers if isinstance(layers, list | tuple) else [layers]
    valid = [isinstance(i, int) and -num_layers - 1 <= i <= num_layers for i in chosen]
    if not chosen or not all(valid):
        raise CheckpointError(
            f"vision_feature_layer={layers!r} must be between {-num_layers - 1} and {num_layers}"
        )
    return tuple(i % (num_layers + 1) for i in chosen)


def _window(values: Mapping[str, Any]) -> int | None:
    if values.get("sliding_window") is None:
        return None
    return _count(values, "sliding_window")


def _positive(values: Mapping[str, Any], key: str) -> float:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CheckpointError(f"{key}={value!r} in config.json must be a number above 0")
    return float(value)


def _count(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number above zero; `default` stands for a JSON null."""
    value = default if values.get(key) is None else values[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{key}={value!r} in config.json must be a whole number above 0")
    return value
