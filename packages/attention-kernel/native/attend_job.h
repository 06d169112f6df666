// Owns one attend: storing K and V, running units, merging and writing outputs. Knows nothing of threads or N-API.
//
// Invariants
// 1. qkv and out are raw bytes at any alignment: they are only touched with memcpy or unaligned vector loads.
// 2. All store units finish before the first attend unit starts (the pool's phases).
// 3. Every (query row, head) of `out` is written by exactly one unit.
#pragma once
#include <memory>

#include "slab.h"
#include "step.h"

namespace lamina {

struct Job {
  uint32_t id;
  std::shared_ptr<Step> step;
  int32_t layer;
  const uint8_t* qkv;
  uint8_t* out;
};

/** What all jobs of a kernel share. */
struct Engine {
  KvShape shape;
  int32_t num_blocks;
  const SimdKernel* simd;
  Slab* slab;
  const ScoreRules* rules;

  /** The units of the job's layer. */
  Division& division_of(const Job& job) const {
    return job.step->divisions[size_t(rules->window_of_layer[size_t(job.layer)])];
  }
};

/** Scratch of one worker thread. */
class WorkerScratch {
 public:
  WorkerScratch();
  ~WorkerScratch();
  WorkerScratch(const WorkerScratch&) = delete;
  WorkerScratch& operator=(const WorkerScratch&) = delete;
  const Scratch& view() const { return view_; }

 private:
  void* memory_;
  Scratch view_;
};

void run_store_unit(const Engine& engine, const Job& job, int32_t unit);
/** Units [begin, end): one after the other, so that each can prefetch the first KV of the next. */
void run_attend_units(const Engine& engine, const Job& job, int32_t begin, int32_t end, const Scratch& scratch);

}  // namespace lamina
