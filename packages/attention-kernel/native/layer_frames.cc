// Owns answering the frames of layers whose attention is brief (see layer_frames.h). Offsets and checksum: packages/protocol/src/frame.ts.
#include "layer_frames.h"

#include <chrono>
#include <cstring>

namespace lamina {
namespace {

constexpr size_t kLayerOffset = 6;
constexpr size_t kAfterLayer = 8;
constexpr size_t kWaveOffset = 12;
constexpr size_t kOriginOffset = 24;
constexpr size_t kChecksumOffset = 28;

template <class T>
T read(const uint8_t* bytes) {
  T value;
  memcpy(&value, bytes, sizeof value);
  return value;
}

uint64_t key_of(const uint8_t* header) {
  return uint64_t(read<uint32_t>(header + kOriginOffset)) << 16 | read<uint16_t>(header + kWaveOffset);
}

uint32_t checksum_of(const uint8_t* header) {
  uint32_t sum = 0x9e3779b9;
  for (size_t at = 0; at < kChecksumOffset; at += 4)
    sum = ((sum ^ read<uint32_t>(header + at)) * 0x85ebca6bu) ^ (sum >> 13);
  return sum ^ (sum >> 16);
}

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

void LayerFrames::arm(const ArmedStep* step) { armed_[key_of(step->expected)] = step; }

void LayerFrames::disarm(const ArmedStep* step) {
  const auto found = armed_.find(key_of(step->expected));
  if (found != armed_.end() && found->second == step) armed_.erase(found);
}

bool LayerFrames::handle(const uint8_t* data, size_t length, size_t max_answer_bytes, FrameAnswer* answer) {
  if (is_closed_ || length < kFrameHeaderBytes) return false;
  const auto found = armed_.find(key_of(data));
  if (found == armed_.end()) return false;
  const ArmedStep& armed = *found->second;
  if (armed.answer_bytes > max_answer_bytes || length != kFrameHeaderBytes + armed.attend_bytes || memcmp(data, armed.expected, kLayerOffset) != 0 ||
      memcmp(data + kAfterLayer, armed.expected + kAfterLayer, kChecksumOffset - kAfterLayer) != 0 ||
      read<uint32_t>(data + kChecksumOffset) != checksum_of(data))
    return false;
  const int32_t layer = read<uint16_t>(data + kLayerOffset);
  if (layer >= engine_.shape.num_layers || layer <= armed.state[kLayerAnswered] || armed.state[kLayerInFlight] >= 0)
    return false;
  const Job job{0, armed.step, layer, data + kFrameHeaderBytes, armed.answer + kFrameHeaderBytes};
  if (!engine_.division_of(job).is_brief) return false;
  const double begin_s = now_s();
  if (!run_(job)) return false;
  const uint16_t layer_field = uint16_t(layer);
  memcpy(armed.answer + kLayerOffset, &layer_field, sizeof layer_field);
  const uint32_t checksum = checksum_of(armed.answer);
  memcpy(armed.answer + kChecksumOffset, &checksum, sizeof checksum);
  armed.state[kLayerAnswered] = layer;
  *answer = FrameAnswer{armed.reply.data(), armed.reply.size(), armed.answer, armed.answer_bytes};
  durations_[size_t(counts_[kAttends]) % num_durations_] = now_s() - begin_s;
  counts_[kAttends] += 1;
  counts_[kQueryRows] += armed.step->num_query_rows;
  counts_[kKvTokens] += armed.kv_tokens[layer];
  return true;
}

}  // namespace lamina
