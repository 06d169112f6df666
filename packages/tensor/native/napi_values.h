// Owns the reading of JavaScript arguments. Every failure leaves a JavaScript exception pending and returns false / null.
#pragma once
#include <node_api.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <vector>

namespace lamina {

inline napi_value fail(napi_env env, const char* message) {
  bool pending = false;
  napi_is_exception_pending(env, &pending);
  if (!pending) napi_throw_error(env, nullptr, message);
  return nullptr;
}

/** The arguments of one call; false unless exactly `count` were given. */
inline bool read_arguments(napi_env env, napi_callback_info info, size_t count, napi_value* values) {
  size_t given = count;
  if (napi_get_cb_info(env, info, &given, values, nullptr, nullptr) == napi_ok && given == count) return true;
  fail(env, "wrong number of arguments");
  return false;
}

inline bool read_int32(napi_env env, napi_value value, int32_t* out) {
  if (napi_get_value_int32(env, value, out) == napi_ok) return true;
  fail(env, "expected an integer");
  return false;
}

inline bool read_double(napi_env env, napi_value value, double* out) {
  if (napi_get_value_double(env, value, out) == napi_ok) return true;
  fail(env, "expected a number");
  return false;
}

inline bool read_bool(napi_env env, napi_value value, bool* out) {
  if (napi_get_value_bool(env, value, out) == napi_ok) return true;
  fail(env, "expected a boolean");
  return false;
}

inline bool read_string(napi_env env, napi_value value, std::string* out) {
  char buffer[1024];
  size_t length = 0;
  if (napi_get_value_string_latin1(env, value, buffer, sizeof buffer, &length) != napi_ok || length + 1 == sizeof buffer) {
    fail(env, "expected a short string");
    return false;
  }
  out->assign(buffer, length);
  return true;
}

/** The memory of a typed array. */
template <class Element>
struct TypedArray {
  Element* data = nullptr;
  size_t length = 0;
};

template <class Element>
struct TypedArrayType;
template <>
struct TypedArrayType<uint8_t> {
  static constexpr napi_typedarray_type value = napi_uint8_array;
};
template <>
struct TypedArrayType<uint16_t> {
  static constexpr napi_typedarray_type value = napi_uint16_array;
};
template <>
struct TypedArrayType<int32_t> {
  static constexpr napi_typedarray_type value = napi_int32_array;
};
template <>
struct TypedArrayType<float> {
  static constexpr napi_typedarray_type value = napi_float32_array;
};
template <>
struct TypedArrayType<double> {
  static constexpr napi_typedarray_type value = napi_float64_array;
};

/** A typed array of exactly this element; it stays where it is as long as JavaScript holds it. */
template <class Element>
bool read_array(napi_env env, napi_value value, TypedArray<Element>* out) {
  bool is_typed_array = false;
  napi_typedarray_type type = napi_int8_array;
  void* data = nullptr;
  if (napi_is_typedarray(env, value, &is_typed_array) == napi_ok && is_typed_array &&
      napi_get_typedarray_info(env, value, &type, &out->length, &data, nullptr, nullptr) == napi_ok &&
      type == TypedArrayType<Element>::value) {
    out->data = static_cast<Element*>(data);
    return true;
  }
  fail(env, "expected another type of typed array");
  return false;
}

/** Records of int32 fields, laid out one after the other in an Int32Array; what is short of a record is left out. */
template <class Record>
bool read_int32_records(napi_env env, napi_value value, std::vector<Record>* out) {
  static_assert(std::is_trivially_copyable<Record>::value && alignof(Record) == alignof(int32_t), "int32 fields only");
  TypedArray<int32_t> fields;
  if (!read_array(env, value, &fields)) return false;
  const Record* first = reinterpret_cast<const Record*>(fields.data);
  out->assign(first, first + fields.length / (sizeof(Record) / sizeof(int32_t)));
  return true;
}

inline bool read_floats(napi_env env, napi_value value, std::vector<float>* out) {
  TypedArray<float> floats;
  if (!read_array(env, value, &floats)) return false;
  if (floats.length > 0) out->assign(floats.data, floats.data + floats.length);
  return true;
}

/** A pointer that this addon wrapped in an external and tagged with `magic` in its first field. */
template <class T>
T* read_external(napi_env env, napi_value value) {
  napi_valuetype type = napi_undefined;
  void* data = nullptr;
  if (napi_typeof(env, value, &type) == napi_ok && type == napi_external &&
      napi_get_value_external(env, value, &data) == napi_ok && data != nullptr &&
      static_cast<T*>(data)->magic == T::kMagic)
    return static_cast<T*>(data);
  fail(env, "expected a handle of another kind");
  return nullptr;
}

struct NamedFunction {
  const char* name;
  napi_callback function;
};

/** Puts the functions on `exports`; null when that fails. */
inline napi_value define_functions(napi_env env, napi_value exports, std::initializer_list<NamedFunction> functions) {
  for (const NamedFunction& each : functions) {
    napi_value function;
    if (napi_create_function(env, each.name, NAPI_AUTO_LENGTH, each.function, nullptr, &function) != napi_ok ||
        napi_set_named_property(env, exports, each.name, function) != napi_ok)
      return nullptr;
  }
  return exports;
}

}  // namespace lamina
