/**
 * Owns the codes by which nats-server says why it refuses: `err_code` of an answer of JetStream, and the status of a message
 * without a body.
 */
import { NatsError } from 'nats';

export const JETSTREAM_CODES = {
  consumerNotFound: 10014,
  noMessageFound: 10037,
  messageTooLarge: 10054,
  /** Made by somebody else in the meantime, and otherwise. */
  streamNameInUse: 10058,
  streamNotFound: 10059,
  wrongLastSequence: 10071,
  streamFull: 10077,
  consumerExists: 10148,
} as const;

/** Status of the server's own answer where nobody listens. */
export const NO_RESPONDERS_STATUS = 503;

/** Whether the server refused with this one. */
export function isRefusedWith(cause: unknown, code: keyof typeof JETSTREAM_CODES): boolean {
  return cause instanceof NatsError && cause.api_error?.err_code === JETSTREAM_CODES[code];
}
