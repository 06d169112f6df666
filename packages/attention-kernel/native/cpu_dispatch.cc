// Owns the choice of a SIMD variant at run time (see cpu_dispatch.h). Compiled without -m flags.
#include "cpu_dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace lamina {

#if defined(__x86_64__)
static bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & (1u << 29)) != 0;
}
#endif

std::vector<const SimdKernel*> supported_kernels() {
  std::vector<const SimdKernel*> kernels;
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    // One core of a Zen 5 reads 26 to 33 GB/s of KV so, and 23 to 29 with what comes next in its second-level cache only.
    kernels.push_back(__builtin_cpu_is("amd") ? &kAvx512NearKernel : &kAvx512Kernel);
  if (avx2) kernels.push_back(&kAvx2Kernel);
#endif
#if defined(__aarch64__)
  kernels.push_back(&kNeonKernel);
#endif
  kernels.push_back(&kScalarKernel);
  return kernels;
}

const SimdKernel& fastest_kernel() {
  static const SimdKernel* const fastest = supported_kernels().front();
  return *fastest;
}

const SimdKernel* choose_kernel(const KvShape& shape, const std::string& simd) {
  for (const SimdKernel* kernel : supported_kernels()) {
    if (!simd.empty() && simd != kernel->simd) continue;
    if (shape.block_size_tokens % kernel->lanes == 0 && shape.head_dim % kernel->lanes == 0) return kernel;
  }
  return nullptr;
}

}  // namespace lamina
