// Products with weights of 4 or 8 bits. Local to kernels.cpp, compiled once per instruction set.
//
// A weight is scale * (code - zero), with scale and zero common to GROUP columns of a row. The input
// is brought to 8 bits per group of a row, so that codes are multiplied as integers (as llama.cpp's
// Q4_1 x Q8_1 does); sums over groups are float32, always in the same order: a row's result does not
// depend on the rows beside it.
#pragma once

#include "kernels.h"
#include "prefetch.h"
#include "vector.h"

namespace tessera {
namespace {

typedef uint8_t Quads __attribute__((vector_size(4 * LANES)));

constexpr int PARTS = QUANTIZED_OUT / LANES;  // vectors of one value per output row
constexpr int QUADS = QUANTIZED_GROUP / 4;    // four codes of each output row lie together
constexpr int64_t AHEAD = 16384;              // bytes of the weight between what is used and asked for

// Adds to each lane the products of its four codes with the four bytes of `x`.
inline Ints add_products(Ints sums, Quads codes, int32_t x) {
#if defined(__AVX512VNNI__)
  return bits<Ints>(_mm512_dpbusd_epi32(bits<__m512i>(sums), bits<__m512i>(codes),
                                        _mm512_set1_epi32(x)));
#elif defined(__AVX512BW__)
  __m512i c = bits<__m512i>(codes), four = _mm512_set1_epi32(x);
  __m512i even = _mm512_madd_epi16(_mm512_and_si512(c, _mm512_set1_epi16(0xff)),
                                   _mm512_srai_epi16(_mm512_slli_epi16(four, 8), 8));
  __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(c, 8), _mm512_srai_epi16(four, 8));
  return sums + bits<Ints>(even) + bits<Ints>(odd);
#elif defined(__AVX2__)
  __m256i c = bits<__m256i>(codes), four = _mm256_set1_epi32(x);
  __m256i even = _mm256_madd_epi16(_mm256_and_si256(c, _mm256_set1_epi16(0xff)),
                                   _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8));
  __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(c, 8), _mm256_srai_epi16(four, 8));
  return sums + bits<Ints>(even) + bits<Ints>(odd);
#else
  Words c = bits<Words>(codes);
  for (int i = 0; i < 4; i++) {
    sums += bits<Ints>((c >> (8 * i)) & 0xffu) * static_cast<int32_t>(static_cast<int8_t>(x >> (8 * i)));
  }
  return sums;
#endif
}

// IEEE half precision; no infinities and NaNs, which weights do not have.
inline Floats from_half(const uint8_t* at) {
#if defined(__AVX512F__)
  return bits<Floats>(_mm512_cvtph_ps(load_raw<__m256i>(at)));
#else
  Words h = to_words(load_raw<Halves>(at));
  return bits<Floats>(((h & 0x8000u) << 16) | ((h & 0x7fffu) << 13)) * 0x1p112f;
#endif
}

inline Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }

// ROWS rows of the input against one block of outputs.
template <int ROWS, int BITS>
__attribute__((noinline)) void multiply_rows(const QuantizedArgs& args, const uint8_t* weight,
                                             int64_t first_row, float* out) {
  constexpr int CHAINS = ROWS > 2 ? 1 : 4 / ROWS;  // of additions that wait for each other
  Floats totals[ROWS][PARTS] = {};
  const int32_t* x[ROWS];
  for (int r = 0; r < ROWS; r++) {
    x[r] = reinterpret_cast<const int32_t*>(args.codes_TI + (first_row + r) * args.width);
  }
  const float* scales = args.scales_TG + first_row * args.num_groups;
  const float* sums = args.sums_TG + first_row * args.num_groups;
  // Where reading is all that takes time, the processor foresees it, and asking would delay it.
  constexpr bool ASKS = ROWS * 8 / BITS >= 4;
  for (int64_t g = 0; g < args.num_groups; g++) {
    const uint8_t* scale_at = weight + QUADS * 4 * QUANTIZED_OUT * BITS / 8;
    const uint8_t* zero_at = scale_at + 2 * QUANTIZED_OUT;
    for (int part = 0; part < PARTS; part++) {
      Ints dots[CHAINS][ROWS] = {};
      for (int quad = 0; quad < QUADS * BITS / 8; quad++) {
        const int at = (quad * PARTS + part) * 4 * LANES;
        Quads codes = load_raw<Quads>(weight + at);
        if constexpr (ASKS) __builtin_prefetch(weight + at + AHEAD, 0, IN_L2);
        if constexpr (BITS == 8) {
          for (int r = 0; r < ROWS; r++) {
            dots[quad % CHAINS][r] =
                add_products(dots[quad % CHAINS][r], codes, x[r][g * QUADS + quad]);
          }
        } else {
          Quads low = codes & 0x0f, high = (codes >> 4) & 0x0f;
          for (int r = 0; r < ROWS; r++) {
            Ints &first = dots[2 * quad % CHAINS][r], &second = dots[(2 * quad + 1) % CHAINS][r];
            first = add_products(first, low, x[r][g * QUADS + quad]);
            second = add_products(second, high, x[r][g * QUADS + quad + QUADS / 2]);
          }
        }
      }
      if constexpr (ASKS) __builtin_prefetch(scale_at + AHEAD, 0, IN_L2);
      Floats scale = from_half(scale_at + part * 2 * LANES);
      Floats zero = from_half(zero_at + part * 2 * LANES);
      for (int r = 0; r < ROWS; r++) {
        Ints dot = dots[0][r];
        for (int i = 1; i < CHAINS; i++) dot += dots[i][r];
        Floats product = to_floats(dot) * scales[r * args.num_groups + g];
        totals[r][part] += scale * (product - zero * sums[r * args.num_groups + g]);
      }
    }
    weight = zero_at + 2 * QUANTIZED_OUT;
  }
  for (int r = 0; r < ROWS; r++) {
    for (int part = 0; part < PARTS; part++) {
      store(out + r * QUANTIZED_OUT + part * LANES, totals[r][part]);
    }
  }
}

template <int BITS>
void multiply_quantized(const QuantizedArgs& args, int64_t block, int64_t first_row,
                        int64_t num_rows, float* out) {
  const uint8_t* weight = args.weight + block * args.num_groups * quantized_group_bytes(BITS);
  int64_t row = 0;
  for (; row + 8 <= num_rows; row += 8) {
    multiply_rows<8, BITS>(args, weight, first_row + row, out + row * QUANTIZED_OUT);
  }
  for (; row + 4 <= num_rows; row += 4) {
    multiply_rows<4, BITS>(args, weight, first_row + row, out + row * QUANTIZED_OUT);
  }
  for (; row + 2 <= num_rows; row += 2) {
    multiply_rows<2, BITS>(args, weight, first_row + row, out + row * QUANTIZED_OUT);
  }
  for (; row < num_rows; row++) {
    multiply_rows<1, BITS>(args, weight, first_row + row, out + row * QUANTIZED_OUT);
  }
}

// One row of the input to 8 bits: code * scale is the value, sum is that of a group's values.
template <typename T>
void quantize_row(const T* x, int64_t width, int8_t* codes, float* scales, float* sums) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in front
  for (int64_t g = 0; g < width / QUANTIZED_GROUP; g++, x += QUANTIZED_GROUP) {
    Floats values[QUANTIZED_GROUP / LANES], largest = {}, not_finite = {};
    for (int i = 0; i < QUANTIZED_GROUP / LANES; i++) {
      values[i] = load(x + i * LANES);
      largest = larger(largest, larger(values[i], -values[i]));
      not_finite += values[i] * 0.0f;  // NaN if one is; it must not be lost
    }
    const float top = max(largest), inverse = top > 0.0f ? 127.0f / top : 0.0f;
    const float scale = top / 127.0f + sum(not_finite);
    Ints total = {};
    for (int i = 0; i < QUANTIZED_GROUP / LANES; i++) {
      Ints code = bits<Ints>(values[i] * inverse + magic) - bits<Ints>(all(magic));
      total += code;
      for (int lane = 0; lane < LANES; lane++) {
        codes[g * QUANTIZED_GROUP + i * LANES + lane] = static_cast<int8_t>(code[lane]);
      }
    }
    int32_t of_codes = 0;
    for (int lane = 0; lane < LANES; lane++) of_codes += total[lane];
    scales[g] = scale;
    sums[g] = scale * static_cast<float>(of_codes);
  }
}

}  // namespace
}  // namespace tessera
