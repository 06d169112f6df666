// Owns what a model does to its scores beyond scale and causality: soft-cap, sliding windows, ALiBi.
//
// Invariants
// 1. A kernel without any of them has softcap 0, one window of all tokens, and no slopes.
// 2. Windows are listed once: layers that see the same share a division of the step (see step.h).
#pragma once
#include <cstdint>
#include <vector>

#include "attention_types.h"

namespace lamina {

struct ScoreRules {
  /** In log2 units, as scores are; 0 = off. */
  float softcap = 0;
  /** Distinct windows in tokens; kNoWindow sees all. */
  std::vector<int32_t> windows;
  /** [num_layers] Index into `windows`. */
  std::vector<int32_t> window_of_layer;
  /** [num_heads] in log2 units per token, or empty. */
  std::vector<float> alibi_slopes;

  /** `window_tokens`: [num_layers], 0 = all, or empty; `slopes`: [num_heads] or empty. */
  ScoreRules(const KvShape& shape, double softcap_natural, const std::vector<int32_t>& window_tokens,
             const std::vector<float>& slopes)
      : softcap(float(softcap_natural) * kLog2E), alibi_slopes(slopes) {
    for (float& slope : alibi_slopes) slope *= kLog2E;
    for (int32_t layer = 0; layer < shape.num_layers; layer++) {
      const int32_t given = window_tokens.empty() ? 0 : window_tokens[size_t(layer)];
      const int32_t window = given == 0 ? kNoWindow : given;
      size_t index = 0;
      while (index < windows.size() && windows[index] != window) index++;
      if (index == windows.size()) windows.push_back(window);
      window_of_layer.push_back(int32_t(index));
    }
  }
};

}  // namespace lamina
