// Owns what is the same for all layers of a step: the plan's copy and its divisions into work units, one per distinct
// window of the layers.
//
// A unit is (segment, KV head, tile of query rows, range of blocks). Units of one (segment, head, tile) form a group; a
// group of several units keeps their partial (acc, maximum, sum) and whoever finishes last merges them exactly.
//
// Invariants
// 1. Indices were checked in TypeScript (plan-check.ts); nothing is checked here.
// 2. A step's partials are used by one attend at a time (the pool runs one job at a time).
// 3. A unit's blocks each hold a position that some query of its tile may see: blocks wholly outside are never read.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "score_rules.h"
#include "slab.h"

namespace lamina {

struct Segment {
  int32_t query_row_start;
  int32_t num_queries;
  int32_t first_position;
  int32_t block_start;
  int32_t num_blocks;
};

struct Group {
  int32_t segment;
  int32_t kv_head;
  int32_t row_begin;
  int32_t num_rows;
  int32_t num_units;
  /** First of num_units partials of num_rows x (headDim + 2) floats each; unused when num_units is 1. */
  size_t partial_offset;
};

struct Unit {
  int32_t group;
  int32_t index_in_group;
  int32_t block_begin;
  int32_t block_end;
};

/** The units of a layer whose queries see `window_tokens`. */
struct Division {
  int32_t window_tokens;
  std::vector<Group> groups;
  std::vector<Unit> units;
  /** Threads that are worth waking: below, more of them cost more than they save. */
  int32_t num_workers;
  /** So little work that the event loop may do it, with what threads are worth waking, and not be woken when it is done. */
  bool is_brief;
  /** Units of each group that have not finished in the current attend. */
  std::unique_ptr<std::atomic<int32_t>[]> pending;
};

struct Step {
  Step(const KvShape& shape, const ScoreRules& rules, int32_t num_threads, int32_t num_query_rows, int32_t num_kv_rows,
       std::vector<Segment> segments, std::vector<BlockRef> blocks, std::vector<int32_t> kv_slots);

  int32_t num_query_rows;
  int32_t num_kv_rows;
  std::vector<Segment> segments;
  std::vector<BlockRef> blocks;
  std::vector<int32_t> kv_slots;
  /** As ScoreRules.windows. */
  std::vector<Division> divisions;
  /** Shared by the divisions (invariant 2). */
  std::vector<float> partials;
  int32_t rows_per_store_unit;
  int32_t num_store_units;
};

/** Bytes of one layer: q, k and v, and its o and lse. As attendBytes and partialBytes of packages/tensor/src/step-plan.ts. */
struct LayerBytes {
  size_t attend;
  size_t partial;
};

inline LayerBytes layer_bytes(const Step& step, const KvShape& shape) {
  const size_t head_bytes = size_t(shape.head_dim) * element_bytes(shape);
  const size_t cells = size_t(step.num_query_rows) * shape.num_heads;
  const size_t kv_cells = size_t(step.num_kv_rows) * shape.num_kv_heads;
  return {head_bytes * (cells + 2 * kv_cells), cells * (head_bytes + 4)};
}

}  // namespace lamina
