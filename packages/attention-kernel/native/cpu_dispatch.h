// Owns the choice of a SIMD variant at run time.
#pragma once
#include <string>
#include <vector>

#include "attention_types.h"

namespace lamina {

/** The variants that this processor can run, fastest first; 'scalar' is always last. */
std::vector<const SimdKernel*> supported_kernels();

/** The first of these. */
const SimdKernel& fastest_kernel();

/** The fastest supported variant whose lanes divide the shape; `simd` empty or the one wanted. Null if there is none. */
const SimdKernel* choose_kernel(const KvShape& shape, const std::string& simd);

}  // namespace lamina
