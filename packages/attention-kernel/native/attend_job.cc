// Owns one attend (see attend_job.h).
#include "attend_job.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

namespace lamina {

WorkerScratch::WorkerScratch() : memory_(nullptr) {
  const size_t q = size_t(kTileRows) * kRowStride;
  const size_t scores = size_t(kChunkRows) * kScoreStride;
  const size_t floats = 2 * q + scores + kTileRows + size_t(kTileRows) * kMaxLanes;
  const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
  if (posix_memalign(&memory_, 64, bytes) != 0) throw std::bad_alloc();
  std::memset(memory_, 0, bytes);
  float* at = static_cast<float*>(memory_);
  view_.q = at;
  view_.acc = at += q;
  view_.scores = at += q;
  view_.sum = at += scores;
  view_.maximum = at += size_t(kTileRows) * kMaxLanes;
}

WorkerScratch::~WorkerScratch() { std::free(memory_); }

/** One token's K of one KV head: element d goes to column `offset` of row d. */
template <class T>
static void store_column(const uint8_t* source, uint8_t* block, int32_t offset, const KvShape& shape) {
  T row[kMaxHeadDim];
  std::memcpy(row, source, size_t(shape.head_dim) * sizeof(T));
  T* target = reinterpret_cast<T*>(block) + offset;
  for (int32_t d = 0; d < shape.head_dim; d++) target[ptrdiff_t(d) * shape.block_size_tokens] = row[d];
}

void run_store_unit(const Engine& engine, const Job& job, int32_t unit) {
  const Step& step = *job.step;
  const KvShape& shape = engine.shape;
  const Slab& slab = *engine.slab;
  const auto store_k = shape.is_f16 ? store_column<uint16_t> : store_column<uint32_t>;
  const int32_t begin = unit * step.rows_per_store_unit;
  const int32_t end = std::min(step.num_kv_rows, begin + step.rows_per_store_unit);
  const size_t head_bytes = size_t(shape.head_dim) * element_bytes(shape);
  const size_t row_bytes = head_bytes * shape.num_kv_heads;
  const uint8_t* k = job.qkv + size_t(step.num_query_rows) * shape.num_heads * head_bytes;
  const uint8_t* v = k + size_t(step.num_kv_rows) * row_bytes;
  // Heads outside, rows inside: the rows of a chunk share a block, which then stays in the first-level cache.
  for (int32_t head = 0; head < shape.num_kv_heads; head++) {
    uint8_t* base = slab.head(job.layer, head);
    for (int32_t row = begin; row < end; row++) {
      const int32_t slot = step.kv_slots[row];
      const int32_t offset = slot % shape.block_size_tokens;
      uint8_t* block = base + size_t(slot / shape.block_size_tokens) * slab.block_stride_bytes();
      const size_t source = size_t(row) * row_bytes + head * head_bytes;
      store_k(k + source, block, offset, shape);
      std::memcpy(block + slab.half_bytes() + size_t(offset) * head_bytes, v + source, head_bytes);
    }
  }
}

/** One row's (acc, maximum, sum) to the caller's bytes. */
static void write_row(const Engine& engine, const Job& job, const Group& group, int32_t row, const float* acc,
                      float maximum, float sum) {
  const KvShape& shape = engine.shape;
  const int32_t group_size = shape.num_heads / shape.num_kv_heads;
  const int32_t index = group.row_begin + row;
  const size_t query_row = size_t(job.step->segments[group.segment].query_row_start) + index / group_size;
  const size_t cell = query_row * shape.num_heads + size_t(group.kv_head) * group_size + index % group_size;
  const size_t cells = size_t(job.step->num_query_rows) * shape.num_heads;
  float normalized[kMaxHeadDim];
  const bool empty = sum == 0.0f;
  const float inverse = empty ? 0.0f : 1.0f / sum;
  for (int32_t d = 0; d < shape.head_dim; d++) normalized[d] = acc[d] * inverse;
  const float lse = empty ? -INFINITY : float((double(maximum) + std::log2(double(sum))) * kLn2);
  const size_t head_bytes = size_t(shape.head_dim) * element_bytes(shape);
  if (shape.is_f16) {
    uint16_t halves[kMaxHeadDim];
    engine.simd->to_halves(normalized, halves, size_t(shape.head_dim));
    std::memcpy(job.out + cell * head_bytes, halves, head_bytes);
  } else {
    std::memcpy(job.out + cell * head_bytes, normalized, head_bytes);
  }
  std::memcpy(job.out + cells * head_bytes + cell * 4, &lse, 4);
}

/** Merges the partials of a group; runs after all of them are written. */
static void merge_group(const Engine& engine, const Job& job, const Group& group) {
  const int32_t head_dim = engine.shape.head_dim;
  const size_t row_floats = size_t(head_dim) + 2;
  const size_t unit_floats = row_floats * group.num_rows;
  for (int32_t row = 0; row < group.num_rows; row++) {
    const float* first = job.step->partials.data() + group.partial_offset + row * row_floats;
    float maximum = kNoScore;
    for (int32_t unit = 0; unit < group.num_units; unit++) {
      const float* partial = first + unit * unit_floats;
      if (partial[head_dim + 1] != 0.0f && partial[head_dim] > maximum) maximum = partial[head_dim];
    }
    float acc[kMaxHeadDim] = {};
    float sum = 0;
    for (int32_t unit = 0; unit < group.num_units; unit++) {
      const float* partial = first + unit * unit_floats;
      if (partial[head_dim + 1] == 0.0f) continue;
      const float weight = std::exp2(partial[head_dim] - maximum);
      sum += weight * partial[head_dim + 1];
      for (int32_t d = 0; d < head_dim; d++) acc[d] += weight * partial[d];
    }
    write_row(engine, job, group, row, acc, maximum, sum);
  }
}

static void run_attend_unit(const Engine& engine, const Job& job, int32_t index, int32_t end, const Scratch& scratch) {
  Step& step = *job.step;
  const KvShape& shape = engine.shape;
  Division& division = engine.division_of(job);
  const Unit& unit = division.units[index];
  const Group& group = division.groups[unit.group];
  const Segment& segment = step.segments[group.segment];
  const int32_t head_dim = shape.head_dim;
  TileTask task;
  task.kv = engine.slab->head(job.layer, group.kv_head);
  task.block_stride_bytes = engine.slab->block_stride_bytes();
  task.v_offset_bytes = engine.slab->half_bytes();
  task.blocks = step.blocks.data() + unit.block_begin;
  task.num_blocks = unit.block_end - unit.block_begin;
  task.next_kv = nullptr;
  task.next_blocks = nullptr;
  task.next_num_blocks = 0;
  if (index + 1 < end) {
    const Unit& next = division.units[index + 1];
    task.next_kv = engine.slab->head(job.layer, division.groups[next.group].kv_head);
    task.next_blocks = step.blocks.data() + next.block_begin;
    task.next_num_blocks = next.block_end - next.block_begin;
  }
  task.row_begin = group.row_begin;
  task.num_rows = group.num_rows;
  task.group = shape.num_heads / shape.num_kv_heads;
  task.first_position = segment.first_position;
  task.head_dim = head_dim;
  task.block_size_tokens = shape.block_size_tokens;
  task.window_tokens = division.window_tokens;
  const ScoreRules& rules = *engine.rules;
  task.softcap = rules.softcap;
  task.alibi_slopes = rules.alibi_slopes.empty() ? nullptr : rules.alibi_slopes.data() + group.kv_head * task.group;
  task.adjusts_scores = task.softcap != 0.0f || task.alibi_slopes != nullptr;

  const float scale = shape.scale * kLog2E;
  for (int32_t row = 0; row < group.num_rows; row++) {
    const int32_t flat = group.row_begin + row;
    const size_t cell = (size_t(segment.query_row_start) + flat / task.group) * shape.num_heads +
                        size_t(group.kv_head) * task.group + flat % task.group;
    float* q = scratch.q + row * kRowStride;
    const size_t head_bytes = size_t(head_dim) * element_bytes(shape);
    if (shape.is_f16) {
      uint16_t halves[kMaxHeadDim];
      std::memcpy(halves, job.qkv + cell * head_bytes, head_bytes);
      engine.simd->to_floats(halves, q, size_t(head_dim));
    } else {
      std::memcpy(q, job.qkv + cell * head_bytes, head_bytes);
    }
    for (int32_t d = 0; d < head_dim; d++) q[d] *= scale;
  }
  (shape.is_f16 ? engine.simd->attend_tile_f16 : engine.simd->attend_tile_f32)(task, scratch);

  if (group.num_units == 1) {
    for (int32_t row = 0; row < group.num_rows; row++)
      write_row(engine, job, group, row, scratch.acc + row * kRowStride, scratch.maximum[row],
                scratch.sum[row * kMaxLanes]);
    return;
  }
  const size_t row_floats = size_t(head_dim) + 2;
  float* partial = step.partials.data() + group.partial_offset + row_floats * group.num_rows * unit.index_in_group;
  for (int32_t row = 0; row < group.num_rows; row++, partial += row_floats) {
    std::memcpy(partial, scratch.acc + row * kRowStride, size_t(head_dim) * 4);
    partial[head_dim] = scratch.maximum[row];
    partial[head_dim + 1] = scratch.sum[row * kMaxLanes];
  }
  std::atomic<int32_t>& pending = division.pending[unit.group];
  if (pending.fetch_sub(1, std::memory_order_acq_rel) == 1) {
    merge_group(engine, job, group);
    pending.store(group.num_units, std::memory_order_relaxed);
  }
}

void run_attend_units(const Engine& engine, const Job& job, int32_t begin, int32_t end, const Scratch& scratch) {
  for (int32_t unit = begin; unit < end; unit++) run_attend_unit(engine, job, unit, end, scratch);
}

}  // namespace lamina
