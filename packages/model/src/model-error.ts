/**
 * Owns how a problem with a model's files becomes the one error that ends the process.
 *
 * Invariants
 * 1. Every such error is a LaminaError('model_invalid') whose message names the file, what is wrong and what to do.
 */
import { LaminaError } from '@lamina/tensor';

/**
 * @param file Path of the file that is to blame, or of the directory when a file is missing from it.
 * @param problem What is wrong with it.
 * @param remedy What the operator can do about it.
 */
export function modelInvalid(file: string, problem: string, remedy: string, cause?: unknown): LaminaError {
  return new LaminaError('model_invalid', `${file}: ${problem}; ${remedy}`, cause === undefined ? {} : { cause });
}

/** Node's error code (`ENOENT`, ...) of an unknown error, or an empty string. */
export function systemErrorCode(error: unknown): string {
  if (error instanceof LaminaError) return '';
  return error instanceof Error && 'code' in error && typeof error.code === 'string' ? error.code : '';
}

export function reasonOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
