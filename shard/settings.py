"""Settings of a shard process. Names and defaults follow text-generation-inference."""

from dataclasses import dataclass

from tessera.proto.env import boolean, choice, integer, level_name, number, setting
from tessera.shard.quantization_names import quantization_name


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSettings:
    """Everything a shard can be told. Read once in `main`, then passed down, never re-read."""

    model_id: str = setting("", "local folder of the model")
    rank: int = setting(
        0, "this shard's place in the tensor-parallel group", integer(0, 63), internal=True
    )
    world_size: int = setting(1, "shards in the group", integer(1, 64), internal=True)
    shard_uds_path: str = setting("", "prefix of the shards' unix sockets; '-<rank>' is added")
    incarnation: int = setting(
        0, "how often the shards of this server were started before", integer(0), internal=True
    )
    rendezvous: str = setting(
        "",
        "where the ranks meet, such as file:///folder/name; empty: MASTER_ADDR and MASTER_PORT",
        internal=True,
    )
    device: str = setting(
        "auto", "cpu, cuda, xpu, or auto: the first of cuda, xpu, cpu that is there"
    )
    backend: str = setting("auto", "file in shard/backends that computes; auto: the device's own")
    dtype: str = setting(
        "auto",
        "auto, float32, bfloat16 or float16; auto: the checkpoint's, but on cpu bfloat16, "
        "not float16",
        choice("auto", "float32", "bfloat16", "float16"),
    )
    quantize: str = setting(
        "",
        "bits the language model's linear layers are rounded to while loading: int8 or int4, also "
        "as bitsandbytes, bitsandbytes-nf4, 8, 4, Q8_0, Q4K, ...; awq and gptq checkpoints need "
        "nothing; empty: as the checkpoint is",
        quantization_name,
        aliases=("ISQ",),
    )
    kv_cache_dtype: str = setting(
        "auto",
        "auto, fp8_e4m3fn or fp8_e5m2; auto: the dtype of the computation; fp8: 8 bits, so that as "
        "much memory holds twice the tokens of a bfloat16 cache",
        choice("auto", "fp8_e4m3fn", "fp8_e5m2"),
    )
    block_size: int = setting(16, "positions in one KV-cache block", integer(1, 1024))
    cuda_memory_fraction: float = setting(
        1.0, "share of the device's memory this server may use", number(0.01, 1.0)
    )
    master_addr: str = setting("", "host of rank 0; empty: all ranks are on this host")
    master_port: int = setting(
        29500, "port of rank 0's rendezvous, with MASTER_ADDR", integer(1, 65535)
    )
    num_threads: int = setting(
        0,
        "threads of this shard on cpu; 0: its share of the cores",
        integer(0, 1024),
        aliases=("OMP_NUM_THREADS",),
    )
    log_level: str = setting("info", "debug, info, warning or error", level_name)
    json_output: bool = setting(False, "log lines as JSON", boolean)
