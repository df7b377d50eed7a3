// The seam between the drivers (compiled once, with torch) and the kernels (compiled once per
// instruction set). Kernels call no library function: an inline function compiled for AVX-512
// might be the copy that the linker keeps for everybody, also for processors without it.
#pragma once

#include <cstdint>

namespace tessera {

struct bf16 {
  uint16_t bits;
};

// How a cache holds its numbers: in the type of the computation, one head of a position after the
// other or in pairs of bfloat16, or in 8 bits (arXiv 2209.05433).
//
// Pairs: PAIRED_KEYS positions of a head lie together. Their keys are a row per pair of channels, with
// the two numbers of each position: [H / 2, PAIRED_KEYS, 2]. Their values are a row per pair of
// positions, with the two numbers of each channel: [PAIRED_KEYS / 2, H, 2].
enum class Storage { PLAIN, PAIRED, E4M3, E5M2 };
constexpr int64_t PAIRED_KEYS = 16;
constexpr bool in_8_bits(Storage storage) {
  return storage == Storage::E4M3 || storage == Storage::E5M2;
}

// Attention of one step, as the kernels see it. Shape letters: shard/backends/base.py.
template <typename T>
struct AttendArgs {
  const T* q_TNH;
  const uint8_t* k_BKPH;  // elements of `storage`
  const uint8_t* v_BKPH;
  Storage storage;
  T* out_TNH;
  const int32_t* block_tables_SM;
  int64_t table_stride;
  int64_t block_stride;  // elements from one block of a pool to the next, and so on
  int64_t head_stride;
  int64_t position_stride;
  int64_t num_kv_heads;
  int64_t group;  // query heads per key/value head
  int64_t block_size;
  int64_t head_size;
  int64_t window;  // positions a token sees, itself included; 0: all
  bool causal;     // no later positions
  float scale;     // of the scores, for exponentials of base 2
};

// Rows that share the keys and values of one head of one sequence. Row r is the query head
// r % group of token first_token + r / group, which has position first_position + r / group.
struct AttendTile {
  int64_t sequence;
  int64_t kv_head;
  int64_t first_token;  // of the sequence, in q_TNH
  int64_t first_position;
  int64_t first_row;
  int64_t last_row;

  int64_t rows() const { return last_row - first_row; }
};

constexpr int64_t MAX_ROWS = 64;  // of a tile
constexpr int64_t MAX_HEAD_SIZE = 256;
constexpr int64_t PADDING = 16;   // floats of the widest vector: rows of sums are multiples of it
// Keys are summed up in segments that start at multiples of SEGMENT, then segment after segment.
// So a token's result has the same bits in whatever chunk, batch or thread it is computed.
constexpr int64_t SEGMENT = 512;

constexpr int64_t padded(int64_t n) { return (n + PADDING - 1) / PADDING * PADDING; }

// The softmax over some of the keys, not yet divided (arXiv 2205.14135, "online softmax").
struct Partial {
  float* sums;     // [rows, padded head size]: sum of 2^(score - max) * value
  float* weights;  // [rows, PADDING]: sum of 2^(score - max), in lanes
  float* max;      // [rows]

  static constexpr int64_t floats(int64_t rows, int64_t head_size) {
    return rows * (padded(head_size) + PADDING) + padded(rows);
  }
  static Partial at(float* memory, int64_t rows, int64_t head_size) {
    float* weights = memory + rows * padded(head_size);
    return {memory, weights, weights + rows * PADDING};
  }
};

// Weights of 4 or 8 bits (quantized.h) lie in blocks of QUANTIZED_OUT rows. A block is a sequence of
// groups of QUANTIZED_GROUP columns: the codes, four columns of each row together and with 4 bits
// the group's second half in the high ones; then each row's scale and zero point, in half precision.
constexpr int64_t QUANTIZED_OUT = 16;
constexpr int64_t QUANTIZED_GROUP = 32;
constexpr int64_t quantized_group_bytes(int64_t bits) {
  return QUANTIZED_OUT * (QUANTIZED_GROUP * bits / 8 + 4);
}

struct QuantizedArgs {
  const uint8_t* weight;
  const int8_t* codes_TI;  // the input in 8 bits
  const float* scales_TG;  // of its groups
  const float* sums_TG;    // of its values, per group
  int64_t width;           // I
  int64_t num_groups;      // G
};

// bfloat16 weights of linear layers (linear.h) lie in blocks of PAIRED_OUT outputs: pairs of columns,
// and of each pair the two numbers of every output.
constexpr int64_t PAIRED_OUT = 64;
constexpr int64_t PAIRED_ROWS = 64;  // of the input at once

struct PairedArgs {
  const bf16* x_TI;
  const bf16* weight;
  const bf16* bias_O;  // or null
  bf16* out_TO;
  int64_t width;  // I
  int64_t out_features;
};

template <typename T>
struct TypedKernels {
  // One tile over the keys [first_key, last_key) of one segment into `to`, overwriting it.
  void (*attend_segment)(const AttendArgs<T>&, const AttendTile&, int64_t first_key,
                         int64_t last_key, const Partial& to, float* scratch);
  // Divides the sums and writes the tile's rows of out_TNH.
  void (*finish)(const AttendArgs<T>&, const AttendTile&, const Partial& from);
  // One token. `residual` may be null; else it becomes x + residual.
  void (*add_rms_norm)(const T* x, T* residual, const T* weight, T* out, int64_t width, float eps);
  void (*silu_mul)(const T* gate_up, T* out, int64_t width);
  void (*rotate)(const T* in, const float* cos_sin, T* out, int64_t head_size);
  // One token to 8 bits: its codes, and scales and sums of its groups.
  void (*quantize_row)(const T* x, int64_t width, int8_t* codes, float* scales, float* sums);
};

// Of a row of scores.
struct RowSurvey {
  float max;
  int64_t index;        // of its first occurrence
  float sum;            // of all: finite only if they are
  float sum_of_powers;  // of e^(score - max)
};

struct Kernels {
  int64_t (*scratch_floats)(int64_t rows, int64_t head_size);  // for attend_segment
  // Adds `from` to `to`: the softmax over the keys of both.
  void (*merge)(const Partial& to, const Partial& from, int64_t rows, int64_t head_size);
  // Rows of the input against one block of the weight: out [num_rows, QUANTIZED_OUT].
  using Multiply = void (*)(const QuantizedArgs&, int64_t block, int64_t first_row,
                            int64_t num_rows, float* out);
  Multiply multiply_int4;
  Multiply multiply_int8;
  // Rows of the input against one block of the weight; null without instructions for bfloat16.
  using MultiplyPaired = void (*)(const PairedArgs&, int64_t block, int64_t first_row,
                                  int64_t num_rows);
  MultiplyPaired multiply_paired;
  // A block of such a weight from so many of its rows; null likewise.
  using PackPaired = void (*)(const bf16* rows, int64_t width, int64_t count, bf16* block);
  PackPaired pack_paired;
  void (*survey)(const float* scores, int64_t count, RowSurvey* out);
  TypedKernels<float> of_float;
  TypedKernels<bf16> of_bf16;
};

// One per instruction set that build.py compiles kernels.cpp for.
const Kernels* kernels_portable();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();

}  // namespace tessera
