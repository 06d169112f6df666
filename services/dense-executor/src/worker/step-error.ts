/** Owns what is said of a step that fails on this thread: the code of whatever was thrown, and a message that may be shown. */
import { asLaminaError, LaminaError } from '@lamina/tensor';

/** How ONNX Runtime, the C++ library and V8 say that memory is short; none of them has a code for it. */
const MEMORY_REASON = /\balloc(?:ate|ation)?\b|bad_alloc|out of memory/i;

/** For memory or threads that a step was refused: the same may succeed when less runs beside it, or with less at a time. */
export function outOfMemory(reason: string, cause: unknown): LaminaError {
  const advice =
    'retry later; lower LAMINA_MAX_BATCHED_TOKENS, or give the dense-executor more memory, if it happens often';
  return new LaminaError('overloaded', `the dense-executor is short of memory for this step (${reason}); ${advice}`, {
    cause,
  });
}

/** Why a step failed, from whatever its layers threw. */
export function stepError(cause: unknown): LaminaError {
  const error = asLaminaError(cause);
  // Of a process that has started: nobody is to look for a flag that kept it from that.
  if (error.code === 'config_invalid') return new LaminaError('internal', error.message, { cause });
  if (error.code !== 'internal' || typeof error.diagnostics.reason !== 'string') return error;
  const reason = error.diagnostics.reason.replace(/\s+/g, ' ').trim();
  if (MEMORY_REASON.test(reason)) return outOfMemory(reason, cause);
  return new LaminaError('internal', `a step failed in the dense-executor: ${reason}`, { cause });
}
