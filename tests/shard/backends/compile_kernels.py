"""Compiles every Triton kernel for a Hopper GPU on a machine that has none.

Runs as a process of its own (`python -m tests.shard.backends.compile_kernels`), because Triton
either interprets or compiles for as long as a process lives. The backend's own functions are called
with tensors on the host; every launch becomes a compilation, of which one JSON line tells.
"""

import json
import os
import re
import subprocess
from dataclasses import fields
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tessera.shard.backends.base import StepLayout
from tessera.shard.backends.triton_backend import TritonBackend
from tests.shard.backends.pool import CPU, Pool

HOPPER = GPUTarget("cuda", 90, 32)

# Dtypes of computation and cache, query heads, key/value heads, head size, window, multiprocessors
# (which cut contexts).
CASES = [
    (torch.bfloat16, torch.bfloat16, 32, 8, 128, None, 132),
    (torch.float16, torch.float16, 32, 32, 64, None, 1),
    (torch.bfloat16, torch.bfloat16, 7, 1, 80, 4096, 132),
    (torch.bfloat16, torch.bfloat16, 8, 4, 256, None, 1),
    (torch.float32, torch.float32, 4, 1, 256, None, 1),
    (torch.bfloat16, torch.float8_e4m3fn, 32, 8, 128, None, 132),
    (torch.bfloat16, torch.float8_e5m2, 32, 8, 128, None, 1),
]


class AbsentGpu:
    """What Triton asks a driver for before a launch."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def spills(ptx: str) -> int:
    """Bytes that a thread stores outside its registers, as NVIDIA's assembler counts them."""
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    command = [str(assembler), "-v", "--gpu-name=sm_90a", "-o", os.devnull, "-"]
    told = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", told))


def compile_only(
    kernel: "JITFunction[Any]", run: Any, stage: str, *args: object, **options: object
) -> Any:
    """In place of `JITFunction.run`: compile for the arguments, launch nothing."""
    compiled = run(kernel, *args, **(options | {"warmup": True}))
    print(
        json.dumps(
            {
                "kernel": kernel.__name__,
                "stage": stage,
                "hash": compiled.hash,
                "dtype": triton.runtime.jit.mangle_type(args[0]).removeprefix("*"),
                "cubin": len(compiled.asm["cubin"]),
                "shared": compiled.metadata.shared,
                "spills": spills(compiled.asm["ptx"]),
                "matrix_units": any(word in compiled.asm["ptx"] for word in ("wgmma", "mma.sync")),
            }
        ),
        flush=True,
    )
    return compiled


def every_kernel() -> None:
    for dtype, kept, num_heads, num_kv_heads, head_size, window, units in CASES:
        backend = TritonBackend(CPU, units)
        pool = Pool([20, 40], (num_heads, num_kv_heads, head_size), dtype, cache_dtype=kept)
        pool.step(backend, [(0, 19, 20), (1, 0, 40)], window)
        rotate(backend, pool, pool.layout([(1, 0, 40)]))
    small_operations(backend, tokens=40, vocabulary=32064)


def steps_of_other_sizes() -> None:
    """What the first of the cases is asked while it serves; its integers lie at any address."""
    dtype, kept, num_heads, num_kv_heads, head_size, window, units = CASES[0]
    backend = TritonBackend(CPU, units)
    pool = Pool([20, 40, 90], (num_heads, num_kv_heads, head_size), dtype, cache_dtype=kept)
    for parts in (
        [(1, 0, 40)],
        [(0, 0, 20), (1, 0, 40), (2, 5, 90)],
        [(2, 89, 90)],
        [(0, 19, 20), *[(1, 0, 2)] * 16],
    ):
        layout = elsewhere(pool.layout(parts))
        backend.attend(
            torch.zeros(layout.query_start[-1], num_heads, head_size, dtype=dtype),
            pool.cache,
            layout,
            window,
        )
        rotate(backend, pool, layout)
    small_operations(backend, tokens=1, vocabulary=101)


def rotate(backend: TritonBackend, pool: Pool, layout: StepLayout) -> None:
    _, num_kv_heads, _, head_size = pool.cache.k_BKPH.shape
    features = (pool.num_heads + 2 * num_kv_heads) * head_size
    qkv_TF = torch.zeros(layout.query_start[-1], features, dtype=pool.sequences[0].q_CNH.dtype)
    backend.rotate_and_store(qkv_TF, torch.zeros(64, head_size), pool.cache, layout)


def small_operations(backend: TritonBackend, tokens: int, vocabulary: int) -> None:
    dtype, width = torch.bfloat16, 4096
    x_TD, weight_D = torch.zeros(tokens, width, dtype=dtype), torch.zeros(width, dtype=dtype)
    backend.add_rms_norm(x_TD, None, weight_D, 1e-5)
    backend.add_rms_norm(x_TD, x_TD, weight_D, 1e-5)
    backend.silu_mul(torch.zeros(tokens, 2 * 14336, dtype=dtype))
    backend.draw(torch.zeros(tokens, vocabulary), torch.zeros(tokens, dtype=torch.int64))


def elsewhere(layout: StepLayout) -> StepLayout:
    """The same, each tensor one number past where one usually begins."""

    def moved(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    parts = (getattr(layout, field.name) for field in fields(layout))
    return StepLayout(*(moved(part) if isinstance(part, Tensor) else part for part in parts))


def main() -> None:
    triton.runtime.driver.set_active(AbsentGpu())
    run = JITFunction.run
    for work in (every_kernel, steps_of_other_sizes):
        JITFunction.run = partialmethod(compile_only, run, work.__name__)
        work()


if __name__ == "__main__":
    main()
