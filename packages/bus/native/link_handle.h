// Owns a link's place in the event loop and its calls into JavaScript, from `open` to teardown.
//
// Invariants
// 1. What is told of a message are places in the receive memory, written to a record that both sides share: a message costs one
//    call and no object.
// 2. The event loop watches the descriptor as long as the link is open, for writing only while something waits to be sent.
// 3. The handle outlives its poll handle: teardown of the environment waits until libuv has closed it.
#pragma once
#include <string>
#include <vector>

#include "frame_handler.h"
#include "link.h"
#include "napi_values.h"

namespace lamina {

/**
 * CPU time of this thread in native code of links, callbacks left out, while it is measured: a profile by the clock takes a thread
 * that a system call has put off its core for a busy one.
 */
class LinkCpu {
 public:
  LinkCpu() { enter(); }
  ~LinkCpu() { leave(); }
  LinkCpu(const LinkCpu&) = delete;
  LinkCpu& operator=(const LinkCpu&) = delete;
  static void enter();
  static void leave();
  /** Seconds since the last call of this; from now on it is measured or not. */
  static double take(bool is_measured);

  /** As long as JavaScript runs. */
  class Pause {
   public:
    Pause();
    ~Pause();
    Pause(const Pause&) = delete;
    Pause& operator=(const Pause&) = delete;

   private:
    const int depth_;
  };
};

class LinkHandle final : public LinkOwner {
 public:
  static constexpr uint64_t kMagic = 0x6c616d696e614c31;
  uint64_t magic = kMagic;

  explicit LinkHandle(napi_env env) : env_(env), link_(this) {}

  bool start(const std::string& address, int32_t port, napi_value record, napi_value on_line, napi_value on_memory,
             napi_value on_end);
  void on_line(const ServerLine& line, const char* bytes) override;
  char* new_memory(size_t min_bytes, size_t* capacity) override;
  Link& link() { return link_; }
  /** Messages of the subscription are offered to the handler first. */
  void attach(uint32_t subscription, const FrameHandler* handler, napi_value external);
  void detach(uint32_t subscription);
  void set_max_payload(size_t num_bytes) { max_payload_bytes_ = num_bytes; }
  /** After anything that may have left something to send, or closed the link. */
  void settle();
  /** JavaScript holds the handle no more. */
  void forget();
  void close(const std::string& failure) {
    link_.close(failure);
    settle();
  }

 private:
  bool handle_natively(const ServerLine& line, const char* bytes);
  static void on_ready(void* poll, int status, int events);
  static void on_poll_closed(void* poll);
  static void on_teardown(napi_async_cleanup_hook_handle hook, void* data);
  void stop_watching();
  void watch(int events);
  void call(napi_ref function, size_t count, napi_value* arguments, napi_value* result);
  void delete_reference(napi_ref* reference);

  struct Attached {
    uint32_t subscription;
    const FrameHandler* handler;
    /** Keeps the handler alive. */
    napi_ref external;
  };

  const napi_env env_;
  Link link_;
  std::vector<Attached> handlers_;
  /** Of the server; larger answers are JavaScript's to split. */
  size_t max_payload_bytes_ = 0;
  void* poll_ = nullptr;
  bool is_closing_ = false;
  bool is_forgotten_ = false;
  bool is_torn_down_ = false;
  bool is_connected_ = false;
  int events_ = 0;
  int32_t* record_ = nullptr;
  const char* memory_ = nullptr;
  napi_ref record_ref_ = nullptr;
  napi_ref memory_ref_ = nullptr;
  napi_ref on_line_ = nullptr;
  napi_ref on_memory_ = nullptr;
  napi_ref on_end_ = nullptr;
  napi_async_context context_ = nullptr;
  napi_async_cleanup_hook_handle hook_ = nullptr;
};

}  // namespace lamina
