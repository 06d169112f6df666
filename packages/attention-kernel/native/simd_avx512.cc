// Owns the AVX-512 vector type (16 floats; F, BW, VL). Compiled with its own -m flags; called only after a cpuid check.
#include "tile_kernel.h"
#if defined(__x86_64__)
#include <immintrin.h>

namespace lamina {
namespace {

/** @tparam Locality Of prefetches: 2 into the second-level cache, 3 into the first. */
template <int Locality>
struct Avx512 {
  using Reg = __m512;
  using Half = uint16_t;
  static constexpr int kLanes = 16;
  static constexpr int kPrefetchLocality = Locality;
  /** Widest register tile for R rows: 32 registers hold R x NV sums, NV rows of KV and one broadcast. */
  template <int R>
  static constexpr int vectors() {
    return R <= 6 ? 4 : 2;
  }
  static LAMINA_INLINE Reg zero() { return _mm512_setzero_ps(); }
  static LAMINA_INLINE Reg set1(float x) { return _mm512_set1_ps(x); }
  static LAMINA_INLINE Reg broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static LAMINA_INLINE Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static LAMINA_INLINE Reg load(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static LAMINA_INLINE void store(float* p, Reg x) { _mm512_storeu_ps(p, x); }
  static LAMINA_INLINE Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static LAMINA_INLINE Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static LAMINA_INLINE Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static LAMINA_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static LAMINA_INLINE Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static LAMINA_INLINE Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  static LAMINA_INLINE Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static LAMINA_INLINE bool any_greater(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
  static LAMINA_INLINE float reduce_max(Reg a) { return _mm512_reduce_max_ps(a); }
  /** 2^x for x <= 0: 0 below -126 (no subnormals); NaN stays NaN. */
  static LAMINA_INLINE Reg exp2(Reg x) {
    const Reg clamped = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
    const Reg whole = _mm512_roundscale_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Reg f = _mm512_sub_ps(clamped, whole);
    Reg p = _mm512_set1_ps(kExp2[0]);
    for (int i = 1; i < 7; i++) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2[i]));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), p, whole);
  }
  static LAMINA_INLINE void store(Half* p, Reg x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

}  // namespace

LAMINA_DEFINE_KERNEL(kAvx512Kernel, "native-avx512", "avx512", Avx512<2>)
LAMINA_DEFINE_KERNEL(kAvx512NearKernel, "native-avx512", "avx512", Avx512<3>)

}  // namespace lamina
#endif
