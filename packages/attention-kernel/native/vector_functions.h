// Owns the loops over many numbers that JavaScript calls by themselves, without a kernel (vector-ops.ts).
#pragma once
#include <node_api.h>

namespace lamina {

/** toHalves(source Float32Array, start, count, target Uint16Array, at): rounded to the nearest float16. */
napi_value to_halves(napi_env env, napi_callback_info info);

/** toFloats(source Uint8Array, count, target Float32Array): the first `count` float16 of source, at any alignment. */
napi_value to_floats(napi_env env, napi_callback_info info);

/** argmax(values Float32Array): index of the first largest value; -1 when that is not finite or some value is NaN. */
napi_value argmax(napi_env env, napi_callback_info info);

}  // namespace lamina
