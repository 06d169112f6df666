// Owns the attention of one tile, written once over a vector type V; each simd_*.cc instantiates it with its own flags.
//
// Both halves of attention are the same small matrix product: scores = q x Kt and acc += p x V, so there is one micro
// kernel (R rows x NV vectors, accumulated in registers) and both run at its speed. Scores are kept in log2 units
// (queries are pre-scaled by scale * log2 e), so that exp is exp2.
//
// Invariants
// 1. Everything is in an unnamed namespace: two variants of one template must never be merged by the linker.
// 2. The KV of a step (kStepTokens) is read from memory once per tile; while the first rows of the tile use it, that of
//    the next step is prefetched, spread evenly over products and softmax.
// 3. V rows past the valid tokens are never read: a stale NaN there must not reach 0 * NaN. Stale K lanes are masked.
// 4. A row that sees no key ends with sum 0 and acc 0.
// 5. Soft-cap and ALiBi cost one branch per piece when off; they come before the mask, so what stale lanes make of them
//    is overwritten.
#pragma once
#include "score_math.h"

namespace lamina {
namespace {

template <class V, class T>
struct TileKernel {
  using Reg = typename V::Reg;
  static constexpr int W = V::kLanes;

  /** A run of at most kStepTokens tokens of one block. */
  struct Piece {
    const T* k;
    const T* v;
    int32_t first_position;
    int32_t num_tokens;
    int32_t columns;

    /** Bytes of a quarter of its K, and of its V. */
    LAMINA_INLINE ptrdiff_t quarter(int head_dim) const { return ptrdiff_t(columns) * head_dim * ptrdiff_t(sizeof(T)) / 4; }
  };

  /** Walks the blocks of a task, one step at a time. */
  struct Cursor {
    const TileTask* task;
    const uint8_t* kv;
    const BlockRef* blocks;
    int32_t num_blocks;
    int32_t block;
    int32_t offset;

    LAMINA_INLINE int fill(Piece* pieces) {
      const int bs = task->block_size_tokens;
      int count = 0;
      int columns = 0;
      while (block < num_blocks) {
        int width = bs - offset;
        if (width > kStepTokens) width = kStepTokens;
        if (columns + width > kStepTokens) break;
        const BlockRef& ref = blocks[block];
        const uint8_t* base = kv + size_t(ref.physical_block) * task->block_stride_bytes;
        Piece& piece = pieces[count++];
        piece.k = reinterpret_cast<const T*>(base) + offset;
        piece.v = reinterpret_cast<const T*>(base + task->v_offset_bytes) + ptrdiff_t(offset) * task->head_dim;
        piece.first_position = ref.first_position + offset;
        int tokens = ref.num_tokens - offset;
        piece.num_tokens = tokens < 0 ? 0 : tokens < width ? tokens : width;
        piece.columns = width;
        columns += width;
        offset += width;
        if (offset >= bs) {
          offset = 0;
          block++;
        }
      }
      return count;
    }
  };
  static constexpr int kMaxPieces = kStepTokens / 8;
  /** Rows of a register tile that make up one line of the cache. */
  template <int RowBytes>
  static constexpr int kRowsPerLine = RowBytes >= 64 ? 1 : 64 / RowBytes;

  /**
   * c[R][NV*W] (+)= a[R][depth] x b[depth][NV*W]; strides in elements. One prefetch, `ahead_step` bytes after the last, goes
   * with every 64 bytes of b: a burst of them would fill the line buffers, and the loads of b would wait behind it.
   */
  template <int R, int NV, int LdA, int LdC, bool Accumulate>
  static LAMINA_INLINE void micro(const float* a, int depth, const T* b, ptrdiff_t ldb, float* c, const char* ahead,
                                  ptrdiff_t ahead_step) {
    constexpr int U = R * NV == 1 ? 8 : R * NV <= 2 ? 4 : R * NV <= 4 ? 2 : 1;
    constexpr int kRowBytes = NV * W * int(sizeof(T));
    constexpr int P = kRowsPerLine<kRowBytes>;
    constexpr int S = U > P ? U : P;
    Reg sum[U][R][NV];
#pragma GCC unroll 8
    for (int u = 0; u < U; u++)
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) sum[u][r][j] = Accumulate && u == 0 ? V::load(c + r * LdC + j * W) : V::zero();
    int i = 0;
    for (; i + S <= depth; i += S) {
#pragma GCC unroll 8
      for (int s = 0; s < S; s++) {
        Reg row[NV];
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) row[j] = V::load(b + j * W);
        if (s % P == 0) {
#pragma GCC unroll 8
          for (int line = 0; line < kRowBytes; line += 64)
            __builtin_prefetch(ahead + line, 0, V::kPrefetchLocality);
          ahead += ahead_step;
        }
        b += ldb;
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const Reg x = V::broadcast(a + r * LdA + i + s);
#pragma GCC unroll 8
          for (int j = 0; j < NV; j++) sum[s % U][r][j] = V::fma(x, row[j], sum[s % U][r][j]);
        }
      }
    }
    if (S > 1) {
      for (; i < depth; i++) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
          for (int j = 0; j < NV; j++)
            sum[0][r][j] = V::fma(V::broadcast(a + r * LdA + i), V::load(b + j * W), sum[0][r][j]);
        b += ldb;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int j = 0; j < NV; j++) {
        Reg total = sum[0][r][j];
#pragma GCC unroll 8
        for (int u = 1; u < U; u++) total = V::add(total, sum[u][r][j]);
        V::store(c + r * LdC + j * W, total);
      }
  }

  /** The micro kernel over all columns, widest register tile first. `ahead`: bytes from b to what is prefetched. */
  template <int R, int NV, int LdA, int LdC, bool Accumulate>
  static LAMINA_INLINE void product(const float* a, int depth, const T* b, ptrdiff_t ldb, float* c, int columns,
                                    ptrdiff_t ahead) {
    constexpr int kRowBytes = NV * W * int(sizeof(T));
    int j = 0;
    for (; j + NV * W <= columns; j += NV * W) {
      const char* line = reinterpret_cast<const char*>(b) + ahead;
      // Steps of 3/4 of a line cover the first three quarters; the last is prefetch_between's, or the next product's.
      ptrdiff_t step = (kRowBytes > 64 ? kRowBytes : 64) * 3 / 4;
      if (ldb == columns) {
        // One run of memory: lines in their order, which the processor's own prefetcher likes best.
        line += ptrdiff_t(depth) * j * ptrdiff_t(sizeof(T)) * 3 / 4;
      } else {
        line += j * int(sizeof(T)) / 64 * 64 + j % (64 / int(sizeof(T))) / (NV * W) * ldb * ptrdiff_t(sizeof(T));
        step = kRowsPerLine<kRowBytes> * ldb * ptrdiff_t(sizeof(T));
      }
      micro<R, NV, LdA, LdC, Accumulate>(a, depth, b + j, ldb, c + j, line, step);
    }
    if constexpr (NV > 1)
      if (j < columns) product<R, NV / 2, LdA, LdC, Accumulate>(a, depth, b + j, ldb, c + j, columns - j, ahead);
  }

  static LAMINA_INLINE int32_t position(const TileTask& task, int row) {
    return task.first_position + (task.row_begin + row) / task.group;
  }

  /** Soft-cap, then ALiBi, on one row of a piece. */
  static __attribute__((noinline)) void adjust(const TileTask& task, int row, const Piece& piece, float* scores) {
    if (task.softcap != 0.0f) {
      const Reg cap = V::set1(task.softcap);
      const Reg inverse = V::set1(1.0f / task.softcap);
      for (int j = 0; j < piece.columns; j += W)
        V::store(scores + j, V::mul(cap, tanh<V>(V::mul(V::load(scores + j), inverse))));
    }
    if (task.alibi_slopes != nullptr) {
      const Reg slope = V::set1(task.alibi_slopes[(task.row_begin + row) % task.group]);
      const Reg distance = V::set1(float(piece.first_position - position(task, row)));
      for (int j = 0; j < piece.columns; j += W)
        V::store(scores + j, V::fma(slope, V::add(distance, V::load(kColumn.index + j)), V::load(scores + j)));
    }
  }

  /** Scores of `columns` tokens become weights p; maximum, sum and acc of the row follow. */
  static LAMINA_INLINE void softmax(float* scores, int columns, float* maximum, float* sum, float* acc, int head_dim) {
    Reg top = V::load(scores);
    for (int j = W; j < columns; j += W) top = V::max(V::load(scores + j), top);
    Reg m = V::set1(*maximum);
    Reg total = V::load(sum);
    if (V::any_greater(top, m)) {
      const float next = V::reduce_max(top);
      const Reg decay = V::exp2(V::set1(*maximum - next));
      *maximum = next;
      m = V::set1(next);
      total = V::mul(total, decay);
      for (int j = 0; j < head_dim; j += W) V::store(acc + j, V::mul(V::load(acc + j), decay));
    }
    for (int j = 0; j < columns; j += W) {
      const Reg p = V::exp2(V::sub(V::load(scores + j), m));
      total = V::add(total, p);
      V::store(scores + j, p);
    }
    V::store(sum, total);
  }

  /**
   * The share `part` of `num_parts` of what the products leave to the softmax: the last quarter of K and the first of V.
   * Without it the line buffers would run empty while the processor computes exponentials.
   */
  static LAMINA_INLINE void prefetch_between(const Piece* next, int num_next, int head_dim, int part, int num_parts) {
    for (int i = 0; i < num_next; i++) {
      const ptrdiff_t quarter = next[i].quarter(head_dim);
      const char* k = reinterpret_cast<const char*>(next[i].k) + 3 * quarter;
      const char* v = reinterpret_cast<const char*>(next[i].v);
      for (ptrdiff_t line = quarter * part / num_parts / 64 * 64; line < quarter * (part + 1) / num_parts; line += 64) {
        __builtin_prefetch(k + line, 0, V::kPrefetchLocality);
        __builtin_prefetch(v + line, 0, V::kPrefetchLocality);
      }
    }
  }

  /** R rows of the tile against one step of KV. */
  template <int R>
  static __attribute__((noinline)) void rows(const TileTask& task, const Scratch& scratch, int row0, const Piece* pieces,
                                             int num_pieces, const Piece* next, int num_next) {
    constexpr int NV = V::template vectors<R>();
    const int head_dim = task.head_dim;
    const int bs = task.block_size_tokens;
    const float* q = scratch.q + row0 * kRowStride;
    float* acc = scratch.acc + row0 * kRowStride;
    const int32_t last_position = position(task, row0 + R - 1);
    /** Oldest position that the first of these rows sees; the others see no older one. */
    const int32_t oldest =
        position(task, row0) < task.window_tokens ? 0 : position(task, row0) - task.window_tokens + 1;
    int columns = 0;
    for (int i = 0; i < num_pieces; i++) {
      const Piece& piece = pieces[i];
      float* scores = scratch.scores + columns;
      columns += piece.columns;
      if (piece.first_position > last_position || piece.first_position + piece.columns <= oldest) {
        for (int r = 0; r < R; r++)
          for (int t = 0; t < piece.columns; t++) scores[r * kScoreStride + t] = -__builtin_inff();
        continue;
      }
      const ptrdiff_t ahead =
          i < num_next ? reinterpret_cast<const char*>(next[i].k) - reinterpret_cast<const char*>(piece.k) : 0;
      product<R, NV, kRowStride, kScoreStride, false>(q, head_dim, piece.k, bs, scores, piece.columns, ahead);
      if (task.adjusts_scores)
        for (int r = 0; r < R; r++) adjust(task, row0 + r, piece, scores + r * kScoreStride);
      const bool hides_old = last_position - piece.first_position >= task.window_tokens;
      if (!hides_old && piece.num_tokens == piece.columns &&
          position(task, row0) - piece.first_position + 1 >= piece.columns)
        continue;
      for (int r = 0; r < R; r++) {
        if (hides_old) {
          int hidden = position(task, row0 + r) - task.window_tokens + 1 - piece.first_position;
          if (hidden > piece.columns) hidden = piece.columns;
          for (int t = 0; t < hidden; t++) scores[r * kScoreStride + t] = -__builtin_inff();
        }
        int visible = position(task, row0 + r) - piece.first_position + 1;
        if (visible < 0) visible = 0;
        if (visible > piece.num_tokens) visible = piece.num_tokens;
        for (int t = visible; t < piece.columns; t++) scores[r * kScoreStride + t] = -__builtin_inff();
      }
    }
    for (int r = 0; r < R; r++) {
      prefetch_between(next, num_next, head_dim, r, R);
      softmax(scratch.scores + r * kScoreStride, columns, scratch.maximum + row0 + r,
              scratch.sum + (row0 + r) * kMaxLanes, acc + r * kRowStride, head_dim);
    }
    columns = 0;
    for (int i = 0; i < num_pieces; i++) {
      const Piece& piece = pieces[i];
      const float* p = scratch.scores + columns;
      columns += piece.columns;
      int tokens = last_position - piece.first_position + 1;
      if (tokens > piece.num_tokens) tokens = piece.num_tokens;
      int hidden = oldest - piece.first_position;
      if (hidden < 0) hidden = 0;
      if (tokens <= hidden) continue;
      ptrdiff_t ahead = 0;
      if (i < num_next)
        ahead = reinterpret_cast<const char*>(next[i].v) - reinterpret_cast<const char*>(piece.v) +
                next[i].quarter(head_dim);
      product<R, NV, kScoreStride, kRowStride, true>(p + hidden, tokens - hidden, piece.v + ptrdiff_t(hidden) * head_dim,
                                                        head_dim, acc, head_dim, ahead);
    }
  }

  static void attend_tile(const TileTask& task, const Scratch& scratch) {
    const int num_rows = task.num_rows;
    for (int r = 0; r < num_rows; r++) {
      scratch.maximum[r] = kNoScore;
      for (int j = 0; j < W; j += W) V::store(scratch.sum + r * kMaxLanes, V::zero());
      for (int j = 0; j < task.head_dim; j += W) V::store(scratch.acc + r * kRowStride + j, V::zero());
    }
    Cursor cursor{&task, task.kv, task.blocks, task.num_blocks, 0, 0};
    Cursor after{&task, task.next_kv, task.next_blocks, task.next_num_blocks, 0, 0};
    const int32_t last_position = position(task, num_rows - 1);
    while (cursor.num_blocks > 0 && task.blocks[cursor.num_blocks - 1].first_position > last_position)
      cursor.num_blocks--;
    Piece buffers[2][kMaxPieces];
    int current = 0;
    int count = cursor.fill(buffers[0]);
    while (count > 0) {
      const Piece* pieces = buffers[current];
      const Piece* next = buffers[1 - current];
      const int num_next = cursor.fill(buffers[1 - current]);
      // The last step prefetches the first one of the next task.
      const int num_ahead = num_next > 0 ? num_next : after.fill(buffers[1 - current]);
      for (int row = 0; row < num_rows; row += kChunkRows) {
        const int ahead = row == 0 ? num_ahead : 0;
        switch (num_rows - row) {
          case 1: rows<1>(task, scratch, row, pieces, count, next, ahead); break;
          case 2: rows<2>(task, scratch, row, pieces, count, next, ahead); break;
          case 3: rows<3>(task, scratch, row, pieces, count, next, ahead); break;
          case 4: rows<4>(task, scratch, row, pieces, count, next, ahead); break;
          case 5: rows<5>(task, scratch, row, pieces, count, next, ahead); break;
          case 6: rows<6>(task, scratch, row, pieces, count, next, ahead); break;
          case 7: rows<7>(task, scratch, row, pieces, count, next, ahead); break;
          default: rows<8>(task, scratch, row, pieces, count, next, ahead); break;
        }
      }
      current = 1 - current;
      count = num_next;
    }
    for (int r = 0; r < num_rows; r++) {
      float* sum = scratch.sum + r * kMaxLanes;
      float total = 0;
      for (int j = 0; j < W; j++) total += sum[j];
      sum[0] = total;
    }
  }
};

/** Between float32 and float16, either way. */
template <class V, class From, class To>
void convert(const From* from, To* to, size_t count) {
  size_t i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes) V::store(to + i, V::load(from + i));
  if (i == count) return;
  From rest[V::kLanes] = {};
  To converted[V::kLanes];
  for (size_t j = 0; i + j < count; j++) rest[j] = from[i + j];
  V::store(converted, V::load(rest));
  for (size_t j = 0; i + j < count; j++) to[i + j] = converted[j];
}

template <class V>
int32_t argmax(const float* values, int32_t count) {
  using Reg = typename V::Reg;
  constexpr int32_t kBlock = 1024;
  constexpr float kLargest = 3.402823466e38f;
  const Reg largest = V::set1(kLargest);
  const Reg smallest = V::set1(-kLargest);
  // A difference from itself is NaN, or 0 of what is finite.
  Reg poison[2] = {V::zero(), V::zero()};
  float best = -kLargest;
  int32_t best_block = -1;
  for (int32_t begin = 0; begin < count; begin += kBlock) {
    const int32_t end = begin + kBlock < count ? begin + kBlock : count;
    Reg top[2] = {smallest, smallest};
    int32_t i = begin;
    for (; i + 2 * V::kLanes <= end; i += 2 * V::kLanes)
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) {
        const Reg x = V::min(largest, V::max(smallest, V::load(values + i + j * V::kLanes)));
        poison[j] = V::add(poison[j], V::sub(x, x));
        top[j] = V::max(x, top[j]);
      }
    float maximum = V::reduce_max(V::max(top[0], top[1]));
    for (; i < end; i++) {
      if (values[i] != values[i] || values[i] > kLargest) return -1;
      if (values[i] > maximum) maximum = values[i];
    }
    if (best_block < 0 || maximum > best) {
      best = maximum;
      best_block = begin;
    }
  }
  float sums[V::kLanes];
  V::store(sums, V::add(poison[0], poison[1]));
  for (int j = 0; j < V::kLanes; j++)
    if (sums[j] != 0.0f) return -1;
  // An infinity was counted as the largest, or the smallest, finite value.
  if (best >= kLargest)
    for (int32_t i = 0; i < count; i++)
      if (values[i] > kLargest) return -1;
  for (int32_t i = best_block; i >= 0 && i < count; i++)
    if (values[i] == best) return i;
  return -1;
}

template <class V>
float bare_read(const uint8_t* bytes, size_t num_bytes) {
  typename V::Reg sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  const float* at = reinterpret_cast<const float*>(bytes);
  const float* end = at + num_bytes / 4;
  // Unrolled, or the sums live on the stack: the yardstick would then measure store forwarding, not memory.
  for (; at < end; at += 4 * V::kLanes)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) sum[j] = V::add(sum[j], V::load(at + j * V::kLanes));
  return V::reduce_max(V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])));
}

/** Does `num_rounds` x 12 independent multiply-adds per lane and nothing else; returns how many floating-point operations. */
template <class V>
double multiply_add(int64_t num_rounds) {
  // 12 sums and 2 operands fit into 16 registers and hide the latency of two units.
  constexpr int kSums = 12;
  typename V::Reg sum[kSums];
  for (int j = 0; j < kSums; j++) sum[j] = V::set1(float(j));
  const typename V::Reg x = V::set1(0.5f);
  const typename V::Reg y = V::set1(0.25f);
  for (int64_t round = 0; round < num_rounds; round++) {
#pragma GCC unroll 12
    for (int j = 0; j < kSums; j++) sum[j] = V::fma(sum[j], x, y);
  }
  for (int j = 1; j < kSums; j++) sum[0] = V::add(sum[0], sum[j]);
  volatile float sink = V::reduce_max(sum[0]);
  (void)sink;
  return 2.0 * kSums * V::kLanes * double(num_rounds);
}

#define LAMINA_DEFINE_KERNEL(SYMBOL, NAME, SIMD, V)                                                       \
  const SimdKernel SYMBOL = {NAME,                                                                        \
                             SIMD,                                                                        \
                             V::kLanes,                                                                   \
                             TileKernel<V, V::Half>::attend_tile,                                         \
                             TileKernel<V, float>::attend_tile,                                           \
                             convert<V, uint16_t, float>,                                                 \
                             convert<V, float, uint16_t>,                                                 \
                             argmax<V>,                                                                   \
                             bare_read<V>,                                                                \
                             multiply_add<V>};

}  // namespace
}  // namespace lamina
