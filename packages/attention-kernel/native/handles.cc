#include "handles.h"

namespace lamina {

void shut_down(void* data) {
  KernelHandle* kernel = static_cast<KernelHandle*>(data);
  if (kernel->frames != nullptr) kernel->frames->close();
  kernel->pool.reset();
  if (kernel->completion != nullptr) napi_release_threadsafe_function(kernel->completion, napi_tsfn_abort);
  kernel->completion = nullptr;
  kernel->slab.reset();
}

void close_kernel(KernelHandle* kernel) {
  if (kernel->completion == nullptr) return;
  napi_remove_env_cleanup_hook(kernel->env, shut_down, kernel);
  shut_down(kernel);
}

void complete(napi_env env, napi_value on_done, void* context, void* data) {
  if (env == nullptr) return;
  KernelHandle* kernel = static_cast<KernelHandle*>(context);
  if (--kernel->num_in_flight == 0 && kernel->completion != nullptr)
    napi_unref_threadsafe_function(env, kernel->completion);
  napi_value receiver;
  napi_value id;
  napi_get_undefined(env, &receiver);
  napi_create_uint32(env, uint32_t(reinterpret_cast<uintptr_t>(data)), &id);
  napi_call_function(env, receiver, on_done, 1, &id, nullptr);
}

KernelHandle* read_kernel(napi_env env, napi_value value) {
  KernelHandle* kernel = read_external<KernelHandle>(env, value);
  if (kernel != nullptr && kernel->pool == nullptr) {
    fail(env, "the kernel is closed");
    return nullptr;
  }
  return kernel;
}

bool run_at_once(KernelHandle& kernel, const Job& job) {
  if (kernel.num_in_flight > 0) return false;
  kernel.pool->run_here(job);
  return true;
}

}  // namespace lamina
