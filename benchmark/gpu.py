"""Times a GPU against what it allows, the whole server against its bare steps, and a peer.

    python -m benchmark.gpu --out benchmark/results/gpu_h100.json
    python -m benchmark.gpu --parts decode prefill --batches 1 32

The model has LLaVA-NeXT Mistral 7B's sizes and random weights in bfloat16. Shares are of two
ceilings that the same run measures: copying within the device's memory (bytes read plus written)
and a large product of matrices. A step's limit is the larger of moving its bytes and doing its
arithmetic at those rates. Times are the device's own: its idle time between decode steps is what
lies between the end of one step and the start of the next.

    decode        one more token for each of --batches sequences that see --context tokens
    prefill       a prompt of --prompt tokens in one step
    pictures      --pictures pictures of five tiles through the vision tower
    server        launcher, router and shard with --streams streams, beside the bare decode steps
    transformers  its generate on the same device: static cache, sdpa attention, compiled

No device stands in for another: where the one asked for is not there, this ends with an error.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmark.checkpoints import CACHE, CHECKPOINTS, checkpoint
from benchmark.on_gpu.ceilings import best, ceilings
from benchmark.on_gpu.generate import static_generate
from benchmark.on_gpu.shard import GpuShard, Row, Timed, free
from benchmark.results_file import provenance, write_json
from benchmark.steps.cases import STEPS_PER_ROUND, Case

PARTS = ("decode", "prefill", "pictures", "server", "transformers")
COMPARED = ("server", "transformers")  # beside the decode steps
SERVER_ROUNDS = 2
PACKAGES = ("tessera", "torch", "triton", "transformers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit status, 1 when the server failed."""
    asked = _parser().parse_args(arguments)
    folder = asked.folder or checkpoint(asked.model, asked.checkpoints)
    report: dict[str, Any] = {"about": _about(asked)}
    longest = max(asked.context, asked.prompt) + STEPS_PER_ROUND
    shard = GpuShard(folder, asked.device, _num_blocks(asked), max(asked.batches), longest)
    device, dtype = shard.bench.backend.device, shard.dtype
    report["about"] |= {"dtype": str(dtype), "recorded_mib": round(shard.recorded_bytes / 2**20, 1)}
    before = ceilings(shard.bench, asked.copy_mib, asked.matrix_size)
    timed = _steps(shard, asked)
    limits = best(before, ceilings(shard.bench, asked.copy_mib, asked.matrix_size))
    report |= {"ceilings": asdict(limits), "steps": [each.row(limits) for each in timed]}
    for row in report["steps"]:
        print(row, flush=True)
    _save(asked, report)
    del shard
    free(device)
    decodes = {row["batch"]: row["tokens_per_s"] for row in report["steps"] if "batch" in row}
    status = 0
    # The server first: what torch compiles for the peer keeps memory of the device for good.
    if "server" in asked.parts:
        try:
            report["server"] = _server(folder, asked, decodes)
            print(report["server"], flush=True)
            _save(asked, report)
        except OSError as error:  # the peer can be measured all the same
            print(f"server: {error}", file=sys.stderr, flush=True)
            status = 1
    if "transformers" in asked.parts:
        report["transformers"] = _transformers(folder, device, dtype, asked, decodes)
        print(report["transformers"], flush=True)
        _save(asked, report)
    return status


def _save(asked: argparse.Namespace, report: dict[str, Any]) -> None:
    """What has been measured so far: a later part may fail."""
    if asked.out:
        write_json(asked.out, report)


def _steps(shard: GpuShard, asked: argparse.Namespace) -> list[Timed]:
    timed = []
    if set(asked.parts) & {"decode", *COMPARED}:
        timed += [shard.decode(batch, asked.context, asked.rounds) for batch in asked.batches]
    if "prefill" in asked.parts:
        timed.append(shard.prefill(asked.prompt, asked.rounds))
    if "pictures" in asked.parts:
        timed.append(shard.pictures(asked.pictures, asked.rounds))
    return timed


def _transformers(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    asked: argparse.Namespace,
    decodes: dict[int, float],
) -> list[Row]:
    peer = static_generate(folder, device, dtype, asked.context, asked.new_tokens)
    rows = []
    for batch, ours in decodes.items():
        theirs = peer.tokens_per_s(batch, rounds=2)
        ratio = round(ours / theirs, 3)
        rows.append({"batch": batch, "tokens_per_s": round(theirs, 1), "ours_over_it": ratio})
    return rows


def _server(folder: Path, asked: argparse.Namespace, decodes: dict[int, float]) -> Row:
    """Prompts of the streams are computed meanwhile; the bare steps only decode."""
    # Its packages are the router's, which those who time steps alone may not have.
    from benchmark.on_gpu.server import tokens_per_s

    os.environ["DEVICE"] = asked.device
    rates = tokens_per_s(
        folder, asked.streams, asked.stream_prompt, asked.stream_tokens, SERVER_ROUNDS
    )
    bare = decodes[max(decodes)]
    return {
        "streams": asked.streams,
        "prompt_tokens": asked.stream_prompt,
        "output_tokens": asked.stream_tokens,
        "tokens_per_s": round(max(rates), 1),
        "bare_batch": max(decodes),
        "bare_tokens_per_s": bare,
        "share_of_bare": round(max(rates) / bare, 4),
    }


def _num_blocks(asked: argparse.Namespace) -> int:
    cases = [Case("decode", batch, asked.context) for batch in asked.batches]
    return max(case.num_blocks for case in (*cases, Case("prefill", 1, asked.prompt)))


def _about(asked: argparse.Namespace) -> dict[str, Any]:
    is_cuda = asked.device.startswith("cuda") and torch.cuda.is_available()
    named = torch.cuda.get_device_name() if is_cuda else ""
    return provenance(*PACKAGES) | {"device": named or asked.device, "model": asked.model}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    add("--device", default="cuda")
    add("--model", choices=CHECKPOINTS, default="llava-next-7b")
    add("--folder", type=Path, help="a checkpoint of your own instead")
    add("--checkpoints", type=Path, default=CACHE, help="where models are kept")
    add("--batches", type=int, nargs="+", default=[1, 32, 128])
    add("--context", type=int, default=1024, help="tokens that decoding sequences see")
    add("--prompt", type=int, default=2960, help="tokens of a long prompt")
    add("--pictures", type=int, default=8)
    add("--streams", type=int, default=128, help="of the whole server")
    add("--stream-prompt", type=int, default=128, help="tokens of each stream's prompt")
    add("--stream-tokens", type=int, default=512, help="tokens of each answer")
    add("--new-tokens", type=int, default=128, help="that the peer generates")
    add("--rounds", type=int, default=8)
    add("--copy-mib", type=int, default=4096, help="of memory that is copied")
    add("--matrix-size", type=int, default=8192, help="rows and columns of the product")
    add("--out", type=Path, help="JSON file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
