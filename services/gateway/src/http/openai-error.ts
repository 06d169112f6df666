/**
 * Owns errors in the shape that OpenAI's clients read, and the headers that go with them.
 */
import { type ErrorCode, LaminaError } from '@lamina/tensor';

export interface OpenAiError {
  readonly error: {
    readonly message: string;
    readonly type: string;
    readonly param: string | null;
    readonly code: ErrorCode;
    readonly retryAfterMs?: number;
  };
}

const DEFAULT_RETRY_AFTER_MS = 1_000;

function typeOf(status: number): string {
  if (status === 401) return 'authentication_error';
  if (status === 429) return 'rate_limit_error';
  return status < 500 ? 'invalid_request_error' : 'server_error';
}

export function openAiError(error: LaminaError, status = error.httpStatus): OpenAiError {
  const retryAfterMs = retryAfterMsOf(error);
  // Field names come first in the messages of our schemas.
  const param = error.code === 'invalid_request' ? (/^([a-z_]+)(?:\.\S+)?: /.exec(error.message)?.[1] ?? null) : null;
  return {
    error: {
      message: error.message,
      type: typeOf(status),
      param,
      code: error.code,
      ...(retryAfterMs !== undefined && { retryAfterMs }),
    },
  };
}

/** When to try again; undefined for what will not succeed unchanged. */
export function retryAfterMsOf(error: LaminaError): number | undefined {
  return error.retryAfterMs ?? (error.retryable ? DEFAULT_RETRY_AFTER_MS : undefined);
}

/** What a handler threw, as an error for the client, and its status. */
export function httpErrorOf(cause: unknown): { readonly error: LaminaError; readonly status: number } {
  if (cause instanceof LaminaError) {
    const error = cause.code === 'internal' ? hidden(cause) : cause;
    return { error, status: error.httpStatus };
  }
  const status =
    typeof cause === 'object' && cause !== null && 'statusCode' in cause && typeof cause.statusCode === 'number'
      ? cause.statusCode
      : 500;
  if (status >= 500 || !(cause instanceof Error)) return { error: hidden(cause), status };
  return { error: new LaminaError('invalid_request', cause.message, { cause }), status };
}

function hidden(cause: unknown): LaminaError {
  return new LaminaError('internal', 'internal error; see the log of the gateway', { cause });
}
