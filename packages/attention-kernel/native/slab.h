// Owns the memory of all KV blocks: one anonymous mapping, committed by the operating system when first written.
//
// Invariants
// 1. Exactly numBlocks * blockBytes are ever used (the mapping is rounded up to whole pages and never grows).
// 2. Page-aligned, so every (layer, block, head) starts on a multiple of its own power-of-two size up to 64 bytes.
#pragma once
#include "attention_types.h"

namespace lamina {

inline size_t element_bytes(const KvShape& shape) { return shape.is_f16 ? 2 : 4; }

class Slab {
 public:
  /** Throws std::bad_alloc when the operating system refuses the size. */
  Slab(const KvShape& shape, int32_t num_blocks);
  ~Slab();
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;

  /** K (or V) of one head of one block. */
  size_t half_bytes() const { return half_bytes_; }
  size_t block_stride_bytes() const { return block_stride_bytes_; }
  size_t num_bytes() const { return num_bytes_; }
  uint8_t* data() const { return data_; }
  /** K of `kv_head` of physical block 0 in `layer`. */
  uint8_t* head(int32_t layer, int32_t kv_head) const {
    return data_ + size_t(layer) * layer_stride_bytes_ + size_t(kv_head) * 2 * half_bytes_;
  }

 private:
  size_t half_bytes_;
  size_t block_stride_bytes_;
  size_t layer_stride_bytes_;
  size_t num_bytes_;
  size_t mapped_bytes_;
  uint8_t* data_;
};

}  // namespace lamina
