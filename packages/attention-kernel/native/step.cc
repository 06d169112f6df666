// Owns the division of a step into work units (see step.h).
#include "step.h"

#include <algorithm>
#include <utility>

namespace lamina {

/** Elements of K that one store unit converts; below this a second thread is not worth waking. */
static constexpr int64_t kStoreUnitElements = 32768;
/** Units per thread that a step is cut into, so that threads finish together. */
static constexpr int64_t kUnitsPerThread = 6;
/** A block range is never cut shorter than this; a merge must stay cheap beside it. */
static constexpr int64_t kMinUnitTokens = 512;

Step::Step(const KvShape& shape, int32_t num_threads, int32_t num_query_rows_, int32_t num_kv_rows_,
           std::vector<Segment> segments_, std::vector<BlockRef> blocks_, std::vector<int32_t> kv_slots_)
    : num_query_rows(num_query_rows_),
      num_kv_rows(num_kv_rows_),
      segments(std::move(segments_)),
      blocks(std::move(blocks_)),
      kv_slots(std::move(kv_slots_)) {
  const int64_t row_elements = int64_t(shape.num_kv_heads) * shape.head_dim;
  rows_per_store_unit = int32_t(std::max<int64_t>(1, kStoreUnitElements / row_elements));
  num_store_units = (num_kv_rows + rows_per_store_unit - 1) / rows_per_store_unit;

  const int32_t group_size = shape.num_heads / shape.num_kv_heads;
  const int64_t bs = shape.block_size_tokens;
  int64_t total_tokens = 0;
  for (const Segment& segment : segments) {
    const int64_t tiles = (int64_t(segment.num_queries) * group_size + kTileRows - 1) / kTileRows;
    total_tokens += tiles * segment.num_blocks * bs * shape.num_kv_heads;
  }
  int64_t unit_blocks = INT32_MAX;
  if (num_threads > 1)
    unit_blocks = std::max(kMinUnitTokens, total_tokens / (num_threads * kUnitsPerThread)) / bs;
  unit_blocks = std::max<int64_t>(1, unit_blocks);

  size_t partial_floats = 0;
  for (size_t s = 0; s < segments.size(); s++) {
    const Segment& segment = segments[s];
    const int32_t total_rows = segment.num_queries * group_size;
    for (int32_t row = 0; row < total_rows; row += kTileRows) {
      const int32_t rows = std::min(kTileRows, total_rows - row);
      const int32_t last_position = segment.first_position + (row + rows - 1) / group_size;
      const BlockRef* first = blocks.data() + segment.block_start;
      int32_t visible = segment.num_blocks;
      while (visible > 0 && first[visible - 1].first_position > last_position) visible--;
      const int32_t num_units = std::max<int32_t>(1, int32_t((visible + unit_blocks - 1) / unit_blocks));
      for (int32_t head = 0; head < shape.num_kv_heads; head++) {
        const int32_t group = int32_t(groups.size());
        groups.push_back({int32_t(s), head, row, rows, num_units, partial_floats});
        if (num_units > 1) partial_floats += size_t(num_units) * rows * (shape.head_dim + 2);
        for (int32_t i = 0; i < num_units; i++) {
          const int32_t begin = int32_t(int64_t(visible) * i / num_units);
          const int32_t end = int32_t(int64_t(visible) * (i + 1) / num_units);
          units.push_back({group, i, segment.block_start + begin, segment.block_start + end});
        }
      }
    }
  }
  partials.resize(partial_floats);
  pending.reset(new std::atomic<int32_t>[std::max<size_t>(1, groups.size())]);
  for (size_t i = 0; i < groups.size(); i++) pending[i].store(groups[i].num_units);
}

}  // namespace lamina
