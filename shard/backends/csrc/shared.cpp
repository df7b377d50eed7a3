// What ranks on one host say to each other through shared memory: sums, gathers, broadcasts.
//
// The region holds one flag per rank and two buffers per rank. Exchange number n (1, 2, ...) uses
// the buffers of n's parity: every rank writes its own, sets its flag to n and waits until all flags
// are at least n. A rank can thus be one exchange ahead at most, never two, so nobody overwrites
// what another still reads.

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <sched.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "crew.h"
#include "pause.h"

namespace tessera {
namespace {

using at::Tensor;
using Clock = std::chrono::steady_clock;

constexpr int64_t LINE = 64;             // bytes; flags on one cache line each
constexpr int64_t MAX_RANKS = 64;
constexpr auto YIELDING = std::chrono::milliseconds(5);  // then it is worth sleeping
constexpr auto NAP = std::chrono::microseconds(100);
constexpr int64_t ELEMENTS_PER_PIECE = 1 << 16;

using Flag = std::atomic<uint64_t>;
static_assert(Flag::is_always_lock_free && sizeof(Flag) <= LINE);

struct Region {
  char* base;
  int64_t rank, num_ranks;
  int64_t capacity;  // of a buffer, bytes

  Region(const Tensor& memory, int64_t rank, int64_t num_ranks)
      : base(static_cast<char*>(memory.data_ptr())), rank(rank), num_ranks(num_ranks) {
    TORCH_CHECK(memory.is_cpu() && memory.is_contiguous() && memory.scalar_type() == at::kByte,
                "the region must be a contiguous uint8 tensor");
    TORCH_CHECK(num_ranks >= 2 && num_ranks <= MAX_RANKS && rank >= 0 && rank < num_ranks,
                "no such rank: ", rank, " of ", num_ranks);
    capacity = (memory.numel() - MAX_RANKS * LINE) / (2 * num_ranks) / LINE * LINE;
    TORCH_CHECK(capacity > 0, "the region is too small");
  }

  Flag& flag(int64_t of) const { return *reinterpret_cast<Flag*>(base + of * LINE); }

  char* buffer(int64_t of, uint64_t number) const {
    return base + MAX_RANKS * LINE + ((number & 1) * num_ranks + of) * capacity;
  }

  // Publishes `size` bytes as this rank's part of the exchange and waits for everybody's.
  void meet(const void* mine, int64_t size, uint64_t number, Clock::time_point deadline) const {
    if (size) std::memcpy(buffer(rank, number), mine, size);
    flag(rank).store(number, std::memory_order_release);
    for (int64_t other = 0; other < num_ranks; other++) {
      if (other != rank) wait_for(other, number, deadline);
    }
  }

 private:
  void wait_for(int64_t other, uint64_t number, Clock::time_point deadline) const {
    const Flag& theirs = flag(other);
    auto has_come = [&] { return theirs.load(std::memory_order_acquire) >= number; };
    for (int n = 0; n < PAUSES; n++) {
      if (has_come()) return;
      pause();
    }
    const auto began = Clock::now();
    while (!has_come()) {
      const auto now = Clock::now();
      TORCH_CHECK(now < deadline, "rank ", other, " did not come to exchange ", number);
      if (now - began < YIELDING) {
        sched_yield();
      } else {
        std::this_thread::sleep_for(NAP);
      }
    }
  }
};

Clock::time_point deadline_in(double seconds) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(
                            std::chrono::duration<double>(seconds));
}

// Always in the order of the ranks, so that the sum is the same on all of them.
template <typename T>
void add_up(const Region& region, uint64_t number, T* out, int64_t count) {
  share_out(crew_size(), count, ELEMENTS_PER_PIECE, [&](int64_t, int64_t begin, int64_t end) {
    constexpr int64_t STRIP = 512;  // the partial sums of a strip stay in registers and cache
    float sums[STRIP];
    for (int64_t start = begin; start < end; start += STRIP) {
      const int64_t length = std::min(STRIP, end - start);
      std::fill(sums, sums + length, 0.0f);
      for (int64_t rank = 0; rank < region.num_ranks; rank++) {
        const T* part = reinterpret_cast<const T*>(region.buffer(rank, number)) + start;
        for (int64_t i = 0; i < length; i++) sums[i] += static_cast<float>(part[i]);
      }
      for (int64_t i = 0; i < length; i++) out[start + i] = static_cast<T>(sums[i]);
    }
  });
}

template <typename T>
void add_up_bytes(const Region& region, uint64_t number, char* out, int64_t size) {
  add_up(region, number, reinterpret_cast<T*>(out), size / static_cast<int64_t>(sizeof(T)));
}

void check(const Tensor& x) {
  TORCH_CHECK(x.is_cpu() && x.is_contiguous(), "x must be a contiguous CPU tensor");
}

// Cuts x into pieces that fit a buffer: body(bytes of the piece, its size, number of the exchange).
template <typename Body>
int64_t in_pieces(const Tensor& x, const Region& region, int64_t number, Body body) {
  check(x);
  char* bytes = static_cast<char*>(x.data_ptr());
  const int64_t size = x.nbytes();
  int64_t start = 0;
  do {
    body(bytes + start, std::min(region.capacity, size - start), static_cast<uint64_t>(++number));
    start += region.capacity;
  } while (start < size);
  return number;
}

// x becomes the sum over ranks; returns the number of the last exchange.
int64_t shared_sum(const Tensor& x, const Tensor& memory, int64_t rank, int64_t num_ranks,
                   int64_t number, double timeout_s) {
  Region region(memory, rank, num_ranks);
  const bool is_float = x.scalar_type() == at::kFloat;
  TORCH_CHECK(is_float || x.scalar_type() == at::kBFloat16,
              "only float32 and bfloat16 are summed, not ", x.scalar_type());
  const auto deadline = deadline_in(timeout_s);
  return in_pieces(x, region, number, [&](char* piece, int64_t size, uint64_t n) {
    region.meet(piece, size, n, deadline);
    if (is_float) {
      add_up_bytes<float>(region, n, piece, size);
    } else {
      add_up_bytes<c10::BFloat16>(region, n, piece, size);
    }
  });
}

// x becomes rank 0's; returns the number of the last exchange.
int64_t shared_broadcast(const Tensor& x, const Tensor& memory, int64_t rank, int64_t num_ranks,
                         int64_t number, double timeout_s) {
  Region region(memory, rank, num_ranks);
  const auto deadline = deadline_in(timeout_s);
  return in_pieces(x, region, number, [&](char* piece, int64_t size, uint64_t n) {
    region.meet(piece, rank == 0 ? size : 0, n, deadline);
    if (rank != 0) std::memcpy(piece, region.buffer(0, n), size);
  });
}

// On rank 0, `pieces` [ranks, ...] becomes every rank's x; returns the number of the last exchange.
int64_t shared_gather(const Tensor& x, const Tensor& pieces, const Tensor& memory, int64_t rank,
                      int64_t num_ranks, int64_t number, double timeout_s) {
  Region region(memory, rank, num_ranks);
  const int64_t stride = x.nbytes();
  if (rank == 0) {
    check(pieces);
    TORCH_CHECK(static_cast<int64_t>(pieces.nbytes()) == num_ranks * stride,
                "pieces must hold every rank's x");
  }
  const auto deadline = deadline_in(timeout_s);
  const char* bytes = static_cast<const char*>(x.data_ptr());
  return in_pieces(x, region, number, [&](char* piece, int64_t size, uint64_t n) {
    region.meet(piece, size, n, deadline);
    if (rank != 0) return;
    for (int64_t other = 0; other < num_ranks; other++) {
      char* out = static_cast<char*>(pieces.data_ptr()) + other * stride + (piece - bytes);
      std::memcpy(out, region.buffer(other, n), size);
    }
  });
}

TORCH_LIBRARY_FRAGMENT(tessera_cpu, library) {
  library.def(
      "shared_sum(Tensor(a!) x, Tensor(b!) region, int rank, int num_ranks, int number,"
      " float timeout_s) -> int",
      &shared_sum);
  library.def(
      "shared_broadcast(Tensor(a!) x, Tensor(b!) region, int rank, int num_ranks, int number,"
      " float timeout_s) -> int",
      &shared_broadcast);
  library.def(
      "shared_gather(Tensor x, Tensor(a!) pieces, Tensor(b!) region, int rank, int num_ranks,"
      " int number, float timeout_s) -> int",
      &shared_gather);
}

}  // namespace
}  // namespace tessera
