"""Settings of the router process. Names and defaults are text-generation-inference's."""

from dataclasses import dataclass

from tessera.proto.env import (
    SettingsError,
    boolean,
    choice,
    collector_address,
    comma_list,
    integer,
    level_name,
    number,
    setting,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """Everything the router can be told. Read once in `main`, then passed down, never re-read."""

    model_id: str = setting("", "hub id or local folder of the model; empty: the demo model")
    served_model_name: str = setting("", "name that replies carry; empty: MODEL_ID")
    num_shard: int | None = setting(
        None, "tensor-parallel shards; empty: every visible device", integer(1, 64)
    )
    hostname: str = setting("0.0.0.0", "address the HTTP server listens on")
    port: int = setting(3000, "TCP port of the HTTP server; 0 picks a free one", integer(0, 65535))
    shard_uds_path: str = setting(
        "",
        "prefix of the shards' unix sockets, '-<rank>' is added; empty: in a private folder",
    )
    max_concurrent_requests: int = setting(
        128, "requests inside the server at once, waiting ones included; more get 429", integer(1)
    )
    max_input_tokens: int | None = setting(
        None,
        "longest prompt in tokens, images included; empty: MAX_TOTAL_TOKENS - 1",
        integer(1),
        aliases=("MAX_INPUT_LENGTH",),
    )
    max_total_tokens: int | None = setting(
        None,
        "longest prompt plus generation in tokens; empty: what model and cache hold",
        integer(2),
    )
    max_batch_prefill_tokens: int = setting(
        4096, "prompt tokens computed in one step; longer prompts are cut into chunks", integer(1)
    )
    max_batch_total_tokens: int | None = setting(
        None, "tokens the KV cache holds; empty: as many as fit, found at warm-up", integer(1)
    )
    max_batch_size: int | None = setting(
        None, "sequences in one step; empty: MAX_CONCURRENT_REQUESTS", integer(1)
    )
    max_waiting_tokens: int = setting(
        0,
        "decode steps after which a waiting request is let in, if it fits; steps mix prompts and "
        "decodes here, so waiting longer than 0 only delays newcomers",
        integer(0),
    )
    waiting_served_ratio: float = setting(
        0.3, "waiting requests per running one that let a prefill in before that", number(0)
    )
    max_queue_time: float | None = setting(
        None,
        "seconds a request may wait to be let in before it gets 429; empty: any time",
        number(0.001),
    )
    max_step_tiles: int | None = setting(
        None, "image tiles encoded in one step; empty: 8, or 5 on cpu", integer(1)
    )
    lookahead: int = setting(
        1,
        "steps sent to the shards before the tokens of the one before them are back",
        integer(0, 4),
    )
    prefix_caching: bool = setting(
        True, "keep the KV cache of finished requests for those that begin alike", boolean
    )
    vision_cache_tokens: int = setting(
        16384,
        "picture features kept on the shards, in tokens, for those who ask and for the next who do",
        integer(0),
    )
    max_best_of: int = setting(2, "largest best_of of a native request", integer(1, 128))
    max_n: int = setting(16, "largest n of an OpenAI request", integer(1, 128))
    max_stop_sequences: int = setting(4, "stop sequences of a request", integer(0, 1024))
    max_top_n_tokens: int = setting(
        5, "alternatives reported per token; 20 on the OpenAI routes if less", integer(0, 1024)
    )
    max_client_batch_size: int = setting(
        4, "prompts in one /v1/completions request", integer(1, 1024)
    )
    max_priority: int = setting(
        100, "largest priority of a request; negative ones are always allowed", integer(0, 100)
    )
    max_images: int = setting(16, "pictures in one request", integer(0, 1024))
    image_overflow: str = setting(
        "fit",
        "what happens to pictures with which a prompt is too long: `fit` reduces their resolution "
        "and says so in the reply, `reject` answers 422",
        choice("fit", "reject"),
    )
    max_image_pixels: int = setting(
        89_478_485, "pixels of one picture, checked before it is decoded", integer(1)
    )
    max_request_pixels: int = setting(
        200_000_000,
        "pixels of all pictures of one request, checked before any is decoded",
        integer(1),
    )
    allowed_image_domains: tuple[str, ...] = setting(
        (),
        "hosts whose pictures are fetched by URL, such as `example.org`, or `example.org:8080` for "
        "another port than 80 and 443; `*`: any public host; empty: none",
        comma_list,
    )
    allow_private_image_hosts: bool = setting(
        False,
        "fetch pictures from loopback and private addresses too; never from link-local ones",
        boolean,
    )
    allowed_image_paths: tuple[str, ...] = setting(
        (),
        "folders below which pictures are read by absolute path or file: URI; empty: none",
        comma_list,
    )
    max_image_fetch_size: int = setting(
        20_000_000,
        "bytes of the pictures one request has read by URL or path, together, counted meanwhile",
        integer(1),
    )
    image_fetch_timeout: float = setting(
        10.0, "seconds in which all pictures of a request must be fetched", number(0.1, 3600)
    )
    payload_limit: int = setting(20_000_000, "bytes of one request body", integer(1))
    validation_workers: int = setting(
        2, "threads that tokenise and decode pictures", integer(1, 256)
    )
    disable_grammar_support: bool = setting(
        False, "refuse requests that prescribe the form of their answer", boolean
    )
    max_grammar_bytes: int = setting(100_000, "bytes of one grammar or JSON schema", integer(1))
    grammar_timeout: float = setting(
        5.0, "seconds of computation that compiling and trying one grammar may take", number(0.001)
    )
    tokenizer_config_path: str = setting("", "file that replaces the model's tokenizer_config.json")
    chat_template: str = setting(
        "",
        "chat template instead of the model's: its text, or a file, .jinja or .json with the key "
        "`chat_template`",
    )
    api_key: str = setting(
        "",
        "bearer token that requests must carry; empty: none",
        aliases=("VALID_TOKEN",),
        secret=True,
    )
    playground: bool = setting(
        True,
        "serve a page at /ui for chats about pictures; it needs no key, what it asks for does",
        boolean,
    )
    cors_allow_origin: tuple[str, ...] = setting(
        (), "origins browsers may call from; empty: any", comma_list
    )
    graceful_termination_timeout: int = setting(
        90, "seconds that requests under way get to finish after SIGTERM", integer(0)
    )
    otlp_endpoint: str = setting(
        "",
        "OpenTelemetry collector that gets traces of requests by gRPC, such as "
        "`http://localhost:4317`; empty: no tracing",
        collector_address,
    )
    otlp_service_name: str = setting(
        "text-generation-inference.router", "name of this server in the traces"
    )
    log_level: str = setting("info", "debug, info, warning or error", level_name)
    json_output: bool = setting(False, "log lines as JSON", boolean)
    http_socket_fd: int | None = setting(
        None,
        "descriptor of the listening HTTP socket, bound by the launcher before anything is loaded; "
        "empty: the router binds HOSTNAME:PORT itself",
        integer(0),
        internal=True,
    )
    ready_fd: int | None = setting(
        None,
        "descriptor that gets the line `ready` once requests are answered; the router closes it",
        integer(0),
        internal=True,
    )

    def __post_init__(self) -> None:
        if (
            self.max_input_tokens is not None
            and self.max_total_tokens is not None
            and self.max_input_tokens >= self.max_total_tokens
        ):
            raise SettingsError(
                f"MAX_INPUT_TOKENS={self.max_input_tokens} must be below "
                f"MAX_TOTAL_TOKENS={self.max_total_tokens}; lower the first or raise the second."
            )
        if (
            self.max_total_tokens is not None
            and self.max_batch_total_tokens is not None
            and self.max_total_tokens > self.max_batch_total_tokens
        ):
            raise SettingsError(
                f"MAX_TOTAL_TOKENS={self.max_total_tokens} does not fit in a cache of "
                f"MAX_BATCH_TOTAL_TOKENS={self.max_batch_total_tokens}; lower the first or raise "
                "the second."
            )
