// Owns one TCP connection to nats-server: what waits to be sent, the memory that is received into, and waiting for either.
// It knows the shape of the protocol; who logs in, subscribes and connects again is the owner (native-link.ts).
//
// Invariants
// 1. A message lies whole in the receive memory when the owner is told of it. The memory is written again only where nothing
//    lies that was not delivered, and not at all once the owner holds it: then other memory takes its place.
// 2. What is sent is copied, or on its way, when `publish` returns. At most kMaxUnsentBytes wait, which is more than the steps in
//    flight can have: a server that takes nothing for so long loses the connection.
// 3. After `close` nothing is delivered; the file descriptor is closed by whoever watches it, when it is watched no more.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "server_lines.h"

namespace lamina {

constexpr size_t kMaxUnsentBytes = size_t(1) << 30;

class LinkOwner {
 public:
  virtual ~LinkOwner() = default;
  /** `bytes` is where the line begins; valid until this returns, or longer if the memory is held. */
  virtual void on_line(const ServerLine& line, const char* bytes) = 0;
  /** Other memory to receive into, of at least `min_bytes`; nullptr when there is none. */
  virtual char* new_memory(size_t min_bytes, size_t* capacity) = 0;
};

class Link {
 public:
  explicit Link(LinkOwner* owner) : owner_(owner) {}
  ~Link();
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;

  /** Begins to connect to a numeric address; it is connected when the descriptor can be written. False: see `failure`. */
  bool open(const std::string& address, int32_t port);
  /** PUB subject [reply] bytes. `data` of some size goes to the socket at once, without a copy. */
  void publish(const char* subject, size_t subject_length, const char* reply, size_t reply_length, const char* data,
               size_t length);
  /** Bytes of the protocol as they are. */
  void write(const char* data, size_t length);
  /** Sends what waits, as far as the socket takes it. */
  void flush();
  /** Reads what has come and tells the owner. Returns how many messages that were. */
  int32_t receive();
  /**
   * Sends what waits, then as `receive`: again and again for `spin_us` while no message comes, then once more when something
   * has come or `timeout_us` are over, without having run meanwhile.
   */
  int32_t wait(int32_t timeout_us, int32_t spin_us);
  /** The owner keeps what lies in the receive memory. */
  void hold_memory() { is_held_ = true; }
  void close(const std::string& failure);
  /** Closes with what the operating system says of the socket. */
  void fail_by_socket_error();

  int descriptor() const { return descriptor_; }
  bool is_open() const { return is_open_; }
  bool has_unsent() const { return sent_ < unsent_.size(); }
  const std::string& failure() const { return failure_; }
  /** Closes the descriptor; nobody watches it any more. */
  void close_descriptor();

 private:
  /** Until something comes, or can be sent, or `timeout_us` are over. */
  void sleep(int32_t timeout_us);
  bool make_room();
  int32_t deliver();
  void fail_by_errno(const char* what, int code);

  LinkOwner* const owner_;
  int descriptor_ = -1;
  bool is_open_ = false;
  bool is_delivering_ = false;
  std::string failure_;
  std::vector<char> unsent_;
  size_t sent_ = 0;
  char* memory_ = nullptr;
  size_t capacity_ = 0;
  /** What was received and not delivered lies in [begin_, end_). */
  size_t begin_ = 0;
  size_t end_ = 0;
  /** Bytes of the message that begins at begin_, when that is known. */
  size_t message_bytes_ = 0;
  bool is_held_ = false;
};

}  // namespace lamina
