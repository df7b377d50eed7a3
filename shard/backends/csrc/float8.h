// Numbers of 8 bits to floats, without an instruction for it. Local to kernels.cpp, compiled once per
// instruction set.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace tessera {
namespace {

struct E4M3 {  // exponent and fraction bits; this one has no infinity
  static constexpr int FRACTION = 3;
  static constexpr int BIAS = 7;
  static constexpr uint32_t FIRST_SPECIAL = 0x7f;  // from this code on: not finite
};

struct E5M2 {
  static constexpr int FRACTION = 2;
  static constexpr int BIAS = 15;
  static constexpr uint32_t FIRST_SPECIAL = 0x7c;
};

// Exponent and fraction move to where a float has them; codes below the smallest exponent are their
// value in units of the smallest number.
template <typename Format>
inline Floats from_float8(Words byte) {
  constexpr uint32_t shift = 23 - Format::FRACTION, offset = (127 - Format::BIAS) << 23;
  constexpr float smallest = 1.0f / (1 << (Format::BIAS - 1 + Format::FRACTION));
  Words code = byte & 0x7fu, none = {};
  Words normal = (code << shift) + offset + (code < Format::FIRST_SPECIAL ? none : none + offset);
  Floats small = __builtin_convertvector(bits<Ints>(code), Floats) * smallest;
  Words value = code < (1u << Format::FRACTION) ? bits<Words>(small) : normal;
  return bits<Floats>(value | ((byte & 0x80u) << 24));
}

template <typename Format, typename T>
inline void widen_row(const uint8_t* from, T* to, int64_t count) {
  for_each_span(count,
                [&](Span span) { span.store(to, from_float8<Format>(span.load(from))); });
}

#if defined(__AVX512BW__)
// What all codes without a sign are as bfloat16.
template <typename Format>
struct Bf16Table {
  uint16_t of[128] = {};

  constexpr Bf16Table() {
    constexpr uint32_t shift = 7 - Format::FRACTION, offset = (127 - Format::BIAS) << 7;
    for (uint32_t code = 0; code < 128; code++) {
      of[code] = (code << shift) + (code < Format::FIRST_SPECIAL ? offset : 2 * offset);
    }
    of[0] = 0;
    for (uint32_t code = 1, top = 0; code < 1u << Format::FRACTION; code++) {
      if (code >> (top + 1)) top++;
      uint32_t exponent = 128 - Format::BIAS - Format::FRACTION + top;
      of[code] = (exponent << 7) | ((code << (7 - top)) & 0x7f);
    }
  }
};

// Half of the instructions, and these are what attention over such a cache waits for.
template <typename Format>
inline void widen_row(const uint8_t* from, bf16* to, int64_t count) {
  static constexpr Bf16Table<Format> table;
  __m512i parts[4];
  for (int i = 0; i < 4; i++) parts[i] = _mm512_loadu_si512(table.of + 32 * i);
  for (int64_t at = 0; at < count; at += 32) {
    const __mmask32 some = count - at < 32 ? (1u << (count - at)) - 1 : ~0u;
    __m512i bytes = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(some, from + at));
    __m512i low = _mm512_permutex2var_epi16(parts[0], bytes, parts[1]);
    __m512i high = _mm512_permutex2var_epi16(parts[2], bytes, parts[3]);
    __mmask32 is_high = _mm512_test_epi16_mask(bytes, _mm512_set1_epi16(0x40));
    __m512i sign = _mm512_and_si512(_mm512_slli_epi16(bytes, 8), _mm512_set1_epi16(int16_t{-32768}));
    __m512i value = _mm512_or_si512(_mm512_mask_blend_epi16(is_high, low, high), sign);
    _mm512_mask_storeu_epi16(to + at, some, value);
  }
}
#endif

// `count` numbers of a cache in 8 bits.
template <typename T>
inline void widen_row(const uint8_t* from, Storage storage, T* to, int64_t count) {
  if (storage == Storage::E4M3) {
    widen_row<E4M3>(from, to, count);
  } else {
    widen_row<E5M2>(from, to, count);
  }
}

}  // namespace
}  // namespace tessera
