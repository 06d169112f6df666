// Owns the yardsticks of the kernel: how fast this machine reads memory, and multiplies and adds, when it does nothing else.
#pragma once
#include <chrono>
#include <thread>
#include <vector>

#include "attention_types.h"

namespace lamina {

/** Seconds to read `num_bytes` (rounded down to 256 per thread), split over threads; the caller waits. */
inline double bare_read_seconds(const SimdKernel& simd, const uint8_t* data, size_t num_bytes, int32_t num_threads) {
  const size_t share = num_bytes / size_t(num_threads) / 256 * 256;
  std::vector<float> sums(static_cast<size_t>(num_threads));
  std::vector<std::thread> threads;
  const auto start = std::chrono::steady_clock::now();
  for (int32_t i = 1; i < num_threads; i++)
    threads.emplace_back([&, i] { sums[size_t(i)] = simd.bare_read(data + share * size_t(i), share); });
  sums[0] = simd.bare_read(data, share);
  for (std::thread& thread : threads) thread.join();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  volatile float sink = 0;
  for (float sum : sums) sink = sink + sum;
  return seconds;
}

/** Floating-point operations per second of one core, from some milliseconds of multiply-adds; the caller waits. */
inline double peak_flops(const SimdKernel& simd) {
  const auto start = std::chrono::steady_clock::now();
  const double operations = simd.multiply_add(int64_t(1) << 20);
  return operations / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace lamina
