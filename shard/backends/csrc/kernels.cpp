// The kernels of one instruction set: compiled once for each, with -DTESSERA_ISA=its name.

#include "kernels.h"

#include "attention.h"
#include "linear.h"
#include "quantized.h"
#include "survey.h"
#include "vector.h"

#define TESSERA_JOIN(a, b) a##b
#define TESSERA_NAME(isa) TESSERA_JOIN(kernels_, isa)

namespace tessera {
namespace {

inline float square_root(float x) { return __builtin_sqrtf(x); }

template <typename T>
void add_rms_norm(const T* x, T* residual, const T* weight, T* out, int64_t width, float eps) {
  const T* stream = residual ? residual : x;
  Floats squares = {};
  for_each_span(width, [&](Span span) {
    Floats added = span.load(x);
    if (residual) {
      added = rounded(added + span.load(residual), x);
      span.store(residual, added);
    }
    squares += added * added;
  });
  float scale = 1.0f / square_root(sum(squares) / static_cast<float>(width) + eps);
  for_each_span(width, [&](Span span) {
    span.store(out, rounded(span.load(stream) * scale, x) * span.load(weight));
  });
}

// x / (1 + e^-x) * up
template <typename T>
void silu_mul(const T* gate_up, T* out, int64_t width) {
  const float log2_e = 1.44269504f, largest = 126.0f;  // of the exponent: x / 2^126 is 0
  for_each_span(width, [&](Span span) {
    Floats gate = span.load(gate_up), up = span.load(gate_up + width);
    Floats power = exp2(smaller(gate * -log2_e, all(largest)));
    span.store(out, gate / (power + 1.0f) * up);
  });
}

template <typename T>
void rotate(const T* in, const float* cos_sin, T* out, int64_t head_size) {
  int64_t half = head_size / 2;
  for_each_span(half, [&](Span span) {
    Floats left = span.load(in), right = span.load(in + half);
    Floats cos = span.load(cos_sin), sin = span.load(cos_sin + half);
    span.store(out, left * cos - right * sin);
    span.store(out + half, right * cos + left * sin);
  });
}

template <typename T>
constexpr TypedKernels<T> typed_kernels() {
  return {attend_segment<T>, finish<T>, add_rms_norm<T>, silu_mul<T>, rotate<T>,
          quantize_row<T>};
}

}  // namespace

const Kernels* TESSERA_NAME(TESSERA_ISA)() {
  static constexpr Kernels kernels{scratch_floats,         merge,
                                   multiply_quantized<4>,  multiply_quantized<8>,
                                   MULTIPLY_PAIRED,        PACK_PAIRED,
                                   survey,
                                   typed_kernels<float>(), typed_kernels<bf16>()};
  return &kernels;
}

}  // namespace tessera
