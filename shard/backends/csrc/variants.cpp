#include "variants.h"

namespace tessera {
namespace {

std::vector<Variant> find_variants() {
  std::vector<Variant> found;
#if defined(TESSERA_X86)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) {
    found.push_back({"avx512_bf16", kernels_avx512_bf16()});
  }
  if (avx512) found.push_back({"avx512", kernels_avx512()});
  if (avx2) found.push_back({"avx2", kernels_avx2()});
#endif
  found.push_back({"portable", kernels_portable()});
  return found;
}

}  // namespace

const std::vector<Variant>& variants() {
  static const std::vector<Variant> found = find_variants();
  return found;
}

}  // namespace tessera
