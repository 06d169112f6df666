// Owns the AVX2 + FMA + F16C vector type (8 floats). Compiled with its own -m flags; called only after a cpuid check.
#include "tile_kernel.h"
#if defined(__x86_64__)
#include <immintrin.h>

namespace lamina {
namespace {

struct Avx2 {
  using Reg = __m256;
  using Half = uint16_t;
  static constexpr int kLanes = 8;
  static constexpr int kPrefetchLocality = 2;
  /** Widest register tile for R rows: 16 registers hold R x NV sums, NV rows of KV and one broadcast. */
  template <int R>
  static constexpr int vectors() {
    return R <= 2 ? 4 : R <= 6 ? 2 : 1;
  }
  static LAMINA_INLINE Reg zero() { return _mm256_setzero_ps(); }
  static LAMINA_INLINE Reg set1(float x) { return _mm256_set1_ps(x); }
  static LAMINA_INLINE Reg broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static LAMINA_INLINE Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static LAMINA_INLINE Reg load(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static LAMINA_INLINE void store(float* p, Reg x) { _mm256_storeu_ps(p, x); }
  static LAMINA_INLINE Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static LAMINA_INLINE Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static LAMINA_INLINE Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static LAMINA_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static LAMINA_INLINE Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static LAMINA_INLINE Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  static LAMINA_INLINE Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static LAMINA_INLINE bool any_greater(Reg a, Reg b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
  static LAMINA_INLINE float reduce_max(Reg a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  /** 2^x for x <= 0: 0 below -126 (no subnormals); NaN stays NaN. */
  static LAMINA_INLINE Reg exp2(Reg x) {
    const Reg clamped = _mm256_max_ps(_mm256_set1_ps(-126.0f), x);
    const Reg whole = _mm256_round_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Reg f = _mm256_sub_ps(clamped, whole);
    Reg p = _mm256_set1_ps(kExp2[0]);
    for (int i = 1; i < 7; i++) p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2[i]));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
    const Reg keep = _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
    return _mm256_and_ps(keep, _mm256_mul_ps(p, _mm256_castsi256_ps(power)));
  }
  static LAMINA_INLINE void store(Half* p, Reg x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace

LAMINA_DEFINE_KERNEL(kAvx2Kernel, "native-avx2", "avx2", Avx2)

}  // namespace lamina
#endif
