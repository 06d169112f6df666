// Owns the NEON vector type (4 floats; every AArch64 core has it, with float16 conversion).
#include "tile_kernel.h"
#if defined(__aarch64__)
#include <arm_neon.h>

namespace lamina {
namespace {

struct Neon {
  using Reg = float32x4_t;
  using Half = uint16_t;
  static constexpr int kLanes = 4;
  static constexpr int kPrefetchLocality = 2;
  /** Widest register tile for R rows: 32 registers hold R x NV sums, NV rows of KV and one broadcast. */
  template <int R>
  static constexpr int vectors() {
    return R <= 6 ? 4 : 2;
  }
  static LAMINA_INLINE Reg zero() { return vdupq_n_f32(0.0f); }
  static LAMINA_INLINE Reg set1(float x) { return vdupq_n_f32(x); }
  static LAMINA_INLINE Reg broadcast(const float* p) { return vld1q_dup_f32(p); }
  static LAMINA_INLINE Reg load(const float* p) { return vld1q_f32(p); }
  static LAMINA_INLINE Reg load(const Half* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static LAMINA_INLINE void store(float* p, Reg x) { vst1q_f32(p, x); }
  static LAMINA_INLINE Reg add(Reg a, Reg b) { return vaddq_f32(a, b); }
  static LAMINA_INLINE Reg sub(Reg a, Reg b) { return vsubq_f32(a, b); }
  static LAMINA_INLINE Reg mul(Reg a, Reg b) { return vmulq_f32(a, b); }
  static LAMINA_INLINE Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  static LAMINA_INLINE Reg max(Reg a, Reg b) { return vmaxq_f32(a, b); }
  static LAMINA_INLINE Reg min(Reg a, Reg b) { return vminq_f32(a, b); }
  static LAMINA_INLINE Reg div(Reg a, Reg b) { return vdivq_f32(a, b); }
  static LAMINA_INLINE bool any_greater(Reg a, Reg b) { return vmaxvq_u32(vcgtq_f32(a, b)) != 0; }
  static LAMINA_INLINE float reduce_max(Reg a) { return vmaxvq_f32(a); }
  /** 2^x for x <= 0: 0 below -126 (no subnormals); NaN stays NaN. */
  static LAMINA_INLINE Reg exp2(Reg x) {
    const Reg clamped = vmaxq_f32(vdupq_n_f32(-126.0f), x);
    const Reg whole = vrndnq_f32(clamped);
    const Reg f = vsubq_f32(clamped, whole);
    Reg p = vdupq_n_f32(kExp2[0]);
    for (int i = 1; i < 7; i++) p = vfmaq_f32(vdupq_n_f32(kExp2[i]), p, f);
    const int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(whole), vdupq_n_s32(127)), 23);
    const uint32x4_t drop = vcltq_f32(x, vdupq_n_f32(-126.0f));
    const Reg y = vmulq_f32(p, vreinterpretq_f32_s32(power));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(y), drop));
  }
  static LAMINA_INLINE void store(Half* p, Reg x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
};

}  // namespace

LAMINA_DEFINE_KERNEL(kNeonKernel, "native-neon", "neon", Neon)

}  // namespace lamina
#endif
