"""The queries of text-generation-inference's own Grafana dashboard, for one `container`."""

from collections.abc import Iterator

CHOSEN = 'container="tessera"'
DECODE, PREFILL = 'method="decode",', 'method="prefill",'

QUANTILES = [
    ("tgi_request_queue_duration", ""),
    ("tgi_batch_inference_duration", PREFILL),
    ("tgi_batch_inference_duration", DECODE),
    ("tgi_batch_forward_duration", PREFILL),
    ("tgi_batch_forward_duration", DECODE),
    ("tgi_batch_decode_duration", DECODE),
    ("tgi_batch_filter_duration", DECODE),
    ("tgi_batch_concat_duration", DECODE),
    ("tgi_request_generated_tokens", ""),
    ("tgi_request_input_length", ""),
    ("tgi_request_mean_time_per_token_duration", ""),
    ("tgi_request_skipped_tokens", ""),
    ("tgi_request_duration", ""),
]


def queries() -> Iterator[str]:
    """What its panels ask for."""
    for name, labels in QUANTILES:
        chosen = f"{labels}{CHOSEN}"
        for share in (0.5, 0.9, 0.99):
            per_bucket = f"sum by (le) (rate({name}_bucket{{{chosen}}}[10m]))"
            yield f"histogram_quantile({share}, {per_bucket})"
        yield f"sum(increase({name}_bucket{{{chosen}}}[1m])) by (le)"  # a heatmap
    for name, labels in QUANTILES[:3] + QUANTILES[4:5]:  # the stats at its top
        per_bucket = f"sum by (le) (rate({name}_bucket{{{labels}{CHOSEN}}}[10m]))"
        yield f"(histogram_quantile(0.5, {per_bucket}) * 1000) > 0"
    tokens = "tgi_request_generated_tokens"
    parts = [f"rate({tokens}_{part}{{{CHOSEN}}}[10m])" for part in ("sum", "count")]
    yield f"sum(({parts[0]} / {parts[1]}) > 0)"
    yield f"sum(increase(tgi_request_success{{{CHOSEN}}}[1m]))"
    yield f"sum(increase(tgi_request_failure{{{CHOSEN}}}[1m])) by (err)"
    yield f"sum(rate(tgi_batch_concat{{{CHOSEN}}}[10m])) by (reason)"
    yield f"count(tgi_request_count{{{CHOSEN}}})"
    for gauge in ("tgi_queue_size", "tgi_batch_current_size", "tgi_batch_current_max_tokens"):
        yield f"sum({gauge}{{{CHOSEN}}})"
        yield f"max({gauge}{{{CHOSEN}}})"
