// Owns the vector type for every other processor: 4 floats as the compiler's generic vector, no intrinsics.
#include <cmath>
#include <cstring>

#include "tile_kernel.h"

namespace lamina {
namespace {

struct Scalar {
  typedef float Reg __attribute__((vector_size(16)));
  using Half = uint16_t;
  static constexpr int kLanes = 4;
  static constexpr int kPrefetchLocality = 2;
  template <int R>
  static constexpr int vectors() {
    return R <= 2 ? 4 : R <= 6 ? 2 : 1;
  }
  static LAMINA_INLINE Reg set1(float x) { return Reg{x, x, x, x}; }
  static LAMINA_INLINE Reg zero() { return set1(0.0f); }
  static LAMINA_INLINE Reg broadcast(const float* p) { return set1(*p); }
  static LAMINA_INLINE Reg load(const float* p) {
    Reg x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static LAMINA_INLINE float to_float(Half h) {
    // Shift exponent and fraction into place, then repair the bias with an exact multiplication (subnormals included).
    uint32_t bits = uint32_t(h & 0x7fff) << 13;
    float x;
    std::memcpy(&x, &bits, 4);
    x *= 0x1p112f;
    std::memcpy(&bits, &x, 4);
    if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000u;
    bits |= uint32_t(h & 0x8000) << 16;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  static LAMINA_INLINE Half to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude >= 0x7f800000u) return Half(sign | (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u));
    if (magnitude >= 0x477ff000u) return Half(sign | 0x7c00u);
    if (magnitude < 0x38800000u) return Half(sign | uint32_t(std::nearbyint(std::fabs(value) * 16777216.0f)));
    return Half(sign | ((magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13));
  }
  static LAMINA_INLINE Reg load(const Half* p) { return Reg{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
  static LAMINA_INLINE void store(float* p, Reg x) { std::memcpy(p, &x, sizeof x); }
  static LAMINA_INLINE Reg add(Reg a, Reg b) { return a + b; }
  static LAMINA_INLINE Reg sub(Reg a, Reg b) { return a - b; }
  static LAMINA_INLINE Reg mul(Reg a, Reg b) { return a * b; }
  static LAMINA_INLINE Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static LAMINA_INLINE Reg max(Reg a, Reg b) { return a > b ? a : b; }
  static LAMINA_INLINE Reg min(Reg a, Reg b) { return a < b ? a : b; }
  static LAMINA_INLINE Reg div(Reg a, Reg b) { return a / b; }
  static LAMINA_INLINE bool any_greater(Reg a, Reg b) {
    return a[0] > b[0] || a[1] > b[1] || a[2] > b[2] || a[3] > b[3];
  }
  static LAMINA_INLINE float reduce_max(Reg a) {
    const float x = a[0] > a[1] ? a[0] : a[1];
    const float y = a[2] > a[3] ? a[2] : a[3];
    return x > y ? x : y;
  }
  /** 2^x for x <= 0: 0 below -126 (no subnormals); NaN stays NaN. */
  static LAMINA_INLINE Reg exp2(Reg x) {
    Reg y;
    for (int lane = 0; lane < 4; lane++) {
      if (x[lane] < -126.0f) {
        y[lane] = 0.0f;
        continue;
      }
      const float whole = std::nearbyint(x[lane]);
      const float f = x[lane] - whole;
      float p = kExp2[0];
      for (int i = 1; i < 7; i++) p = p * f + kExp2[i];
      const uint32_t bits = whole == whole ? uint32_t(int32_t(whole) + 127) << 23 : 0x3f800000u;
      float power;
      std::memcpy(&power, &bits, 4);
      y[lane] = p * power;
    }
    return y;
  }
  static LAMINA_INLINE void store(Half* p, Reg x) {
    for (int lane = 0; lane < 4; lane++) p[lane] = to_half(x[lane]);
  }
};

}  // namespace

LAMINA_DEFINE_KERNEL(kScalarKernel, "native-scalar", "scalar", Scalar)

}  // namespace lamina
