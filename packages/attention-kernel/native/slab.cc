// Owns the memory of all KV blocks (see slab.h).
#include "slab.h"

#include <sys/mman.h>

#include <new>

namespace lamina {

Slab::Slab(const KvShape& shape, int32_t num_blocks)
    : half_bytes_(size_t(shape.block_size_tokens) * shape.head_dim * element_bytes(shape)),
      block_stride_bytes_(size_t(shape.num_kv_heads) * 2 * half_bytes_),
      layer_stride_bytes_(block_stride_bytes_ * num_blocks),
      num_bytes_(layer_stride_bytes_ * shape.num_layers),
      mapped_bytes_((num_bytes_ + 4095) / 4096 * 4096) {
  void* mapping = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  // Fewer TLB misses when a request's blocks are scattered; a refusal costs only speed.
  if (mapped_bytes_ >= size_t(64) << 20) (void)madvise(mapping, mapped_bytes_, MADV_HUGEPAGE);
#endif
  data_ = static_cast<uint8_t*>(mapping);
}

Slab::~Slab() { munmap(data_, mapped_bytes_); }

}  // namespace lamina
