"""How long a device takes for a step: a roofline with a fixed part.

The parameters are what a device reaches, not what its data sheet says. They are assumptions of the
simulator: change them with `dataclasses.replace` to ask what another device would do.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class Work:
    """What one step computes, summed over its rows."""

    tokens: int = 0
    decodes: int = 0
    context_read: int = 0  # cached tokens whose keys and values are read
    attention_pairs: int = 0  # (query, key) pairs of prompt chunks
    tiles: int = 0
    images: int = 0

    def add_decode(self, context_len: int) -> None:
        """One row that sees `context_len` tokens, its own included."""
        self.tokens += 1
        self.decodes += 1
        self.context_read += context_len

    def add_chunk(self, first: int, last: int) -> None:
        """The tokens [first, last) of a prompt."""
        self.tokens += last - first
        self.context_read += last
        self.attention_pairs += (last * (last + 1) - first * (first + 1)) // 2

    def add_image(self, tiles: int) -> None:
        """One picture for the vision tower."""
        self.tiles += tiles
        self.images += 1


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator (or processor) with one model on it."""

    name: str
    step_overhead_s: float  # launches, index tensors, sampling, the reply
    memory_bytes_per_s: float
    flop_per_s: float
    weight_bytes: float  # read once in every step that computes a token
    kv_bytes_per_token: float
    flop_per_token: float  # linear layers
    flop_per_pair: float  # attention, for one (query, key) pair in all layers
    flop_per_tile: float  # vision tower and projector; 0: the model does not see
    overlaps: bool  # memory and compute at once (the slower counts) or one after the other

    def step_s(self, work: Work) -> float:
        """Seconds from the step's start on the device to its tokens."""
        seconds = self.step_overhead_s + work.tiles * self.flop_per_tile / self.flop_per_s
        if work.tokens:
            weights = self.weight_bytes / self.memory_bytes_per_s
            linear = work.tokens * self.flop_per_token / self.flop_per_s
            cache = work.context_read * self.kv_bytes_per_token / self.memory_bytes_per_s
            attention = work.attention_pairs * self.flop_per_pair / self.flop_per_s
            seconds += self._both(weights, linear) + self._both(cache, attention)
        return seconds

    def _both(self, memory_s: float, compute_s: float) -> float:
        return max(memory_s, compute_s) if self.overlaps else memory_s + compute_s


H200 = Device(
    name="H200, Mistral-7B LLaVA-NeXT, bf16",
    step_overhead_s=0.3e-3,
    memory_bytes_per_s=0.77 * 4.3e12,  # of a copy's rate; what good bf16 decoders reach
    flop_per_s=0.70 * 790e12,  # of a large matrix product's rate
    weight_bytes=14.22e9,
    kv_bytes_per_token=128 * 1024,  # 32 layers, 8 heads of 128, keys and values, 2 bytes
    flop_per_token=13.96e9,  # 6.98e9 weights in matrix products
    flop_per_pair=4 * 32 * 4096,  # scores and values, 2 FLOP each, 32 layers of width 4096
    flop_per_tile=(366 + 24) * 1e9,  # CLIP-L/14 at 336 and the projector
    overlaps=True,
)

CPU = Device(
    name="2-core CPU, 125M, bf16",
    step_overhead_s=0.5e-3,
    memory_bytes_per_s=60e9,
    flop_per_s=400e9,
    weight_bytes=0.268e9,
    kv_bytes_per_token=36_864,  # 12 layers, 12 heads of 64, keys and values, 2 bytes
    flop_per_token=0.268e9,
    flop_per_pair=4 * 12 * 768,
    flop_per_tile=100e9,  # a tower of CLIP-B's size at 24 x 24 patches
    overlaps=False,  # measured: a step grows with every row from the first on
)
