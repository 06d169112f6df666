#include "vector_functions.h"

#include <algorithm>
#include <cstring>

#include "cpu_dispatch.h"
#include "napi_values.h"

namespace lamina {

napi_value to_halves(napi_env env, napi_callback_info info) {
  napi_value args[5];
  if (!read_arguments(env, info, 5, args)) return nullptr;
  TypedArray<float> source;
  TypedArray<uint16_t> target;
  int32_t start = 0;
  int32_t count = 0;
  int32_t at = 0;
  if (!read_array(env, args[0], &source) || !read_int32(env, args[1], &start) || !read_int32(env, args[2], &count) ||
      !read_array(env, args[3], &target) || !read_int32(env, args[4], &at))
    return nullptr;
  if (start < 0 || count < 0 || at < 0 || size_t(start) + size_t(count) > source.length ||
      size_t(at) + size_t(count) > target.length)
    return fail(env, "range outside of the arrays");
  fastest_kernel().to_halves(source.data + start, target.data + at, size_t(count));
  return nullptr;
}

napi_value to_floats(napi_env env, napi_callback_info info) {
  napi_value args[3];
  if (!read_arguments(env, info, 3, args)) return nullptr;
  TypedArray<uint8_t> source;
  TypedArray<float> target;
  int32_t count = 0;
  if (!read_array(env, args[0], &source) || !read_int32(env, args[1], &count) || !read_array(env, args[2], &target))
    return nullptr;
  if (count < 0 || size_t(count) * 2 > source.length || size_t(count) > target.length)
    return fail(env, "range outside of the arrays");
  // Through aligned memory: received bytes lie anywhere.
  uint16_t halves[512];
  for (size_t done = 0; done < size_t(count);) {
    const size_t piece = std::min(sizeof halves / 2, size_t(count) - done);
    std::memcpy(halves, source.data + 2 * done, 2 * piece);
    fastest_kernel().to_floats(halves, target.data + done, piece);
    done += piece;
  }
  return nullptr;
}

napi_value argmax(napi_env env, napi_callback_info info) {
  napi_value args[1];
  if (!read_arguments(env, info, 1, args)) return nullptr;
  TypedArray<float> values;
  if (!read_array(env, args[0], &values)) return nullptr;
  if (values.length > size_t(INT32_MAX)) return fail(env, "too many values");
  napi_value index;
  napi_create_int32(env, fastest_kernel().argmax(values.data, int32_t(values.length)), &index);
  return index;
}

}  // namespace lamina
