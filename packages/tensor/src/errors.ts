/**
 * Owns the closed set of error codes and the one error class that carries them.
 *
 * Invariants
 * 1. Every error that crosses a process boundary, reaches a client or ends a process is a LaminaError.
 * 2. Whether a code may be retried is decided here, once, and nowhere else.
 * 3. `message` is public (safe to show to a client, says what is wrong and what to do); `diagnostics` is for logs only.
 */

interface ErrorCodeFacts {
  /** True if the same request may succeed later without being changed. */
  readonly retryable: boolean;
  /** Status of the HTTP reply that carries this code. */
  readonly httpStatus: number;
  readonly meaning: string;
}

/** The closed set. docs/errors.md is checked against it. */
export const ERROR_CODES = {
  invalid_request: {
    retryable: false,
    httpStatus: 400,
    meaning: 'The request is malformed; the message names the field and its bounds.',
  },
  unknown_model: {
    retryable: false,
    httpStatus: 404,
    meaning: 'The cluster does not serve the named model; the message names the ones it does.',
  },
  unknown_request: {
    retryable: false,
    httpStatus: 404,
    meaning: 'Nothing is known of a request with this id: it never came, or its answer is no longer kept.',
  },
  unauthorized: { retryable: false, httpStatus: 401, meaning: 'The API key is missing or not known.' },
  context_length_exceeded: {
    retryable: false,
    httpStatus: 400,
    meaning: 'Prompt plus max_tokens is longer than the context of the model.',
  },
  kv_capacity_exceeded: {
    retryable: false,
    httpStatus: 400,
    meaning:
      'The request needs more KV cache than all attention shards together have; start more shards or shorten it.',
  },
  duplicate_id: {
    retryable: false,
    httpStatus: 409,
    meaning: 'A request with this id is already running, or was a short time ago.',
  },
  overloaded: { retryable: true, httpStatus: 429, meaning: 'Every queue is full; retry later.' },
  unavailable: {
    retryable: true,
    httpStatus: 503,
    meaning: 'A service that the request needs is not running or not reachable yet.',
  },
  deadline_exceeded: {
    retryable: false,
    httpStatus: 504,
    meaning: 'deadline_ms passed before the request was finished.',
  },
  shard_lost: {
    retryable: true,
    httpStatus: 503,
    meaning: 'Attention shards that held KV of the request went away more often than recovery is tried.',
  },
  numeric_error: {
    retryable: false,
    httpStatus: 500,
    meaning: 'The model produced NaN or infinite logits for this request.',
  },
  protocol_violation: {
    retryable: false,
    httpStatus: 500,
    meaning: 'A message between services was malformed or of another version.',
  },
  internal: {
    retryable: false,
    httpStatus: 500,
    meaning: 'A defect in Lamina; the log of the named service has the cause.',
  },
  config_invalid: {
    retryable: false,
    httpStatus: 500,
    meaning: 'A flag or environment variable has a bad value; the process did not start.',
  },
  model_invalid: {
    retryable: false,
    httpStatus: 500,
    meaning: 'A model file is missing, damaged or of a kind that is not supported; the process did not start.',
  },
  address_in_use: {
    retryable: false,
    httpStatus: 500,
    meaning: 'A port that the process must listen on is taken; the process did not start.',
  },
  nats_unreachable: {
    retryable: true,
    httpStatus: 503,
    meaning: 'nats-server does not answer at the configured URL, or has no JetStream.',
  },
} as const satisfies Record<string, ErrorCodeFacts>;

export type ErrorCode = keyof typeof ERROR_CODES;

export interface LaminaErrorOptions {
  readonly cause?: unknown;
  /** Facts for the log: never sent to a client. */
  readonly diagnostics?: Readonly<Record<string, unknown>>;
  /** When trying again is worthwhile, as far as that is known. */
  readonly retryAfterMs?: number | undefined;
}

export class LaminaError extends Error {
  override readonly name = 'LaminaError';
  readonly code: ErrorCode;
  readonly diagnostics: Readonly<Record<string, unknown>>;
  readonly retryAfterMs: number | undefined;

  constructor(code: ErrorCode, message: string, options: LaminaErrorOptions = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.code = code;
    this.diagnostics = options.diagnostics ?? {};
    this.retryAfterMs = options.retryAfterMs;
  }

  get retryable(): boolean {
    return ERROR_CODES[this.code].retryable;
  }

  get httpStatus(): number {
    return ERROR_CODES[this.code].httpStatus;
  }
}

export function isErrorCode(value: unknown): value is ErrorCode {
  return typeof value === 'string' && Object.hasOwn(ERROR_CODES, value);
}

/** The error itself if it is one of ours, else `internal` with the original as its cause. */
export function asLaminaError(error: unknown): LaminaError {
  if (error instanceof LaminaError) return error;
  const reason = error instanceof Error ? error.message : String(error);
  return new LaminaError('internal', 'internal error; see the log of the service', {
    cause: error,
    diagnostics: { reason },
  });
}
