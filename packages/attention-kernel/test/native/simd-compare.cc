// Owns the comparison of every SIMD variant that a processor has with the scalar one, over many shapes: for processors
// that no test machine has, run under an emulator (see simd-cross.test.ts). Prints a line per variant; exits 1 when one
// differs by more than its bound.
//
// Invariants
// 1. Both variants see the same bits in K, V and q; a lane or a mask that is wrong shows far above rounding.
// 2. Stored bits must be equal: rounding to fp16 is exact, whatever the instruction.
#include <cmath>
#include <cstdio>
#include <cstring>

#include "attend_job.h"
#include "cpu_dispatch.h"

namespace {

using namespace lamina;

/** |v| <= 1 and float32 sums: as in oracle.test.ts. */
constexpr double kMaxError = 1e-5;
/** Distance of neighbours in fp16: relative, and of subnormals. */
constexpr double kHalfStep = 1.0 / 1024;
constexpr double kLeastHalf = 1.0 / 16777216;

struct Random {
  uint32_t state;
  uint32_t next() {
    state = state * 1664525u + 1013904223u;
    return state >> 8;
  }
  int32_t below(int32_t end) { return int32_t(next() % uint32_t(end)); }
  float unit() { return float(next()) / float(1u << 23) - 1.0f; }
};

struct Case {
  KvShape shape;
  int32_t num_blocks;
  double softcap;
  int32_t window_tokens;
  bool has_alibi;
  std::shared_ptr<Step> step;
  std::vector<uint8_t> qkv;
};

struct Result {
  /** o, then lse, as float32. */
  std::vector<float> out;
  std::vector<uint8_t> slab;
};

ScoreRules rules_of(const Case& c) {
  std::vector<float> slopes;
  if (c.has_alibi)
    for (int32_t head = 0; head < c.shape.num_heads; head++) slopes.push_back(std::exp2(-0.5f * float(head + 1)));
  return ScoreRules(c.shape, c.softcap, {c.window_tokens}, slopes);
}

/** Two requests with holes in their positions; every valid token is stored by the step itself. */
Case make_case(Random& random, int32_t head_dim, int32_t group, int32_t block_size, bool is_f16) {
  Case c{};
  const int32_t kv_heads = 1 + random.below(2);
  c.shape = {1, kv_heads * group, kv_heads, head_dim, block_size, 1.0f / std::sqrt(float(head_dim)), is_f16};
  c.softcap = random.below(3) == 0 ? 2.0 : 0.0;
  c.window_tokens = random.below(3) == 0 ? 1 + random.below(100) : 0;
  c.has_alibi = random.below(3) == 0;
  std::vector<Segment> segments;
  std::vector<BlockRef> blocks;
  std::vector<int32_t> slots;
  int32_t num_rows = 0;
  for (int request = 0; request < 2; request++) {
    const int32_t num_refs = 1 + random.below(1 + 160 / block_size);
    const int32_t start = int32_t(blocks.size());
    int32_t position = 0;
    for (int32_t i = 0; i < num_refs; i++) {
      const int32_t tokens = i + 1 < num_refs ? block_size : 1 + random.below(block_size);
      const int32_t physical = int32_t(blocks.size());
      for (int32_t t = 0; t < tokens; t++) slots.push_back(physical * block_size + t);
      blocks.push_back({physical, position, tokens});
      position += block_size * (1 + (random.below(4) == 0));
    }
    const int32_t num_queries = request == 0 ? 1 : 1 + random.below(40);
    segments.push_back({num_rows, num_queries, random.below(position), start, num_refs});
    num_rows += num_queries;
  }
  c.num_blocks = int32_t(blocks.size());
  const size_t floats = size_t(num_rows) * c.shape.num_heads * head_dim + 2 * slots.size() * kv_heads * head_dim;
  std::vector<float> values(floats);
  for (float& value : values) value = random.unit();
  c.qkv.resize(floats * element_bytes(c.shape));
  if (is_f16)
    kScalarKernel.to_halves(values.data(), reinterpret_cast<uint16_t*>(c.qkv.data()), floats);
  else
    std::memcpy(c.qkv.data(), values.data(), c.qkv.size());
  const int32_t num_slots = int32_t(slots.size());
  c.step = std::make_shared<Step>(c.shape, rules_of(c), 2, num_rows, num_slots, segments, blocks, slots);
  return c;
}

Result play(const Case& c, const SimdKernel* simd) {
  Slab slab(c.shape, c.num_blocks);
  // NaN wherever the step stores nothing: stale tokens must not be seen.
  std::memset(slab.data(), 0xff, slab.num_bytes());
  const ScoreRules rules = rules_of(c);
  const Engine engine{c.shape, c.num_blocks, simd, &slab, &rules};
  WorkerScratch scratch;
  Result result;
  const size_t cells = size_t(c.step->num_query_rows) * c.shape.num_heads;
  const size_t elements = cells * size_t(c.shape.head_dim);
  std::vector<uint8_t> out(elements * element_bytes(c.shape) + cells * 4);
  const Job job{0, c.step, 0, c.qkv.data(), out.data()};
  for (int32_t unit = 0; unit < c.step->num_store_units; unit++) run_store_unit(engine, job, unit);
  run_attend_units(engine, job, 0, int32_t(engine.division_of(job).units.size()), scratch.view());
  result.out.resize(elements + cells);
  if (c.shape.is_f16)
    kScalarKernel.to_floats(reinterpret_cast<const uint16_t*>(out.data()), result.out.data(), elements);
  else
    std::memcpy(result.out.data(), out.data(), elements * 4);
  std::memcpy(result.out.data() + elements, out.data() + elements * element_bytes(c.shape), cells * 4);
  result.slab.assign(slab.data(), slab.data() + slab.num_bytes());
  return result;
}

/** @param rounding Relative: what two values a hair apart may be rounded apart. */
double difference(const std::vector<float>& got, const std::vector<float>& want, double rounding) {
  double worst = 0;
  for (size_t i = 0; i < got.size(); i++) {
    if (got[i] == want[i]) continue;
    const double allowed = rounding * std::fabs(double(want[i])) + (rounding > 0 ? kLeastHalf : 0);
    const double error = (std::fabs(double(got[i]) - double(want[i])) - allowed) / std::fmax(1.0, std::fabs(double(want[i])));
    if (std::isnan(error)) return INFINITY;
    if (error > worst) worst = error;
  }
  return worst;
}

/** What rounding to fp16 must get right: subnormals, ties, overflow, infinities. */
bool roundings_equal(const SimdKernel* simd) {
  Random random{7};
  for (int round = 0; round < 4096; round++) {
    // Not a multiple of any vector: the rest is rounded too.
    uint32_t bits[19];
    float values[19];
    for (uint32_t& x : bits) {
      x = (random.next() << 16) ^ random.next();
      if (random.below(2) == 0) x = (x & 0x80001fffu) | (uint32_t(96 + random.below(50)) << 23) | (x & 0x7fe000u);
      if ((x & 0x7fffffffu) > 0x7f800000u) x = 0x7f800000u;
    }
    std::memcpy(values, bits, sizeof values);
    uint16_t got[19], want[19];
    simd->to_halves(values, got, 19);
    kScalarKernel.to_halves(values, want, 19);
    float back[19], wanted_back[19];
    simd->to_floats(want, back, 19);
    kScalarKernel.to_floats(want, wanted_back, 19);
    if (std::memcmp(got, want, sizeof got) != 0 || std::memcmp(back, wanted_back, sizeof back) != 0) return false;
  }
  return true;
}

}  // namespace

int main() {
  bool is_good = true;
  for (const SimdKernel* simd : supported_kernels()) {
    if (simd == &kScalarKernel) continue;
    Random random{1};
    double worst = 0;
    int num_cases = 0;
    bool same_bits = roundings_equal(simd);
    for (const int32_t head_dim : {16, 64, 80, 128, 256})
      for (const int32_t group : {1, 2, 3, 5, 8, 12})
        for (const int32_t block_size : {16, 64, 144})
          for (const bool is_f16 : {true, false}) {
            const Case c = make_case(random, head_dim, group, block_size, is_f16);
            const Result want = play(c, &kScalarKernel);
            const Result got = play(c, simd);
            const double error = difference(got.out, want.out, is_f16 ? kHalfStep : 0);
            if (error > worst) worst = error;
            same_bits = same_bits && got.slab == want.slab;
            num_cases++;
          }
    const bool passes = worst < kMaxError && same_bits;
    is_good = is_good && passes;
    std::printf("%s against scalar: %d shapes, worst difference %.2g, stored bits %s\n", simd->name, num_cases, worst,
                same_bits ? "equal" : "differ");
  }
  return is_good ? 0 : 1;
}
