// What choosing a token must know of a row of scores. Local to kernels.cpp, compiled once per
// instruction set.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace tessera {
namespace {

// A NaN is no largest number, but makes the sum NaN.
void survey(const float* scores, int64_t count, RowSurvey* out) {
  const int64_t whole = count / LANES * LANES;
  Floats top = all(LOWEST), total = {};
  Ints at = lane_numbers(), where = at;
  for (int64_t i = 0; i < whole; i += LANES, at += LANES) {
    Floats x = load(scores + i);
    where = x > top ? at : where;
    top = larger(top, x);
    total += x;
  }
  out->max = LOWEST;
  out->index = 0;
  auto take = [out](float x, int64_t index) {
    if (x > out->max || (x == out->max && index < out->index)) out->max = x, out->index = index;
  };
  for (int lane = 0; lane < LANES && whole; lane++) take(top[lane], where[lane]);
  out->sum = sum(total);
  for (int64_t i = whole; i < count; i++) take(scores[i], i), out->sum += scores[i];

  const float log2_e = 1.44269504f;
  Floats powers = {};
  float rest = 0.0f;
  for (int64_t i = 0; i < whole; i += LANES) {
    powers += exp2((load(scores + i) - out->max) * log2_e);
  }
  for (int64_t i = whole; i < count; i++) rest += exp2(all((scores[i] - out->max) * log2_e))[0];
  out->sum_of_powers = sum(powers) + rest;
}

}  // namespace
}  // namespace tessera
