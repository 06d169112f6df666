/**
 * Owns finding out what is known of a request id: the same id twice is one request, whoever asks and whenever.
 *
 * Invariants
 * 1. The streams are the only source: any gateway gives the same answer, and a restart forgets nothing.
 * 2. A request that ends while it is looked for is found: an answer is stored whole before its work item goes.
 */
import type { TokenStream, WorkQueue } from '@lamina/bus';

export type RequestState =
  | { readonly kind: 'unknown' }
  /** Waits for an executor, or is computed by one. */
  | { readonly kind: 'working'; readonly sequence: number }
  /** Its answer is stored whole. */
  | { readonly kind: 'ended' }
  /** A part of its answer is stored, and nobody works on the rest. */
  | { readonly kind: 'cut' };

export interface RequestTraces {
  readonly tokens: Pick<TokenStream, 'endOf'>;
  readonly queue: Pick<WorkQueue, 'find'>;
}

/** @throws LaminaError `unavailable` when the streams cannot be read. */
export async function locate({ tokens, queue }: RequestTraces, requestId: string): Promise<RequestState> {
  if ((await tokens.endOf(requestId))?.isComplete === true) return { kind: 'ended' };
  const sequence = await queue.find(requestId);
  if (sequence !== undefined) return { kind: 'working', sequence };
  const stored = await tokens.endOf(requestId);
  if (stored === undefined) return { kind: 'unknown' };
  return { kind: stored.isComplete ? 'ended' : 'cut' };
}
