// Owns the functions of scores that are written once over a vector type V.
//
// Invariants
// 1. Everything is in an unnamed namespace, as in tile_kernel.h.
#pragma once
#include "attention_types.h"

namespace lamina {
namespace {

#define LAMINA_INLINE inline __attribute__((always_inline))

/** 0, 1, 2, ...: what a token's column adds to its distance. */
struct Columns {
  float index[kStepTokens];
  constexpr Columns() : index() {
    for (int i = 0; i < kStepTokens; i++) index[i] = float(i);
  }
};
constexpr Columns kColumn;

/** Odd and even coefficients of a rational tanh on [-kTanhBound, kTanhBound], highest power first; beyond it is 1 in float32. */
constexpr float kTanhBound = 7.90531110763549805f;
constexpr float kTanhNumerator[7] = {-2.76076847742355e-16f, 2.00018790482477e-13f, -8.60467152213735e-11f,
                                     5.12229709037114e-08f,  1.48572235717979e-05f, 6.37261928875436e-04f,
                                     4.89352455891786e-03f};
constexpr float kTanhDenominator[4] = {1.19825839466702e-06f, 1.18534705686654e-04f, 2.26843463243900e-03f,
                                       4.89352518554385e-03f};

/** Relative error below 1e-6 (also near 0, where 1 - exp would cancel); NaN stays NaN. */
template <class V>
LAMINA_INLINE typename V::Reg tanh(typename V::Reg x) {
  x = V::min(V::set1(kTanhBound), V::max(V::set1(-kTanhBound), x));
  const typename V::Reg square = V::mul(x, x);
  typename V::Reg p = V::set1(kTanhNumerator[0]);
  for (int i = 1; i < 7; i++) p = V::fma(p, square, V::set1(kTanhNumerator[i]));
  typename V::Reg q = V::set1(kTanhDenominator[0]);
  for (int i = 1; i < 4; i++) q = V::fma(q, square, V::set1(kTanhDenominator[i]));
  return V::div(V::mul(x, p), q);
}

/** Coefficients of 2^f on [-0.5, 0.5], relative error 2e-7, highest power first. */
constexpr float kExp2[7] = {1.535336188319500e-4f, 1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f,
                            2.402264791363012e-1f, 6.931472028550421e-1f, 1.0f};

}  // namespace
}  // namespace lamina
