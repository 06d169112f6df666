// Owns the N-API surface of a link: its handle, its place in the event loop, teardown. native-socket.ts is the only caller.
//
// Invariants
// 1. What is told of a message are places in the receive memory, written to a record that both sides share: a message costs one
//    call and no object.
// 2. The event loop watches the descriptor as long as the link is open, for writing only while something waits to be sent.
// 3. The handle outlives its poll handle: teardown of the environment waits until libuv has closed it.
#include <memory>
#include <string>

#include <vector>

#include "frame_handler.h"
#include "link.h"
#include "napi_values.h"
#include "uv_poll.h"

namespace lamina {
namespace {

/** Fields of the record, int32 each. See native-socket.ts. */
enum RecordField { kKind, kSubscription, kStart, kSubject, kSubjectEnd, kReply, kReplyEnd, kHeaders, kPayload, kEnd, kNumFields };

class LinkHandle final : public LinkOwner {
 public:
  static constexpr uint64_t kMagic = 0x6c616d696e614c31;
  uint64_t magic = kMagic;

  LinkHandle(napi_env env) : env_(env), link_(this) {}

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

void LinkHandle::delete_reference(napi_ref* reference) {
  if (*reference != nullptr) napi_delete_reference(env_, *reference);
  *reference = nullptr;
}

void LinkHandle::call(napi_ref function, size_t count, napi_value* arguments, napi_value* result) {
  napi_value callee;
  napi_value receiver;
  if (napi_get_reference_value(env_, function, &callee) != napi_ok || callee == nullptr) return;
  napi_get_undefined(env_, &receiver);
  if (napi_call_function(env_, receiver, callee, count, arguments, result) == napi_pending_exception) {
    // The callbacks guard what they run; what still comes out is a defect and must not vanish.
    napi_value error;
    napi_get_and_clear_last_exception(env_, &error);
    napi_fatal_exception(env_, error);
  }
}

bool LinkHandle::start(const std::string& address, int32_t port, napi_value record, napi_value on_line, napi_value on_memory,
                       napi_value on_end) {
  void* data = nullptr;
  size_t length = 0;
  if (!read_typed_array(env_, record, napi_int32_array, &data, &length)) return false;
  const int type = uv_poll_type();
  uv_loop_s* loop = nullptr;
  if (length != kNumFields || type < 0 || napi_get_uv_event_loop(env_, &loop) != napi_ok) {
    fail(env_, "this Node has no such event loop");
    return false;
  }
  record_ = static_cast<int32_t*>(data);
  if (!link_.open(address, port)) {
    fail(env_, link_.failure().c_str());
    return false;
  }
  poll_ = ::operator new(uv_handle_size(type));
  if (uv_poll_init(loop, poll_, link_.descriptor()) != 0) {
    ::operator delete(poll_);
    poll_ = nullptr;
    fail(env_, "the event loop does not watch the connection");
    return false;
  }
  uv_handle_set_data(poll_, this);
  napi_value name;
  napi_create_string_utf8(env_, "lamina.link", NAPI_AUTO_LENGTH, &name);
  napi_async_init(env_, nullptr, name, &context_);
  napi_create_reference(env_, record, 1, &record_ref_);
  napi_create_reference(env_, on_line, 1, &on_line_);
  napi_create_reference(env_, on_memory, 1, &on_memory_);
  napi_create_reference(env_, on_end, 1, &on_end_);
  napi_add_async_cleanup_hook(env_, on_teardown, this, &hook_);
  watch(kUvReadable | kUvWritable);
  return true;
}

void LinkHandle::watch(int events) {
  if (events == events_ || poll_ == nullptr || is_closing_) return;
  events_ = events;
  uv_poll_start(poll_, events, on_ready);
}

void LinkHandle::settle() {
  if (link_.is_open()) {
    if (is_connected_) watch(link_.has_unsent() ? kUvReadable | kUvWritable : kUvReadable);
  } else {
    stop_watching();
  }
}

void LinkHandle::stop_watching() {
  if (is_closing_ || poll_ == nullptr) return;
  is_closing_ = true;
  uv_poll_stop(poll_);
  uv_close(poll_, on_poll_closed);
}

void LinkHandle::on_ready(void* poll, int status, int events) {
  LinkHandle* self = static_cast<LinkHandle*>(uv_handle_get_data(poll));
  if (!self->link_.is_open()) return;
  napi_handle_scope scope;
  if (napi_open_handle_scope(self->env_, &scope) != napi_ok) return;
  napi_value resource;
  napi_callback_scope callback_scope;
  napi_create_object(self->env_, &resource);
  const bool is_scoped = napi_open_callback_scope(self->env_, resource, self->context_, &callback_scope) == napi_ok;
  if (status < 0) self->link_.fail_by_socket_error();
  self->is_connected_ = true;
  if ((events & kUvReadable) != 0) self->link_.receive();
  // Answers to what was received leave in one call.
  self->link_.flush();
  self->settle();
  if (is_scoped) napi_close_callback_scope(self->env_, callback_scope);
  napi_close_handle_scope(self->env_, scope);
}

/** The last that libuv does with the handle: now the owner hears that the link has ended. */
void LinkHandle::on_poll_closed(void* poll) {
  LinkHandle* self = static_cast<LinkHandle*>(uv_handle_get_data(poll));
  ::operator delete(poll);
  self->poll_ = nullptr;
  self->link_.close_descriptor();
  if (!self->is_torn_down_) {
    napi_handle_scope scope;
    napi_open_handle_scope(self->env_, &scope);
    napi_value resource;
    napi_callback_scope callback_scope;
    napi_create_object(self->env_, &resource);
    const bool is_scoped = napi_open_callback_scope(self->env_, resource, self->context_, &callback_scope) == napi_ok;
    napi_value reason;
    napi_create_string_utf8(self->env_, self->link_.failure().c_str(), NAPI_AUTO_LENGTH, &reason);
    if (!self->is_forgotten_) self->call(self->on_end_, 1, &reason, nullptr);
    if (is_scoped) napi_close_callback_scope(self->env_, callback_scope);
    napi_async_destroy(self->env_, self->context_);
    for (napi_ref* reference : {&self->record_ref_, &self->memory_ref_, &self->on_line_, &self->on_memory_, &self->on_end_})
      self->delete_reference(reference);
    for (Attached& attached : self->handlers_) self->delete_reference(&attached.external);
    self->handlers_.clear();
    napi_close_handle_scope(self->env_, scope);
  }
  if (self->hook_ != nullptr) napi_remove_async_cleanup_hook(self->hook_);
  self->hook_ = nullptr;
  if (self->is_forgotten_) delete self;
}

void LinkHandle::on_teardown(napi_async_cleanup_hook_handle hook, void* data) {
  LinkHandle* self = static_cast<LinkHandle*>(data);
  self->hook_ = hook;
  self->is_torn_down_ = true;
  self->link_.close("the process ends");
  self->stop_watching();
}

void LinkHandle::forget() {
  is_forgotten_ = true;
  if (poll_ == nullptr) {
    delete this;
    return;
  }
  link_.close("");
  stop_watching();
}

void LinkHandle::attach(uint32_t subscription, const FrameHandler* handler, napi_value external) {
  // Once the references are let go, nobody would let this one go.
  if (!link_.is_open()) return;
  handlers_.push_back({subscription, handler, nullptr});
  napi_create_reference(env_, external, 1, &handlers_.back().external);
}

void LinkHandle::detach(uint32_t subscription) {
  for (size_t i = 0; i < handlers_.size(); i++) {
    if (handlers_[i].subscription != subscription) continue;
    delete_reference(&handlers_[i].external);
    handlers_.erase(handlers_.begin() + std::ptrdiff_t(i));
    return;
  }
}

bool LinkHandle::handle_natively(const ServerLine& line, const char* bytes) {
  for (const Attached& attached : handlers_) {
    if (attached.subscription != line.subscription) continue;
    FrameAnswer answer{};
    const uint8_t* payload = reinterpret_cast<const uint8_t*>(bytes + line.payload.start);
    if (!attached.handler->handle(attached.handler->context, payload, line.payload.length, max_payload_bytes_, &answer))
      return false;
    link_.publish(answer.subject, answer.subject_length, nullptr, 0, reinterpret_cast<const char*>(answer.data),
                  answer.length);
    // What came behind it may take long.
    link_.flush();
    return true;
  }
  return false;
}

void LinkHandle::on_line(const ServerLine& line, const char* bytes) {
  if (line.kind == LineKind::kMessage && line.headers.length == 0 && handle_natively(line, bytes)) return;
  const size_t base = size_t(bytes - memory_);
  const bool is_message = line.kind == LineKind::kMessage;
  const Span first = is_message ? line.subject : line.text;
  record_[kKind] = int32_t(line.kind);
  record_[kSubscription] = int32_t(line.subscription);
  record_[kStart] = int32_t(base);
  record_[kSubject] = int32_t(base + first.start);
  record_[kSubjectEnd] = int32_t(base + first.start + first.length);
  record_[kReply] = int32_t(base + line.reply.start);
  record_[kReplyEnd] = int32_t(base + line.reply.start + line.reply.length);
  record_[kHeaders] = int32_t(base + line.headers.start);
  record_[kPayload] = int32_t(base + line.payload.start);
  record_[kEnd] = int32_t(base + line.payload.start + line.payload.length);
  napi_handle_scope scope;
  napi_open_handle_scope(env_, &scope);
  call(on_line_, 0, nullptr, nullptr);
  napi_close_handle_scope(env_, scope);
}

char* LinkHandle::new_memory(size_t min_bytes, size_t* capacity) {
  napi_handle_scope scope;
  napi_open_handle_scope(env_, &scope);
  napi_value argument;
  napi_value memory = nullptr;
  napi_create_double(env_, double(min_bytes), &argument);
  call(on_memory_, 1, &argument, &memory);
  void* data = nullptr;
  if (memory == nullptr || !read_typed_array(env_, memory, napi_uint8_array, &data, capacity)) {
    napi_value ignored;
    napi_get_and_clear_last_exception(env_, &ignored);
    data = nullptr;
  } else {
    napi_ref reference = nullptr;
    napi_create_reference(env_, memory, 1, &reference);
    // The former memory is still copied from when this returns: nothing is collected before JavaScript runs again.
    delete_reference(&memory_ref_);
    memory_ref_ = reference;
    memory_ = static_cast<const char*>(data);
  }
  napi_close_handle_scope(env_, scope);
  return static_cast<char*>(data);
}

/** Words of a few bytes, up to the longest subject. */
class ShortText {
 public:
  bool read(napi_env env, napi_value value) {
    if (napi_get_value_string_latin1(env, value, bytes_, sizeof bytes_, &length_) == napi_ok && length_ + 1 < sizeof bytes_)
      return true;
    fail(env, "expected a short string");
    return false;
  }
  const char* bytes() const { return bytes_; }
  size_t length() const { return length_; }

 private:
  char bytes_[1024];
  size_t length_ = 0;
};

bool read_bytes(napi_env env, napi_value value, const char** data, size_t* length) {
  void* found = nullptr;
  if (!read_typed_array(env, value, napi_uint8_array, &found, length)) return false;
  *data = static_cast<const char*>(found);
  return true;
}

/** open(address, port, record, onLine, onMemory, onEnd): throws when there is no such connection to be had. */
napi_value open(napi_env env, napi_callback_info info) {
  napi_value args[6];
  ShortText address;
  int32_t port = 0;
  if (!read_arguments(env, info, 6, args) || !address.read(env, args[0]) || !read_int32(env, args[1], &port)) return nullptr;
  std::unique_ptr<LinkHandle> link(new LinkHandle(env));
  if (!link->start(std::string(address.bytes(), address.length()), port, args[2], args[3], args[4], args[5])) return nullptr;
  napi_value handle;
  if (napi_create_external(
          env, link.get(), [](napi_env, void* data, void*) { static_cast<LinkHandle*>(data)->forget(); }, nullptr, &handle) !=
      napi_ok) {
    link.release()->forget();
    return fail(env, "no handle could be made");
  }
  link.release();
  return handle;
}

/** publish(link, subject, reply, data): an empty reply is none. */
napi_value publish(napi_env env, napi_callback_info info) {
  napi_value args[4];
  ShortText subject;
  ShortText reply;
  const char* data = nullptr;
  size_t length = 0;
  if (!read_arguments(env, info, 4, args) || !subject.read(env, args[1]) || !reply.read(env, args[2]) ||
      !read_bytes(env, args[3], &data, &length))
    return nullptr;
  LinkHandle* handle = read_external<LinkHandle>(env, args[0]);
  if (handle == nullptr) return nullptr;
  handle->link().publish(subject.bytes(), subject.length(), reply.bytes(), reply.length(), data, length);
  // What waits is sent at the end of the turn, and watched for only if the socket does not take it then.
  if (!handle->link().is_open()) handle->settle();
  return nullptr;
}

/** write(link, bytes): lines of the protocol; sent at once. */
napi_value write(napi_env env, napi_callback_info info) {
  napi_value args[2];
  const char* data = nullptr;
  size_t length = 0;
  if (!read_arguments(env, info, 2, args) || !read_bytes(env, args[1], &data, &length)) return nullptr;
  LinkHandle* handle = read_external<LinkHandle>(env, args[0]);
  if (handle == nullptr) return nullptr;
  handle->link().write(data, length);
  handle->link().flush();
  handle->settle();
  return nullptr;
}

/** flush(link): sends what was published. */
napi_value flush(napi_env env, napi_callback_info info) {
  napi_value args[1];
  if (!read_arguments(env, info, 1, args)) return nullptr;
  LinkHandle* handle = read_external<LinkHandle>(env, args[0]);
  if (handle == nullptr) return nullptr;
  handle->link().flush();
  handle->settle();
  return nullptr;
}

/** receive(link, spinUs): sends, then takes what comes within that time. Returns how many messages onLine was told of. */
napi_value receive(napi_env env, napi_callback_info info) {
  napi_value args[2];
  int32_t spin_us = 0;
  if (!read_arguments(env, info, 2, args) || !read_int32(env, args[1], &spin_us)) return nullptr;
  LinkHandle* handle = read_external<LinkHandle>(env, args[0]);
  if (handle == nullptr) return nullptr;
  const int32_t num_messages = handle->link().receive_soon(spin_us);
  handle->settle();
  napi_value result;
  napi_create_int32(env, num_messages, &result);
  return result;
}

/** sleep(link, timeoutUs): until there is something to receive. */
napi_value sleep(napi_env env, napi_callback_info info) {
  napi_value args[2];
  int32_t timeout_us = 0;
  if (!read_arguments(env, info, 2, args) || !read_int32(env, args[1], &timeout_us)) return nullptr;
  LinkHandle* handle = read_external<LinkHandle>(env, args[0]);
  if (handle == nullptr) return nullptr;
  handle->link().sleep(timeout_us);
  handle->settle();
  return nullptr;
}

/** hold(link): the memory that the last line lies in is not written again. Call in onLine. */
napi_value hold(napi_env env, napi_callback_info info) {
  napi_value args[1];
  if (!read_arguments(env, info, 1, args)) return nullptr;
  LinkHandle* handle = read_external<LinkHandle>(env, args[0]);
  if (handle != nullptr) handle->link().hold_memory();
  return nullptr;
}

/** attach(link, subscription, handler): a FrameHandler of another addon. */
napi_value attach(napi_env env, napi_callback_info info) {
  napi_value args[3];
  int32_t subscription = 0;
  if (!read_arguments(env, info, 3, args) || !read_int32(env, args[1], &subscription)) return nullptr;
  LinkHandle* handle = read_external<LinkHandle>(env, args[0]);
  if (handle == nullptr) return nullptr;
  const FrameHandler* handler = read_external<FrameHandler>(env, args[2]);
  if (handler != nullptr) handle->attach(uint32_t(subscription), handler, args[2]);
  return nullptr;
}

/** detach(link, subscription) */
napi_value detach(napi_env env, napi_callback_info info) {
  napi_value args[2];
  int32_t subscription = 0;
  if (!read_arguments(env, info, 2, args) || !read_int32(env, args[1], &subscription)) return nullptr;
  LinkHandle* handle = read_external<LinkHandle>(env, args[0]);
  if (handle != nullptr) handle->detach(uint32_t(subscription));
  return nullptr;
}

/** setMaxPayload(link, numBytes) */
napi_value set_max_payload(napi_env env, napi_callback_info info) {
  napi_value args[2];
  int32_t num_bytes = 0;
  if (!read_arguments(env, info, 2, args) || !read_int32(env, args[1], &num_bytes)) return nullptr;
  LinkHandle* handle = read_external<LinkHandle>(env, args[0]);
  if (handle != nullptr) handle->set_max_payload(size_t(num_bytes < 0 ? 0 : num_bytes));
  return nullptr;
}

/** close(link): onEnd is called when it is over. */
napi_value close(napi_env env, napi_callback_info info) {
  napi_value args[1];
  if (!read_arguments(env, info, 1, args)) return nullptr;
  LinkHandle* handle = read_external<LinkHandle>(env, args[0]);
  if (handle != nullptr) handle->close("closed");
  return nullptr;
}

napi_value init(napi_env env, napi_value exports) {
  const struct {
    const char* name;
    napi_callback function;
  } functions[] = {{"open", open},   {"publish", publish}, {"write", write}, {"flush", flush},
                   {"receive", receive}, {"sleep", sleep}, {"hold", hold}, {"attach", attach}, {"detach", detach},
                   {"setMaxPayload", set_max_payload}, {"close", close}};
  for (const auto& entry : functions) {
    napi_value function;
    napi_create_function(env, entry.name, NAPI_AUTO_LENGTH, entry.function, nullptr, &function);
    napi_set_named_property(env, exports, entry.name, function);
  }
  return exports;
}

}  // namespace
}  // namespace lamina

NAPI_MODULE_INIT() { return lamina::init(env, exports); }
