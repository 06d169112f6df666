// Owns answering the frames of layers whose attention is brief, where they arrive: of steps that JavaScript has armed, after it
// has answered their first layer itself.
//
// Invariants
// 1. A frame is answered only if it is, layer and checksum aside, the header that JavaScript expects, whole, of a layer that was
//    not answered while none is in flight, and its attention is brief. Any other is left to JavaScript, untouched.
// 2. Which layer was answered last is in memory that both share, so either can go on where the other was.
// 3. A step that has ended is armed no more; nor is any when the kernel is closed.
#pragma once
#include <functional>
#include <string>
#include <unordered_map>

#include "attend_job.h"
#include "frame_handler.h"

namespace lamina {

constexpr size_t kFrameHeaderBytes = 32;

/** Fields of the state that a step shares with JavaScript. */
enum StepState { kLayerAnswered, kLayerInFlight, kNumStepStates };

/** Fields of the counts that a kernel shares with JavaScript. */
enum LayerCount { kAttends, kQueryRows, kKvTokens, kNumLayerCounts };

struct ArmedStep {
  std::shared_ptr<Step> step;
  /** The header of its layers' frames; of no account: layer, checksum. */
  uint8_t expected[kFrameHeaderBytes];
  /** Bytes of q, k and v. */
  size_t attend_bytes;
  /** Header, then o and lse. The header is that of an answer, but for layer and checksum. */
  uint8_t* answer;
  size_t answer_bytes;
  std::string reply;
  /** [kNumStepStates] */
  int32_t* state;
  /** [num_layers] KV tokens that a layer reads. */
  const double* kv_tokens;
};

class LayerFrames {
 public:
  /** `run` does a job at once, if it may: false while others are in flight. */
  LayerFrames(const Engine& engine, std::function<bool(const Job&)> run, double* counts, double* durations,
              size_t num_durations)
      : engine_(engine), run_(std::move(run)), counts_(counts), durations_(durations), num_durations_(num_durations) {}

  void arm(const ArmedStep* step);
  /** Nothing if another step took its place. */
  void disarm(const ArmedStep* step);
  void close() { is_closed_ = true; }
  bool handle(const uint8_t* data, size_t length, size_t max_answer_bytes, FrameAnswer* answer);

 private:
  const Engine engine_;
  const std::function<bool(const Job&)> run_;
  /** [kNumLayerCounts] */
  double* const counts_;
  /** Seconds of the attends, the i-th at i mod num_durations_. */
  double* const durations_;
  const size_t num_durations_;
  /** By origin and wave. */
  std::unordered_map<uint64_t, const ArmedStep*> armed_;
  bool is_closed_ = false;
};

}  // namespace lamina
