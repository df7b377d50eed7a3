"""How full the server is, read from the scheduler when somebody asks."""

from tessera.router.metrics.instruments import Registry
from tessera.router.scheduler import Scheduler, SchedulerCounts


class LoadMetrics:
    """Queue, batch and caches."""

    def __init__(self, registry: Registry) -> None:
        self._scheduler: Scheduler | None = None
        self._define_batch(registry)
        self._define_cache(registry)
        self._define_counts(registry)

    def _define_batch(self, registry: Registry) -> None:
        waiting, running = "Requests that wait to be let in", "Sequences let in and not yet ended"
        self._waiting = [
            registry.gauge("tgi_queue_size", waiting),
            registry.gauge(
                "tessera_num_requests_waiting", waiting, like="vllm:num_requests_waiting"
            ),
        ]
        self._running = [
            registry.gauge("tgi_batch_current_size", running),
            registry.gauge(
                "tessera_num_requests_running", running, like="vllm:num_requests_running"
            ),
        ]

    def _define_cache(self, registry: Registry) -> None:
        used, total = "Cache tokens in the blocks of sequences", "Tokens the KV cache holds"
        self._used = [
            registry.gauge("tgi_batch_current_max_tokens", used),
            registry.gauge("tessera_kv_cache_used_tokens", used),
        ]
        self._total = [
            registry.gauge("tgi_batch_max_total_tokens", total),
            registry.gauge("tessera_kv_cache_tokens", total),
        ]
        self._usage = registry.gauge(
            "tessera_kv_cache_usage_perc",
            "Share of the KV cache in the blocks of sequences, 0 to 1",
            like="vllm:kv_cache_usage_perc",
        )
        self._kept = registry.gauge(
            "tessera_kv_cache_kept_tokens",
            "Cache tokens nobody holds whose content can still be found",
        )
        self._features = registry.gauge(
            "tessera_vision_cache_tokens", "Image features on the shards, tokens"
        )
        self._config = registry.gauges(
            "tessera_cache_config_info",
            "1; how the KV cache is divided",
            "block_size",
            "num_gpu_blocks",
            like="vllm:cache_config_info",
        )

    def _define_counts(self, registry: Registry) -> None:
        self._preemptions = registry.counter(
            "tessera_num_preemptions_total",
            "Sequences put back to make room in the cache, to be computed again",
            like="vllm:num_preemptions_total",
        )
        self._prefix_queries = registry.counter(
            "tessera_prefix_cache_queries_total",
            "Prompt tokens of requests that were let in",
            like="vllm:prefix_cache_queries_total",
        )
        self._prefix_hits = registry.counter(
            "tessera_prefix_cache_hits_total",
            "Those of them that were found in the prefix cache",
            like="vllm:prefix_cache_hits_total",
        )
        self._vision_hits = registry.counter(
            "tessera_vision_cache_hits_total",
            "Pictures that did not have to be encoded, counted when their request ends",
        )
        self._vision_misses = registry.counter(
            "tessera_vision_cache_misses_total", "Pictures encoded"
        )

    def follow(self, scheduler: Scheduler) -> None:
        """Read this one from now on."""
        self._scheduler = scheduler
        pool = scheduler.pool
        self._config.of(str(pool.block_size), str(pool.num_blocks)).set(1)

    def refresh(self) -> None:
        """Take the numbers as they are now."""
        if self._scheduler is None:
            return
        pool, size = self._scheduler.pool, self._scheduler.pool.block_size
        used = pool.num_blocks - pool.num_free
        numbers = [
            (self._waiting, len(self._scheduler.waiting)),
            (self._running, len(self._scheduler.running)),
            (self._used, used * size),
            (self._total, pool.num_blocks * size),
        ]
        for gauges, number in numbers:
            for gauge in gauges:
                gauge.set(number)
        self._usage.set(used / pool.num_blocks)
        self._kept.set(pool.num_kept * size)
        self._features.set(self._scheduler.images.encoded_tokens)
        self._take_counts(self._scheduler.counts)

    def _take_counts(self, counts: SchedulerCounts) -> None:
        self._preemptions.set(counts.preemptions)
        self._prefix_queries.set(counts.prefix_query_tokens)
        self._prefix_hits.set(counts.prefix_hit_tokens)
        self._vision_hits.set(counts.vision_hits)
        self._vision_misses.set(counts.vision_misses)
