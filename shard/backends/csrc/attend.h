// Divides the attention of a step into tasks and runs them on torch's threads.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace tessera {

// The host-side view of a step; pointers to S + 1 and S integers.
struct StepShape {
  const int32_t* query_start;
  const int32_t* context_lens;
  int64_t num_sequences;
};

template <typename T>
void attend(const Kernels& kernels, const AttendArgs<T>& args, const StepShape& step);

}  // namespace tessera
