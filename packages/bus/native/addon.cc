// Owns the N-API surface of a link. native-socket.ts is the only caller.
#include <memory>
#include <string>

#include "frame_handler.h"
#include "link_handle.h"
#include "napi_values.h"

namespace lamina {
namespace {

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

/** The arguments of a call, the first of which is a link: that link, or null after throwing. */
template <size_t kCount>
LinkHandle* read_call(napi_env env, napi_callback_info info, napi_value (&args)[kCount]) {
  return read_arguments(env, info, kCount, args) ? read_external<LinkHandle>(env, args[0]) : nullptr;
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
  const LinkCpu cpu;
  napi_value args[4];
  LinkHandle* handle = read_call(env, info, args);
  ShortText subject;
  ShortText reply;
  TypedArray<uint8_t> data;
  if (handle == nullptr || !subject.read(env, args[1]) || !reply.read(env, args[2]) || !read_array(env, args[3], &data))
    return nullptr;
  handle->link().publish(subject.bytes(), subject.length(), reply.bytes(), reply.length(),
                         reinterpret_cast<const char*>(data.data), data.length);
  // What waits is sent at the end of the turn, and watched for only if the socket does not take it then.
  if (!handle->link().is_open()) handle->settle();
  return nullptr;
}

/** write(link, bytes): lines of the protocol; sent at once. */
napi_value write(napi_env env, napi_callback_info info) {
  const LinkCpu cpu;
  napi_value args[2];
  LinkHandle* handle = read_call(env, info, args);
  TypedArray<uint8_t> bytes;
  if (handle == nullptr || !read_array(env, args[1], &bytes)) return nullptr;
  handle->link().write(reinterpret_cast<const char*>(bytes.data), bytes.length);
  handle->link().flush();
  handle->settle();
  return nullptr;
}

/** flush(link): sends what was published. */
napi_value flush(napi_env env, napi_callback_info info) {
  const LinkCpu cpu;
  napi_value args[1];
  LinkHandle* handle = read_call(env, info, args);
  if (handle == nullptr) return nullptr;
  handle->link().flush();
  handle->settle();
  return nullptr;
}

/** wait(link, timeoutUs, spinUs): sends, then takes what comes in time. Returns how many messages onLine was told of. */
napi_value wait(napi_env env, napi_callback_info info) {
  const LinkCpu cpu;
  napi_value args[3];
  LinkHandle* handle = read_call(env, info, args);
  int32_t timeout_us = 0;
  int32_t spin_us = 0;
  if (handle == nullptr || !read_int32(env, args[1], &timeout_us) || !read_int32(env, args[2], &spin_us)) return nullptr;
  const int32_t num_messages = handle->link().wait(timeout_us, spin_us);
  handle->settle();
  napi_value result;
  napi_create_int32(env, num_messages, &result);
  return result;
}

/** hold(link): the memory that the last line lies in is not written again. Call in onLine. */
napi_value hold(napi_env env, napi_callback_info info) {
  napi_value args[1];
  LinkHandle* handle = read_call(env, info, args);
  if (handle != nullptr) handle->link().hold_memory();
  return nullptr;
}

/** attach(link, subscription, handler): a FrameHandler of another addon. */
napi_value attach(napi_env env, napi_callback_info info) {
  napi_value args[3];
  LinkHandle* handle = read_call(env, info, args);
  int32_t subscription = 0;
  if (handle == nullptr || !read_int32(env, args[1], &subscription)) return nullptr;
  const FrameHandler* handler = read_external<FrameHandler>(env, args[2]);
  if (handler != nullptr) handle->attach(uint32_t(subscription), handler, args[2]);
  return nullptr;
}

/** detach(link, subscription) */
napi_value detach(napi_env env, napi_callback_info info) {
  napi_value args[2];
  LinkHandle* handle = read_call(env, info, args);
  int32_t subscription = 0;
  if (handle != nullptr && read_int32(env, args[1], &subscription)) handle->detach(uint32_t(subscription));
  return nullptr;
}

/** setMaxPayload(link, numBytes) */
napi_value set_max_payload(napi_env env, napi_callback_info info) {
  napi_value args[2];
  LinkHandle* handle = read_call(env, info, args);
  int32_t num_bytes = 0;
  if (handle != nullptr && read_int32(env, args[1], &num_bytes)) handle->set_max_payload(size_t(num_bytes < 0 ? 0 : num_bytes));
  return nullptr;
}

/** close(link): onEnd is called when it is over. */
napi_value close(napi_env env, napi_callback_info info) {
  napi_value args[1];
  LinkHandle* handle = read_call(env, info, args);
  if (handle != nullptr) handle->close("closed");
  return nullptr;
}

/** takeCpuSeconds(isMeasured): what links of this thread took since the last call; whether it is measured from now on. */
napi_value take_cpu_seconds(napi_env env, napi_callback_info info) {
  napi_value args[1];
  bool is_measured = false;
  if (!read_arguments(env, info, 1, args) || !read_bool(env, args[0], &is_measured)) return nullptr;
  napi_value seconds;
  napi_create_double(env, LinkCpu::take(is_measured), &seconds);
  return seconds;
}

napi_value init(napi_env env, napi_value exports) {
  return define_functions(env, exports,
                          {{"open", open},
                           {"publish", publish},
                           {"write", write},
                           {"flush", flush},
                           {"wait", wait},
                           {"hold", hold},
                           {"attach", attach},
                           {"detach", detach},
                           {"setMaxPayload", set_max_payload},
                           {"close", close},
                           {"takeCpuSeconds", take_cpu_seconds}});
}

}  // namespace
}  // namespace lamina

NAPI_MODULE_INIT() { return lamina::init(env, exports); }
