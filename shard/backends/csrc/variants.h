// The kernels that this build has and this processor can run.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace tessera {

struct Variant {
  std::string name;
  const Kernels* kernels;
};

// The best first; never empty.
const std::vector<Variant>& variants();

}  // namespace tessera
