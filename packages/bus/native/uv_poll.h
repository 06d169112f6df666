// Owns what is used of libuv: watching one descriptor. Its header comes with no package, so the few functions are declared
// here; all are public and unchanged since libuv 1.19 (https://docs.libuv.org/en/v1.x/poll.html). Node exports them.
#pragma once
#include <cstddef>
#include <cstring>

struct uv_loop_s;

extern "C" {
typedef void (*uv_poll_cb)(void* handle, int status, int events);
typedef void (*uv_close_cb)(void* handle);
size_t uv_handle_size(int type);
const char* uv_handle_type_name(int type);
int uv_poll_init(uv_loop_s* loop, void* handle, int descriptor);
int uv_poll_start(void* handle, int events, uv_poll_cb callback);
int uv_poll_stop(void* handle);
void uv_close(void* handle, uv_close_cb callback);
void* uv_handle_get_data(const void* handle);
void uv_handle_set_data(void* handle, void* data);
}

namespace lamina {

constexpr int kUvReadable = 1;
constexpr int kUvWritable = 2;

/** libuv's number of a poll handle, asked by name, since it is an enumeration; -1 when there is none. */
inline int uv_poll_type() {
  for (int type = 1; type < 16; type++) {
    const char* name = uv_handle_type_name(type);
    if (name != nullptr && strcmp(name, "poll") == 0) return type;
  }
  return -1;
}

}  // namespace lamina
