#include "link_handle.h"

#include <ctime>

#include "uv_poll.h"

namespace lamina {
namespace {

/** Fields of the record, int32 each. See native-socket.ts. */
enum RecordField { kKind, kSubscription, kStart, kSubject, kSubjectEnd, kReply, kReplyEnd, kHeaders, kPayload, kEnd, kNumFields };

thread_local bool t_is_cpu_measured = false;
thread_local int t_depth = 0;
thread_local double t_entered_at = 0;
thread_local double t_cpu_seconds = 0;

double thread_cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

}  // namespace

void LinkCpu::enter() {
  if (t_is_cpu_measured && t_depth++ == 0) t_entered_at = thread_cpu_seconds();
}

void LinkCpu::leave() {
  if (t_depth > 0 && --t_depth == 0) t_cpu_seconds += thread_cpu_seconds() - t_entered_at;
}

LinkCpu::Pause::Pause() : depth_(t_depth) {
  if (depth_ > 0) {
    t_depth = 1;
    leave();
  }
}

LinkCpu::Pause::~Pause() {
  if (depth_ > 0) {
    t_entered_at = thread_cpu_seconds();
    t_depth = depth_;
  }
}

double LinkCpu::take(bool is_measured) {
  const double seconds = t_cpu_seconds;
  t_cpu_seconds = 0;
  t_is_cpu_measured = is_measured;
  return seconds;
}

void LinkHandle::delete_reference(napi_ref* reference) {
  if (*reference != nullptr) napi_delete_reference(env_, *reference);
  *reference = nullptr;
}

void LinkHandle::call(napi_ref function, size_t count, napi_value* arguments, napi_value* result) {
  napi_value callee;
  napi_value receiver;
  if (napi_get_reference_value(env_, function, &callee) != napi_ok || callee == nullptr) return;
  napi_get_undefined(env_, &receiver);
  const LinkCpu::Pause pause;
  if (napi_call_function(env_, receiver, callee, count, arguments, result) == napi_pending_exception) {
    // The callbacks guard what they run; what still comes out is a defect and must not vanish.
    napi_value error;
    napi_get_and_clear_last_exception(env_, &error);
    napi_fatal_exception(env_, error);
  }
}

bool LinkHandle::start(const std::string& address, int32_t port, napi_value record, napi_value on_line, napi_value on_memory,
                       napi_value on_end) {
  TypedArray<int32_t> fields;
  if (!read_array(env_, record, &fields)) return false;
  const int type = uv_poll_type();
  uv_loop_s* loop = nullptr;
  if (fields.length != kNumFields || type < 0 || napi_get_uv_event_loop(env_, &loop) != napi_ok) {
    fail(env_, "this Node has no such event loop");
    return false;
  }
  record_ = fields.data;
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
  const LinkCpu cpu;
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
  TypedArray<uint8_t> bytes;
  if (memory == nullptr || !read_array(env_, memory, &bytes)) {
    napi_value ignored;
    napi_get_and_clear_last_exception(env_, &ignored);
    bytes = {};
  } else {
    napi_ref reference = nullptr;
    napi_create_reference(env_, memory, 1, &reference);
    // The former memory is still copied from when this returns: nothing is collected before JavaScript runs again.
    delete_reference(&memory_ref_);
    memory_ref_ = reference;
    *capacity = bytes.length;
    memory_ = reinterpret_cast<const char*>(bytes.data);
  }
  napi_close_handle_scope(env_, scope);
  return reinterpret_cast<char*>(bytes.data);
}

}  // namespace lamina
