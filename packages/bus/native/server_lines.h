// Owns the reading of what nats-server says: one protocol line, and the payload that belongs to it, at a time.
// https://docs.nats.io/reference/reference-protocols/nats-protocol
//
// Invariants
// 1. Nothing is read past the bytes that were given, whatever they are.
// 2. A line is at most kMaxLineBytes and a message kMaxMessageBytes long: what claims more is bad, and reserves nothing.
#pragma once
#include <cstddef>
#include <cstdint>

namespace lamina {

/** INFO is the longest line: it lists the servers of a cluster. */
constexpr size_t kMaxLineBytes = 64 * 1024;
/** max_payload of nats-server is 64 MiB at most. */
constexpr size_t kMaxMessageBytes = 64 * 1024 * 1024 + 64 * 1024;

enum class LineKind : int32_t { kIncomplete = 0, kMessage, kInfo, kPing, kPong, kOk, kError, kBad };

/** A run of bytes, counted from where parsing began. */
struct Span {
  size_t start;
  size_t length;
};

struct ServerLine {
  LineKind kind;
  /** Bytes of the line and its payload; of an incomplete message: what it will have, or 0 while that is unknown. */
  size_t total_bytes;
  /** Of INFO and -ERR: what follows the verb. */
  Span text;
  // Of a message:
  uint32_t subscription;
  Span subject;
  /** Empty when there is none. */
  Span reply;
  /** NATS headers, "NATS/1.0 ..." included; empty when there are none. */
  Span headers;
  Span payload;
};

ServerLine read_server_line(const char* bytes, size_t length);

}  // namespace lamina
