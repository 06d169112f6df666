// Owns the division of a step into work units (see step.h).
#include "step.h"

#include <algorithm>
#include <utility>

namespace lamina {

/** Elements of K that one store unit converts; below this a second thread is not worth waking. */
static constexpr int64_t kStoreUnitElements = 32768;
/** Units per thread that a step is cut into, so that threads finish together. */
static constexpr int64_t kUnitsPerThread = 6;
/** KV tokens of one head for which a thread is woken: some twenty microseconds of fp16 with head_dim 64. */
static constexpr int64_t kMinWorkerTokens = 1024;
/** Multiply-adds per thread for which the event loop may wait: half a millisecond or so. */
static constexpr int64_t kBriefWork = 1 << 23;
/** Below so many query rows memory is what takes the time. */
static constexpr int64_t kMemoryBoundRows = 4;
/** What a query row costs that sees nothing, in tokens that it would see. */
static constexpr int64_t kRowTokens = 16;
/** A block range is never cut shorter than this; a merge must stay cheap beside it. */
static constexpr int64_t kMinUnitTokens = 512;

/** Index of the first block of a segment with a position that is visible from `first_position` on. */
static int32_t first_visible(const BlockRef* blocks, int32_t num_blocks, int32_t first_position, int32_t window_tokens,
                             int32_t block_size_tokens) {
  if (window_tokens > first_position) return 0;
  const int32_t oldest = first_position - window_tokens + 1;
  return int32_t(std::partition_point(blocks, blocks + num_blocks,
                                      [&](const BlockRef& block) {
                                        return block.first_position + block_size_tokens <= oldest;
                                      }) -
                 blocks);
}

/** Cuts a step into units; returns how many floats its partials need. */
static size_t divide(Division& division, const Step& step, const KvShape& shape, int32_t num_threads) {
  const int32_t window_tokens = division.window_tokens;
  const int32_t group_size = shape.num_heads / shape.num_kv_heads;
  const int32_t bs = shape.block_size_tokens;
  int64_t total_tokens = 0;
  int64_t work = 0;
  for (const Segment& segment : step.segments) {
    const int64_t tiles = (int64_t(segment.num_queries) * group_size + kTileRows - 1) / kTileRows;
    const int32_t hidden = first_visible(step.blocks.data() + segment.block_start, segment.num_blocks,
                                         segment.first_position, window_tokens, bs);
    const int64_t kv_tokens = int64_t(segment.num_blocks - hidden) * bs * shape.num_kv_heads;
    total_tokens += tiles * kv_tokens;
    const int64_t rows = int64_t(segment.num_queries) * group_size;
    work += (std::max(kMemoryBoundRows, rows) * kv_tokens + rows * kRowTokens * shape.num_kv_heads) * shape.head_dim;
  }
  int64_t unit_blocks = INT32_MAX;
  if (num_threads > 1)
    unit_blocks = std::max(kMinUnitTokens, total_tokens / (num_threads * kUnitsPerThread)) / bs;
  unit_blocks = std::max<int64_t>(1, unit_blocks);

  size_t partial_floats = 0;
  for (size_t s = 0; s < step.segments.size(); s++) {
    const Segment& segment = step.segments[s];
    const int32_t total_rows = segment.num_queries * group_size;
    for (int32_t row = 0; row < total_rows; row += kTileRows) {
      const int32_t rows = std::min(kTileRows, total_rows - row);
      const int32_t last_position = segment.first_position + (row + rows - 1) / group_size;
      const BlockRef* first = step.blocks.data() + segment.block_start;
      int32_t visible_end = segment.num_blocks;
      while (visible_end > 0 && first[visible_end - 1].first_position > last_position) visible_end--;
      const int32_t visible_begin =
          first_visible(first, visible_end, segment.first_position + row / group_size, window_tokens, bs);
      const int32_t visible = visible_end - visible_begin;
      const int32_t num_units = std::max<int32_t>(1, int32_t((visible + unit_blocks - 1) / unit_blocks));
      for (int32_t head = 0; head < shape.num_kv_heads; head++) {
        const int32_t group = int32_t(division.groups.size());
        division.groups.push_back({int32_t(s), head, row, rows, num_units, partial_floats});
        if (num_units > 1) partial_floats += size_t(num_units) * rows * (shape.head_dim + 2);
        const int32_t start = segment.block_start + visible_begin;
        for (int32_t i = 0; i < num_units; i++) {
          const int32_t begin = int32_t(int64_t(visible) * i / num_units);
          const int32_t end = int32_t(int64_t(visible) * (i + 1) / num_units);
          division.units.push_back({group, i, start + begin, start + end});
        }
      }
    }
  }
  division.num_workers = int32_t(std::max<int64_t>(1, std::min<int64_t>(num_threads, total_tokens / kMinWorkerTokens)));
  division.is_brief = work <= kBriefWork * division.num_workers && step.num_store_units <= 1;
  const std::vector<Group>& groups = division.groups;
  division.pending.reset(new std::atomic<int32_t>[std::max<size_t>(1, groups.size())]);
  for (size_t i = 0; i < groups.size(); i++) division.pending[i].store(groups[i].num_units);
  return partial_floats;
}

Step::Step(const KvShape& shape, const ScoreRules& rules, int32_t num_threads, int32_t num_query_rows_,
           int32_t num_kv_rows_, std::vector<Segment> segments_, std::vector<BlockRef> blocks_,
           std::vector<int32_t> kv_slots_)
    : num_query_rows(num_query_rows_),
      num_kv_rows(num_kv_rows_),
      segments(std::move(segments_)),
      blocks(std::move(blocks_)),
      kv_slots(std::move(kv_slots_)) {
  const int64_t row_elements = int64_t(shape.num_kv_heads) * shape.head_dim;
  rows_per_store_unit = int32_t(std::max<int64_t>(1, kStoreUnitElements / row_elements));
  num_store_units = (num_kv_rows + rows_per_store_unit - 1) / rows_per_store_unit;
  size_t partial_floats = 0;
  for (const int32_t window_tokens : rules.windows) {
    divisions.push_back({window_tokens, {}, {}, 1, false, nullptr});
    partial_floats = std::max(partial_floats, divide(divisions.back(), *this, shape, num_threads));
  }
  partials.resize(partial_floats);
}

}  // namespace lamina
