// Vectors of floats as wide as the instruction set allows, in GCC's vector extension.
// Everything here is local to the including file: it is compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace tessera {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

constexpr float LOWEST = -3.402823466e38f;  // a maximum below every number

template <typename To, typename From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename V>
inline V load_raw(const void* from) {
  V to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

inline Floats all(float x) { return x - Floats{}; }

// A NaN in `a` stays: the comparison is false and selects `a`.
inline Floats larger(Floats a, Floats b) { return a < b ? b : a; }
inline Floats smaller(Floats a, Floats b) { return a > b ? b : a; }

// GCC converts these vectors in halves if it is not told the instruction.
inline Words to_words(Halves x) {
#if defined(__AVX512F__)
  return bits<Words>(_mm512_cvtepu16_epi32(bits<__m256i>(x)));
#elif defined(__AVX2__)
  return bits<Words>(_mm256_cvtepu16_epi32(bits<__m128i>(x)));
#else
  return __builtin_convertvector(x, Words);
#endif
}
inline Words to_words(Bytes x) {
#if defined(__AVX512F__)
  return bits<Words>(_mm512_cvtepu8_epi32(bits<__m128i>(x)));
#elif defined(__AVX2__)
  return bits<Words>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bits<int64_t>(x))));
#else
  return __builtin_convertvector(x, Words);
#endif
}
inline Halves to_halves(Words x) {
#if defined(__AVX512F__)
  return bits<Halves>(_mm512_cvtepi32_epi16(bits<__m512i>(x)));
#else
  return __builtin_convertvector(x, Halves);
#endif
}

inline Floats widen(Halves x) { return bits<Floats>(to_words(x) << 16); }

// To the nearest, ties to even; NaN becomes the quiet NaN.
inline Halves narrow(Floats x) {
#if defined(__AVX512BF16__)
  return bits<Halves>(_mm512_cvtneps_pbh(bits<__m512>(x)));
#else
  Words raw = bits<Words>(x);
  Words rounded = (raw + 0x7fffu + ((raw >> 16) & 1u)) >> 16;
  return to_halves(x == x ? rounded : Words{} + 0x7fc0u);
#endif
}

inline Floats load(const float* from) { return load_raw<Floats>(from); }
inline Floats load(const bf16* from) { return widen(load_raw<Halves>(from)); }
inline Words load(const uint8_t* from) { return to_words(load_raw<Bytes>(from)); }
inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof(x)); }
inline void store(bf16* to, Floats x) {
  Halves narrowed = narrow(x);
  std::memcpy(to, &narrowed, sizeof(narrowed));
}

// x as a tensor of T would keep it.
inline Floats rounded(Floats x, const float*) { return x; }
inline Floats rounded(Floats x, const bf16*) { return widen(narrow(x)); }

// Where LANES elements are, or fewer at the end of a row: loads fill up with 0.
struct Span {
  int64_t at;
  int64_t count;

  template <typename T>
  auto load(const T* from) const {
    if (count == LANES) return tessera::load(from + at);
    T copy[LANES] = {};
    std::memcpy(copy, from + at, count * sizeof(T));
    return tessera::load(copy);
  }
  template <typename T>
  void store(T* to, Floats x) const {
    if (count == LANES) return tessera::store(to + at, x);
    T copy[LANES];
    tessera::store(copy, x);
    std::memcpy(to + at, copy, count * sizeof(T));
  }
};

// Calls body(span) for the spans of a row of n elements.
template <typename Body>
inline void for_each_span(int64_t n, Body body) {
  int64_t at = 0;
  for (; at + LANES <= n; at += LANES) body(Span{at, LANES});
  if (at < n) body(Span{at, n - at});
}

inline Floats shuffle(Floats a, Floats b, Ints lanes) {  // lanes of b are counted from LANES on
  return __builtin_shuffle(a, b, lanes);
}

inline Ints lane_numbers() {
  Ints lanes;
  for (int i = 0; i < LANES; i++) lanes[i] = i;
  return lanes;
}

inline Floats zip_low(Floats a, Floats b) {  // a0 b0 a1 b1 ...
  Ints i = lane_numbers();
  return shuffle(a, b, (i >> 1) + (i & 1) * LANES);
}
inline Floats zip_high(Floats a, Floats b) {
  Ints i = lane_numbers();
  return shuffle(a, b, (i >> 1) + (i & 1) * LANES + LANES / 2);
}

// Zipping row i with row i + LANES / 2 rotates the bits of (row, lane) by one place; doing it
// log2(LANES) times swaps row and lane.
inline void transpose(Floats (&rows)[LANES]) {
  for (int stage = 1; stage < LANES; stage *= 2) {
    Floats zipped[LANES];
    for (int i = 0; i < LANES / 2; i++) {
      zipped[2 * i] = zip_low(rows[i], rows[i + LANES / 2]);
      zipped[2 * i + 1] = zip_high(rows[i], rows[i + LANES / 2]);
    }
    for (int i = 0; i < LANES; i++) rows[i] = zipped[i];
  }
}

inline float sum(Floats x) {
  for (int step = LANES / 2; step > 0; step /= 2) x += shuffle(x, x, lane_numbers() ^ step);
  return x[0];
}
inline float max(Floats x) {
  for (int step = LANES / 2; step > 0; step /= 2) {
    x = larger(x, shuffle(x, x, lane_numbers() ^ step));
  }
  return x[0];
}

// 2^x for x up to 127, relative error 2e-7; 0 below -126 (no denormals), NaN for NaN.
// Splits x = n + f with |f| <= 1/2; the polynomial is a minimax fit of (2^f - 1) / f.
inline Floats exp2(Floats x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves n in the lowest bits
  Floats shifted = x + magic;
  Floats f = x - (shifted - magic);
  Floats p = f * 0.001326472614891827f + 0.009671512991189957f;
  p = p * f + 0.05550733581185341f;
  p = p * f + 0.24022242426872253f;
  p = p * f + 0.6931470036506653f;
  p = p * f + 1.0f;
  Floats power = bits<Floats>(bits<Words>(p) + (bits<Words>(shifted) << 23));
  return x < -126.0f ? Floats{} : power;
}

}  // namespace
}  // namespace tessera
