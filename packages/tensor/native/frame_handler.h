// Owns what one addon gives another, so that a message is dealt with where it arrives: no JavaScript in between.
#pragma once
#include <cstddef>
#include <cstdint>

namespace lamina {

/** What is to be published for a message that was dealt with. Valid until the next message is handled. */
struct FrameAnswer {
  const char* subject;
  size_t subject_length;
  const uint8_t* data;
  size_t length;
};

/** Inside an external; whoever made it keeps `context` alive as long as that. Called on the event loop only. */
struct FrameHandler {
  static constexpr uint64_t kMagic = 0x6c616d696e614631;
  uint64_t magic = kMagic;
  /** False: JavaScript is to see the message, of which nothing has been done. An answer has `max_answer_bytes` at most. */
  bool (*handle)(void* context, const uint8_t* data, size_t length, size_t max_answer_bytes, FrameAnswer* answer) = nullptr;
  void* context = nullptr;
};

}  // namespace lamina
