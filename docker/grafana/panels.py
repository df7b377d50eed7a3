"""What the dashboard shows: its charts and their queries."""

from dataclasses import dataclass

CHOSEN = 'instance=~"$instance"'
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True)
class Panel:
    """A chart over time."""

    title: str
    unit: str  # one of Grafana's
    lines: dict[str, str]  # query by what the legend calls it
    meaning: str = ""


def rate(name: str, by: str = "") -> str:
    """What a counter gains per second."""
    return f"sum{f' by ({by})' if by else ''} (rate({name}{{{CHOSEN}}}[$__rate_interval]))"


def quantile(name: str, share: float, by: str = "") -> str:
    """Below it lies that share of a histogram's observations."""
    per_bucket = rate(f"{name}_bucket", f"le, {by}" if by else "le")
    return f"histogram_quantile({share}, {per_bucket})"


def quantiles(name: str) -> dict[str, str]:
    """The usual ones."""
    return {title: quantile(name, share) for title, share in QUANTILES.items()}


def mean(name: str, by: str) -> str:
    """Of a histogram's observations; nothing where there were none."""
    return f"{rate(f'{name}_sum', by)} / ({rate(f'{name}_count', by)} > 0)"


def ratio(part: str, whole: str) -> str:
    """The share of one counter in another; nothing where there is nothing."""
    return f"{rate(part)} / ({rate(whole)} > 0)"


def gauge(name: str, by: str = "instance") -> str:
    """A level."""
    return f"sum by ({by}) ({name}{{{CHOSEN}}})"


ROWS = {
    "Golden signals": [
        Panel(
            "Replies",
            "reqps",
            {
                "{{method}} {{route}} {{status}}": rate(
                    "tessera_http_requests_total", by="method, route, status"
                )
            },
            "HTTP replies by route and status; 499: the client left first.",
        ),
        Panel(
            "Requests",
            "reqps",
            {
                "asked": rate("tgi_request_count"),
                "completed": rate("tgi_request_success"),
                "{{err}}": rate("tgi_request_failure", by="err"),
            },
            "Generations asked for and completed, and HTTP requests that failed, by cause.",
        ),
        Panel(
            "Tokens",
            "short",
            {
                "prompt": rate("tessera_prompt_tokens_total"),
                "of them from the cache": rate("tessera_prompt_tokens_cached_total"),
                "generated": rate("tessera_generation_tokens_total"),
            },
            "Per second.",
        ),
        Panel(
            "Time to first token",
            "s",
            quantiles("tessera_time_to_first_token_seconds"),
            "From arrival, pictures included.",
        ),
        Panel("Time between tokens", "s", quantiles("tessera_inter_token_latency_seconds")),
        Panel("Whole request", "s", quantiles("tgi_request_duration")),
        Panel(
            "Where the time goes",
            "s",
            {
                "validation": quantile("tgi_request_validation_duration", 0.95),
                "queue": quantile("tessera_request_queue_time_seconds", 0.95),
                "prefill": quantile("tessera_request_prefill_time_seconds", 0.95),
                "decode": quantile("tessera_request_decode_time_seconds", 0.95),
            },
            "95 of 100 requests take less. Validation includes pictures.",
        ),
        Panel(
            "Waiting and running",
            "short",
            {
                "waiting {{instance}}": gauge("tessera_num_requests_waiting"),
                "running {{instance}}": gauge("tessera_num_requests_running"),
            },
        ),
        Panel(
            "Lengths",
            "short",
            {
                "prompt p50": quantile("tgi_request_input_length", 0.5),
                "prompt p95": quantile("tgi_request_input_length", 0.95),
                "answer p50": quantile("tgi_request_generated_tokens", 0.5),
                "answer p95": quantile("tgi_request_generated_tokens", 0.95),
            },
            "Tokens.",
        ),
    ],
    "Batching": [
        Panel(
            "Steps",
            "ops",
            {"{{kind}}": rate("tessera_step_duration_seconds_count", by="kind")},
            "Per second. mixed: prompts and decodes; release: nothing to compute.",
        ),
        Panel(
            "Step time",
            "s",
            {
                "{{kind}} p50": quantile("tessera_step_duration_seconds", 0.5, by="kind"),
                "{{kind}} p95": quantile("tessera_step_duration_seconds", 0.95, by="kind"),
            },
        ),
        Panel(
            "Tokens per step",
            "short",
            {"{{method}}": mean("tessera_step_tokens", by="method")},
            "Mean. prefill: any step with a prompt in it.",
        ),
        Panel(
            "Inside a step",
            "s",
            {
                "forward {{method}}": quantile("tgi_batch_forward_duration", 0.5, by="method"),
                "sampling {{method}}": quantile("tgi_batch_decode_duration", 0.5, by="method"),
                "router {{method}}": quantile("tgi_batch_filter_duration", 0.5, by="method"),
                "planning with newcomers": quantile("tgi_batch_concat_duration", 0.5),
            },
            "Medians.",
        ),
        Panel(
            "Joining the batch",
            "short",
            {"steps": rate("tgi_batch_concat"), "sequences": rate("tgi_batch_next_size_sum")},
            "Per second: steps with which sequences join others, and sequences that start.",
        ),
        Panel(
            "Device time in use",
            "percentunit",
            {"busy": rate("tessera_step_duration_seconds_sum")},
            "Share of the time in which the shards have a step.",
        ),
    ],
    "KV cache": [
        Panel(
            "Use",
            "percentunit",
            {"{{instance}}": f"max by (instance) (tessera_kv_cache_usage_perc{{{CHOSEN}}})"},
        ),
        Panel(
            "Tokens",
            "short",
            {
                "in use": gauge("tessera_kv_cache_used_tokens"),
                "kept for others": gauge("tessera_kv_cache_kept_tokens"),
                "all": gauge("tessera_kv_cache_tokens"),
            },
        ),
        Panel(
            "Preemptions",
            "ops",
            {"sequences": rate("tessera_num_preemptions_total")},
            "Work that is thrown away and done again.",
        ),
        Panel(
            "Prefix cache hits",
            "percentunit",
            {
                "tokens": ratio(
                    "tessera_prefix_cache_hits_total", "tessera_prefix_cache_queries_total"
                )
            },
        ),
    ],
    "Pictures": [
        Panel(
            "Before the shards",
            "s",
            {
                "fetching p95": quantile("tessera_image_fetch_seconds", 0.95),
                "decoding p95": quantile("tessera_image_decode_seconds", 0.95),
            },
        ),
        Panel("Encoding a step's pictures", "s", quantiles("tessera_image_encode_seconds")),
        Panel(
            "Vision cache",
            "ops",
            {
                "found": rate("tessera_vision_cache_hits_total"),
                "encoded": rate("tessera_vision_cache_misses_total"),
            },
            "Pictures per second.",
        ),
        Panel(
            "Features on the shards",
            "short",
            {"{{instance}}": gauge("tessera_vision_cache_tokens")},
            "Tokens.",
        ),
        Panel(
            "Share of prompts",
            "percentunit",
            {"image tokens": ratio("tessera_image_tokens_total", "tessera_prompt_tokens_total")},
        ),
    ],
    "Shards and process": [
        Panel(
            "Shards that answer",
            "short",
            {
                "{{instance}} {{rank}}": gauge("tessera_shard_up", "instance, rank"),
                "{{instance}} started anew": gauge("tessera_shard_restarts_total"),
            },
        ),
        Panel(
            "Memory of shards",
            "bytes",
            {"{{instance}} {{rank}}": gauge("tessera_shard_memory_bytes", "instance, rank")},
        ),
        Panel(
            "What they compute with",
            "short",
            {
                "{{rank}} {{device}} {{backend}} {{dtype}}": gauge(
                    "tessera_shard_info", "rank, device, backend, dtype"
                )
            },
        ),
        Panel(
            "Router's processor",
            "percentunit",
            {"{{instance}}": rate("process_cpu_seconds_total", by="instance")},
            "1: one core.",
        ),
        Panel("Router's memory", "bytes", {"{{instance}}": gauge("process_resident_memory_bytes")}),
        Panel(
            "Up since", "s", {"{{instance}}": f"time() - process_start_time_seconds{{{CHOSEN}}}"}
        ),
        Panel(
            "Version",
            "short",
            {
                "{{version}}": gauge("tessera_build_info", "version"),
                "{{model}}": gauge("tessera_model_info", "model"),
            },
        ),
    ],
}
