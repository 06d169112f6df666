// Owns the plain data that the addon, the scheduler and the SIMD kernels share: shapes, tiles, scratch, the kernel table.
//
// Invariants
// 1. Nothing here has code that a SIMD translation unit could compile with its own -m flags and share with another:
//    only constants and aggregates (no inline functions with external linkage, no std:: templates).
// 2. Slab layout: [layer][block][kvHead]{ K transposed [headDim][blockSizeTokens], V [blockSizeTokens][headDim] }.
//    K is transposed so that a score needs no horizontal sum: one vector register holds one dimension of many tokens.
#pragma once
#include <cstddef>
#include <cstdint>

namespace lamina {

constexpr int kMaxHeadDim = 256;
/** Query rows (query x head of the group) that share one pass over KV. */
constexpr int kTileRows = 32;
/** Rows whose scores are in flight at once; the micro kernel's register tile is at most this high. */
constexpr int kChunkRows = 8;
/** Tokens whose scores are computed before one softmax update. */
constexpr int kStepTokens = 64;
/** Row strides in floats; constants, so that the micro kernels address all rows from one register. */
constexpr int kRowStride = kMaxHeadDim + 16;
constexpr int kScoreStride = kStepTokens + 16;
/** Widest vector of any variant, in floats. */
constexpr int kMaxLanes = 16;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr double kLn2 = 0.69314718055994530942;
/** Running maximum before any key was seen: finite, so that subtracting it never makes NaN. */
constexpr float kNoScore = -1e30f;
/** A window that hides no token. */
constexpr int32_t kNoWindow = INT32_MAX;

struct KvShape {
  int32_t num_layers;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t block_size_tokens;
  float scale;
  /** Of K and V in the slab, and of q, k, v and o as they come and go; else float32. */
  bool is_f16;
};

struct BlockRef {
  int32_t physical_block;
  int32_t first_position;
  int32_t num_tokens;
};

/** Some query rows of one KV head against some blocks of one segment. Row r is query (row_begin + r) / group. */
struct TileTask {
  /** K of this layer and KV head in physical block 0. */
  const uint8_t* kv;
  size_t block_stride_bytes;
  size_t v_offset_bytes;
  const BlockRef* blocks;
  int32_t num_blocks;
  /** As kv, blocks and num_blocks, of what the same thread attends to next: only prefetched. 0 blocks if unknown. */
  const uint8_t* next_kv;
  const BlockRef* next_blocks;
  int32_t next_num_blocks;
  int32_t row_begin;
  int32_t num_rows;
  int32_t group;
  /** Absolute position of query 0 of the segment. */
  int32_t first_position;
  int32_t head_dim;
  int32_t block_size_tokens;
  /** A query sees the keys with 0 <= queryPosition - keyPosition < window_tokens. */
  int32_t window_tokens;
  /** True when softcap or alibi_slopes change the scores. */
  bool adjusts_scores;
  /** Scores become softcap * tanh(score / softcap), in log2 units; 0 = off. */
  float softcap;
  /** [group] slopes of this KV head's query heads in log2 units, or null. */
  const float* alibi_slopes;
};

/** One per worker thread; every pointer 64-byte aligned. */
struct Scratch {
  /** [kTileRows][kRowStride]: queries times scale * log2(e). */
  float* q;
  /** [kChunkRows][kScoreStride]. */
  float* scores;
  /** [kTileRows][kRowStride]: sum of p * v, not normalized. */
  float* acc;
  /** [kTileRows]: running maximum in log2 units. */
  float* maximum;
  /** [kTileRows][kMaxLanes]: sums of p per lane; lane 0 holds the total when attend_tile returns. */
  float* sum;
};

struct SimdKernel {
  /** As in AttentionKernel.name. */
  const char* name;
  /** As in createKernel's `simd`. */
  const char* simd;
  /** blockSizeTokens and headDim must be multiples of this. */
  int32_t lanes;
  void (*attend_tile_f16)(const TileTask&, const Scratch&);
  void (*attend_tile_f32)(const TileTask&, const Scratch&);
  /** float16 to float32, exactly; any count. */
  void (*to_floats)(const uint16_t* from, float* to, size_t count);
  /** float32 to the nearest float16, ties to even, beyond its range infinity; any count. */
  void (*to_halves)(const float* from, uint16_t* to, size_t count);
  /** Index of the first largest value; -1 when that is not finite or some value is NaN. */
  int32_t (*argmax)(const float* values, int32_t count);
  /** Reads every byte (a multiple of 256, 64-byte aligned) and adds it up: the bandwidth that attention is measured against. */
  float (*bare_read)(const uint8_t* bytes, size_t num_bytes);
  /** Floating-point operations of `num_rounds` rounds of register-only multiply-adds: the peak that prefill is measured against. */
  double (*multiply_add)(int64_t num_rounds);
};

#if defined(__x86_64__)
extern const SimdKernel kAvx512Kernel;
extern const SimdKernel kAvx512NearKernel;
extern const SimdKernel kAvx2Kernel;
#endif
#if defined(__aarch64__)
extern const SimdKernel kNeonKernel;
#endif
extern const SimdKernel kScalarKernel;

}  // namespace lamina
