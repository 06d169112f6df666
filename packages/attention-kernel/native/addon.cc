// Owns the N-API surface of the kernel. TypeScript (native-kernel.ts) is its only caller and has checked every index, length and
// layer; what is checked here is what would corrupt memory.
//
// Invariants
// 1. Buffers of an attend stay alive because the caller keeps them until `onDone(id)`, if it is not done when it returns; the
//    thread-safe function's callback holds the caller.
#include <cstring>
#include <new>
#include <system_error>
#include <utility>

#include "cpu_dispatch.h"
#include "handles.h"
#include "napi_values.h"
#include "vector_functions.h"
#include "yardsticks.h"

namespace lamina {
namespace {

/**
 * create(numLayers, numHeads, numKvHeads, headDim, scale, softcap, windowTokens, alibiSlopes, blockSizeTokens, isF16,
 * numBlocks, numThreads, simd, onDone)
 */
napi_value create(napi_env env, napi_callback_info info) {
  napi_value args[14];
  if (!read_arguments(env, info, 14, args)) return nullptr;
  KvShape shape{};
  double scale = 0;
  double softcap = 0;
  std::vector<int32_t> window_tokens;
  std::vector<float> alibi_slopes;
  int32_t num_blocks = 0;
  int32_t num_threads = 0;
  std::string simd;
  if (!read_int32(env, args[0], &shape.num_layers) || !read_int32(env, args[1], &shape.num_heads) ||
      !read_int32(env, args[2], &shape.num_kv_heads) || !read_int32(env, args[3], &shape.head_dim) ||
      !read_double(env, args[4], &scale) || !read_double(env, args[5], &softcap) ||
      !read_int32_records(env, args[6], &window_tokens) || !read_floats(env, args[7], &alibi_slopes) ||
      !read_int32(env, args[8], &shape.block_size_tokens) || !read_bool(env, args[9], &shape.is_f16) ||
      !read_int32(env, args[10], &num_blocks) || !read_int32(env, args[11], &num_threads) ||
      !read_string(env, args[12], &simd))
    return nullptr;
  shape.scale = float(scale);
  if (shape.head_dim > kMaxHeadDim || shape.head_dim < 8 || num_blocks < 1 || num_threads < 1)
    return fail(env, "shape out of range");
  if ((!window_tokens.empty() && window_tokens.size() != size_t(shape.num_layers)) ||
      (!alibi_slopes.empty() && alibi_slopes.size() != size_t(shape.num_heads)))
    return fail(env, "windowTokens needs an entry per layer and alibiSlopes one per head");
  const SimdKernel* variant = choose_kernel(shape, simd);
  if (variant == nullptr) return fail(env, "this processor or this shape has no such SIMD variant");

  std::unique_ptr<KernelHandle> kernel(new KernelHandle());
  kernel->env = env;
  napi_value name;
  napi_create_string_utf8(env, "lamina.attend", NAPI_AUTO_LENGTH, &name);
  try {
    kernel->rules.reset(new ScoreRules(shape, softcap, window_tokens, alibi_slopes));
    kernel->slab.reset(new Slab(shape, num_blocks));
  } catch (const std::bad_alloc&) {
    return fail(env, "the operating system refused the memory");
  }
  kernel->engine = Engine{shape, num_blocks, variant, kernel->slab.get(), kernel->rules.get()};
  if (napi_create_threadsafe_function(env, args[13], nullptr, name, 0, 1, nullptr, nullptr, kernel.get(), complete,
                                      &kernel->completion) != napi_ok)
    return fail(env, "no completion queue could be made");
  napi_unref_threadsafe_function(env, kernel->completion);
  napi_threadsafe_function completion = kernel->completion;
  try {
    kernel->pool.reset(new WorkerPool(kernel->engine, num_threads, [completion](uint32_t id) {
      napi_call_threadsafe_function(completion, reinterpret_cast<void*>(uintptr_t(id)), napi_tsfn_nonblocking);
    }));
  } catch (const std::exception&) {
    shut_down(kernel.get());
    return fail(env, "the worker threads could not be started");
  }
  napi_add_env_cleanup_hook(env, shut_down, kernel.get());
  napi_value handle;
  if (napi_create_external(
          env, kernel.get(),
          [](napi_env, void* data, void*) {
            KernelHandle* dead = static_cast<KernelHandle*>(data);
            close_kernel(dead);
            delete dead;
          },
          nullptr, &handle) != napi_ok) {
    close_kernel(kernel.get());
    return fail(env, "no handle could be made");
  }
  kernel.release();
  return handle;
}

/** kernelName(kernel) */
napi_value kernel_name(napi_env env, napi_callback_info info) {
  napi_value args[1];
  if (!read_arguments(env, info, 1, args)) return nullptr;
  KernelHandle* kernel = read_kernel(env, args[0]);
  if (kernel == nullptr) return nullptr;
  napi_value name;
  napi_create_string_utf8(env, kernel->engine.simd->name, NAPI_AUTO_LENGTH, &name);
  return name;
}

/** beginStep(kernel, numQueryRows, numKvRows, segments, blocks, kvSlots) */
napi_value begin_step(napi_env env, napi_callback_info info) {
  napi_value args[6];
  if (!read_arguments(env, info, 6, args)) return nullptr;
  KernelHandle* kernel = read_kernel(env, args[0]);
  if (kernel == nullptr) return nullptr;
  int32_t num_query_rows = 0;
  int32_t num_kv_rows = 0;
  try {
    std::vector<Segment> segments;
    std::vector<BlockRef> blocks;
    std::vector<int32_t> kv_slots;
    if (!read_int32(env, args[1], &num_query_rows) || !read_int32(env, args[2], &num_kv_rows) ||
        !read_int32_records(env, args[3], &segments) || !read_int32_records(env, args[4], &blocks) ||
        !read_int32_records(env, args[5], &kv_slots))
      return nullptr;
    if (kv_slots.size() != size_t(num_kv_rows)) return fail(env, "kvSlots has another length than numKvRows");
    std::unique_ptr<StepHandle> box(new StepHandle());
    box->step = std::make_shared<Step>(kernel->engine.shape, *kernel->rules, kernel->pool->num_threads(), num_query_rows,
                                       num_kv_rows, std::move(segments), std::move(blocks), std::move(kv_slots));
    napi_value handle;
    if (napi_create_external(
            env, box.get(),
            [](napi_env, void* data, void*) {
              StepHandle* dead = static_cast<StepHandle*>(data);
              dead->end();
              delete dead;
            },
            nullptr, &handle) != napi_ok)
      return fail(env, "no handle could be made");
    box.release();
    return handle;
  } catch (const std::exception&) {
    return fail(env, "out of memory");
  }
}

/** frameHandler(kernel, counts, durations): what a link answers the frames of armed steps with. Once per kernel. */
napi_value frame_handler(napi_env env, napi_callback_info info) {
  napi_value args[3];
  if (!read_arguments(env, info, 3, args)) return nullptr;
  KernelHandle* kernel = read_kernel(env, args[0]);
  if (kernel == nullptr) return nullptr;
  TypedArray<double> counts;
  TypedArray<double> durations;
  if (!read_array(env, args[1], &counts) || !read_array(env, args[2], &durations)) return nullptr;
  if (counts.length != kNumLayerCounts || durations.length == 0 || kernel->frames != nullptr)
    return fail(env, "counts of another length, no durations, or a second handler");
  kernel->frames = std::make_shared<LayerFrames>(
      kernel->engine, [kernel](const Job& job) { return run_at_once(*kernel, job); }, counts.data, durations.data,
      durations.length);
  std::unique_ptr<FramesHandle> box(new FramesHandle());
  box->frames = kernel->frames;
  box->context = kernel->frames.get();
  box->handle = [](void* context, const uint8_t* data, size_t length, size_t max_answer_bytes, FrameAnswer* answer) {
    return static_cast<LayerFrames*>(context)->handle(data, length, max_answer_bytes, answer);
  };
  box->kept.keep(env, args[1]);
  box->kept.keep(env, args[2]);
  napi_value handle;
  // As a FrameHandler: that is what the link reads.
  if (napi_create_external(
          env, static_cast<FrameHandler*>(box.get()),
          [](napi_env, void* data, void*) {
            FramesHandle* dead = static_cast<FramesHandle*>(static_cast<FrameHandler*>(data));
            dead->frames->close();
            dead->kept.release();
            delete dead;
          },
          nullptr, &handle) != napi_ok) {
    box->kept.release();
    return fail(env, "no handle could be made");
  }
  box.release();
  return handle;
}

/** armStep(kernel, step, expectedHeader, answer, reply, state, kvTokens): from now on its frames need no JavaScript. */
napi_value arm_step(napi_env env, napi_callback_info info) {
  napi_value args[7];
  if (!read_arguments(env, info, 7, args)) return nullptr;
  KernelHandle* kernel = read_kernel(env, args[0]);
  if (kernel == nullptr) return nullptr;
  StepHandle* box = read_external<StepHandle>(env, args[1]);
  if (box == nullptr) return nullptr;
  TypedArray<uint8_t> expected;
  TypedArray<uint8_t> answer;
  TypedArray<int32_t> state;
  TypedArray<double> kv_tokens;
  std::unique_ptr<ArmedStep> armed(new ArmedStep());
  if (!read_array(env, args[2], &expected) || !read_array(env, args[3], &answer) ||
      !read_string(env, args[4], &armed->reply) || !read_array(env, args[5], &state) ||
      !read_array(env, args[6], &kv_tokens))
    return nullptr;
  if (kernel->frames == nullptr || box->step == nullptr || box->armed != nullptr)
    return fail(env, "the kernel has no frame handler, or the step has ended or is armed");
  const KvShape& shape = kernel->engine.shape;
  const LayerBytes bytes = layer_bytes(*box->step, shape);
  if (expected.length != kFrameHeaderBytes || state.length != kNumStepStates ||
      kv_tokens.length != size_t(shape.num_layers) || answer.length != kFrameHeaderBytes + bytes.partial)
    return fail(env, "lengths do not fit the step");
  armed->step = box->step;
  std::memcpy(armed->expected, expected.data, kFrameHeaderBytes);
  armed->attend_bytes = bytes.attend;
  armed->answer = answer.data;
  armed->answer_bytes = answer.length;
  armed->state = state.data;
  armed->kv_tokens = kv_tokens.data;
  for (const int i : {3, 5, 6}) box->kept.keep(env, args[i]);
  box->armed = std::move(armed);
  box->frames = kernel->frames;
  box->frames->arm(box->armed.get());
  return nullptr;
}

/** attend(kernel, step, layer, qkv, out, id): true when it is done already; else onDone(id) is called later. */
napi_value attend(napi_env env, napi_callback_info info) {
  napi_value args[6];
  if (!read_arguments(env, info, 6, args)) return nullptr;
  KernelHandle* kernel = read_kernel(env, args[0]);
  if (kernel == nullptr) return nullptr;
  StepHandle* box = read_external<StepHandle>(env, args[1]);
  if (box == nullptr) return nullptr;
  if (box->step == nullptr) return fail(env, "the step has ended");
  int32_t layer = 0;
  int32_t id = 0;
  TypedArray<uint8_t> qkv;
  TypedArray<uint8_t> out;
  if (!read_int32(env, args[2], &layer) || !read_array(env, args[3], &qkv) || !read_array(env, args[4], &out) ||
      !read_int32(env, args[5], &id))
    return nullptr;
  const KvShape& shape = kernel->engine.shape;
  const LayerBytes bytes = layer_bytes(*box->step, shape);
  if (layer < 0 || layer >= shape.num_layers || qkv.length != bytes.attend || out.length != bytes.partial)
    return fail(env, "layer or buffer length does not fit the step");
  Job job{uint32_t(id), box->step, layer, qkv.data, out.data};
  const bool is_done = kernel->engine.division_of(job).is_brief && run_at_once(*kernel, job);
  if (!is_done) {
    if (kernel->num_in_flight++ == 0) napi_ref_threadsafe_function(env, kernel->completion);
    kernel->pool->submit(std::move(job));
  }
  napi_value done;
  napi_get_boolean(env, is_done, &done);
  return done;
}

/** endStep(step): queued attends still finish. */
napi_value end_step(napi_env env, napi_callback_info info) {
  napi_value args[1];
  if (!read_arguments(env, info, 1, args)) return nullptr;
  StepHandle* box = read_external<StepHandle>(env, args[0]);
  if (box != nullptr) box->end();
  return nullptr;
}

/** close(kernel): call only when nothing is in flight. */
napi_value close(napi_env env, napi_callback_info info) {
  napi_value args[1];
  if (!read_arguments(env, info, 1, args)) return nullptr;
  KernelHandle* kernel = read_external<KernelHandle>(env, args[0]);
  if (kernel == nullptr) return nullptr;
  if (kernel->num_in_flight > 0) return fail(env, "attends are in flight");
  close_kernel(kernel);
  return nullptr;
}

/** measureBareRead(kernel, numBytes, numThreads): seconds to read the first numBytes of the slab and add them up. */
napi_value measure_bare_read(napi_env env, napi_callback_info info) {
  napi_value args[3];
  if (!read_arguments(env, info, 3, args)) return nullptr;
  KernelHandle* kernel = read_kernel(env, args[0]);
  if (kernel == nullptr) return nullptr;
  double num_bytes = 0;
  int32_t num_threads = 0;
  if (!read_double(env, args[1], &num_bytes) || !read_int32(env, args[2], &num_threads)) return nullptr;
  if (!(num_bytes >= 0) || num_bytes > double(kernel->slab->num_bytes()) || num_threads < 1)
    return fail(env, "bytes or threads out of range");
  napi_value seconds;
  napi_create_double(env, bare_read_seconds(*kernel->engine.simd, kernel->slab->data(), size_t(num_bytes), num_threads),
                     &seconds);
  return seconds;
}

/** measurePeakFlops(kernel): floating-point operations per second of one core with this kernel's instructions. */
napi_value measure_peak_flops(napi_env env, napi_callback_info info) {
  napi_value args[1];
  if (!read_arguments(env, info, 1, args)) return nullptr;
  KernelHandle* kernel = read_kernel(env, args[0]);
  if (kernel == nullptr) return nullptr;
  napi_value flops;
  napi_create_double(env, peak_flops(*kernel->engine.simd), &flops);
  return flops;
}

/** supportedSimd(): names that `simd` of create may have on this processor, fastest first. */
napi_value supported_simd(napi_env env, napi_callback_info) {
  napi_value list;
  napi_create_array(env, &list);
  uint32_t index = 0;
  for (const SimdKernel* kernel : supported_kernels()) {
    napi_value name;
    napi_create_string_utf8(env, kernel->simd, NAPI_AUTO_LENGTH, &name);
    napi_set_element(env, list, index++, name);
  }
  return list;
}

}  // namespace
}  // namespace lamina

NAPI_MODULE_INIT() {
  using namespace lamina;
  return define_functions(env, exports,
                          {{"create", create},
                           {"kernelName", kernel_name},
                           {"beginStep", begin_step},
                           {"frameHandler", frame_handler},
                           {"armStep", arm_step},
                           {"attend", attend},
                           {"endStep", end_step},
                           {"close", close},
                           {"measureBareRead", measure_bare_read},
                           {"measurePeakFlops", measure_peak_flops},
                           {"supportedSimd", supported_simd},
                           {"toHalves", to_halves},
                           {"toFloats", to_floats},
                           {"argmax", argmax}});
}
