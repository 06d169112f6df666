/**
 * Owns what every client of a chaos run is: it asks for one answer until it has it, in the ways that the documentation gives
 * it, and in no other.
 *
 * Invariants
 * 1. What breaks without a fault that may break it is a mistake: it is noted, and the client does not mend it by asking again.
 */
import { ERROR_CODES, isErrorCode } from '@lamina/tensor';
import type { ChaosRequest } from '../requests.ts';
import type { Received } from './received.ts';

/**
 * What of a stream of replies a fault may take from its client. `nothing`: gateways and nats-server live through it.
 * `replies`: what is under way on NATS. `gateways`: HTTP connections too.
 */
export type Cuts = 'nothing' | 'replies' | 'gateways';

export interface Asked {
  readonly id: string;
  readonly request: ChaosRequest;
  /** Counts the requests of a run: by it clients take turns with gateways, and with the ways to come back. */
  readonly number: number;
  /** Aborted when its client waits no longer. */
  readonly signal: AbortSignal;
}

export interface Client {
  readonly kind: 'durable' | 'generate' | 'HTTP';
  /** Resolves when the client has what it asked for, or waits no longer; undefined for one that reads only what is stored. */
  answer(asked: Asked): Promise<Received | undefined>;
}

export const RETRY_MS = 100;
/** After an error that may be retried and does not say when. */
export const DEFAULT_RETRY_AFTER_MS = 1_000;

/**
 * After so long without a token a client takes its stream of replies for broken. Where none may break, that is longer than any
 * request waits for its next token.
 */
export const silenceMsOf = (mayBreak: boolean): number => (mayBreak ? 3_000 : 30_000);

export interface AnswerError {
  readonly code: string;
  readonly message: string;
  readonly retryAfterMs?: number | undefined;
}

/** How long a client waits after an error before it asks again under the same id; one that may not be retried is a mistake. */
export function waitAfter({ code, message, retryAfterMs }: AnswerError, received: Received): number {
  if (!isErrorCode(code) || !ERROR_CODES[code].retryable) received.mistakes.push(`${code}: ${message}`);
  return retryAfterMs ?? DEFAULT_RETRY_AFTER_MS;
}
