"""What the server says about itself."""

from dataclasses import dataclass

from typing_extensions import TypedDict

from tessera.router.errors import NotReadyError
from tessera.router.generation import Generator, ServingLimits
from tessera.router.model_files import PipelineTag
from tessera.router.settings import RouterSettings


class Info(TypedDict):
    """The model and the limits. Null: not known, or not before the warm-up is done."""

    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int | None
    max_total_tokens: int | None
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None
    model_dtype: str | None  # this and what follows: text-generation-inference 2 had most of them
    model_device_type: str | None
    waiting_served_ratio: float
    max_batch_prefill_tokens: int | None
    max_batch_total_tokens: int | None
    max_waiting_tokens: int
    max_batch_size: int | None
    num_shard: int | None
    quantize: str | None  # int8, int4, awq or gptq
    kv_cache_dtype: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """Facts that do not change while the server runs."""

    settings: RouterSettings
    model_name: str  # what replies carry as `model`
    model_sha: str | None  # of the checkpoint, where it came from the hub
    pipeline_tag: PipelineTag  # the hub's name for what the model does
    version: str
    started_at: int  # Unix time, seconds

    @property
    def default_full_text(self) -> bool:
        """Whether POST / repeats the prompt when the client does not say."""
        return self.pipeline_tag == "text-generation"

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: changes when the software does."""
        return f"{self.version}-native"

    def compute_type(self, generator: Generator) -> str:
        """The `x-compute-type` header, e.g. `2-nvidia-h200`."""
        limits = generator.limits
        return f"{limits.num_shard}-{limits.device or 'cpu'}"

    def as_json(self, generator: Generator) -> Info:
        """The body of GET /info: the keys of text-generation-inference 3, and those 2 had."""
        settings = self.settings
        limits = _limits(generator)
        return {
            "model_id": self.model_name,
            "model_sha": self.model_sha,
            "model_pipeline_tag": self.pipeline_tag,
            "max_concurrent_requests": settings.max_concurrent_requests,
            "max_best_of": settings.max_best_of,
            "max_stop_sequences": settings.max_stop_sequences,
            "max_input_tokens": limits.max_input_tokens if limits else None,
            "max_total_tokens": limits.max_total_tokens if limits else None,
            "validation_workers": settings.validation_workers,
            "max_client_batch_size": settings.max_client_batch_size,
            "router": "tessera-router",
            "version": self.version,
            "sha": None,
            "docker_label": None,
            "model_dtype": limits.dtype if limits else None,
            "model_device_type": limits.device if limits else None,
            "waiting_served_ratio": settings.waiting_served_ratio,
            "max_batch_prefill_tokens": limits.max_batch_prefill_tokens if limits else None,
            "max_batch_total_tokens": limits.max_batch_total_tokens if limits else None,
            "max_waiting_tokens": settings.max_waiting_tokens,
            "max_batch_size": limits.max_batch_size if limits else None,
            "num_shard": limits.num_shard if limits else None,
            "quantize": limits.quantization or None if limits else None,
            "kv_cache_dtype": limits.cache_dtype or None if limits else None,
        }


def _limits(generator: Generator) -> ServingLimits | None:
    """What the warm-up found out; None until then."""
    try:
        return generator.limits
    except NotReadyError:
        return None
