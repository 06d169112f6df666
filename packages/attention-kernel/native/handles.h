// Owns what JavaScript holds of the kernel: the kernel itself, its steps, and what a link is given to answer frames with.
//
// Invariants
// 1. The thread-safe function keeps the process alive only while attends are in flight.
// 2. No worker outlives the environment: the cleanup hook (added after the thread-safe function, so run before its own)
//    joins them. After that every call throws.
#pragma once
#include <memory>
#include <vector>

#include "layer_frames.h"
#include "napi_values.h"
#include "worker_pool.h"

namespace lamina {

struct KernelHandle {
  static constexpr uint64_t kMagic = 0x6c616d696e614b31;
  uint64_t magic = kMagic;
  napi_env env = nullptr;
  Engine engine{};
  std::unique_ptr<ScoreRules> rules;
  std::unique_ptr<Slab> slab;
  std::unique_ptr<WorkerPool> pool;
  napi_threadsafe_function completion = nullptr;
  /** Attends whose `onDone` has not been called. Touched on the event loop only. */
  int32_t num_in_flight = 0;
  /** Made when JavaScript asks for it. */
  std::shared_ptr<LayerFrames> frames;
};

/** JavaScript memory that is used between calls. */
class KeptMemory {
 public:
  void keep(napi_env env, napi_value value) {
    env_ = env;
    references_.emplace_back();
    napi_create_reference(env, value, 1, &references_.back());
  }
  void release() {
    for (napi_ref reference : references_) napi_delete_reference(env_, reference);
    references_.clear();
  }

 private:
  napi_env env_ = nullptr;
  std::vector<napi_ref> references_;
};

struct StepHandle {
  static constexpr uint64_t kMagic = 0x6c616d696e615331;
  uint64_t magic = kMagic;
  std::shared_ptr<Step> step;
  std::unique_ptr<ArmedStep> armed;
  /** Where it is armed. */
  std::shared_ptr<LayerFrames> frames;
  KeptMemory kept;

  void end() {
    if (armed != nullptr) frames->disarm(armed.get());
    armed.reset();
    kept.release();
    step.reset();
  }
};

/** What a link is given. */
struct FramesHandle : FrameHandler {
  std::shared_ptr<LayerFrames> frames;
  KeptMemory kept;
};

/** Stops its workers and lets go of its memory: the cleanup hook of its environment. */
void shut_down(void* kernel);

/** Shuts down, unless that was done. */
void close_kernel(KernelHandle* kernel);

/** On the event loop, once per finished job: calls onDone(id). */
void complete(napi_env env, napi_value on_done, void* kernel, void* id);

/** Null after throwing, also when it is closed. */
KernelHandle* read_kernel(napi_env env, napi_value value);

/** Behind others a job waits for its turn, and for theirs to be reported: false when there are. */
bool run_at_once(KernelHandle& kernel, const Job& job);

}  // namespace lamina
