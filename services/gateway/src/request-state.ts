/**
 * Owns finding out what is known of a request id: the same id twice is one request, whoever asks and whenever.
 *
 * Invariants
 * 1. The streams are the only source: any gateway gives the same answer, and a restart forgets nothing.
 * 2. A request that ends while it is looked for is found: an answer is stored whole before its work item goes.
 */
import type { TokenStream, WorkQueue } from '@lamina/bus';

/**
 * working: waits for an executor, or is computed by one. ended: its answer is stored whole. cut: a part of its answer is
 * stored, and nobody works on the rest.
 */
export type RequestState = 'unknown' | 'working' | 'ended' | 'cut';

export interface RequestTraces {
  readonly tokens: Pick<TokenStream, 'endOf'>;
  readonly queue: Pick<WorkQueue, 'has'>;
}

/** @throws LaminaError `unavailable` when the streams cannot be read. */
export async function locate({ tokens, queue }: RequestTraces, requestId: string): Promise<RequestState> {
  if ((await tokens.endOf(requestId))?.isComplete === true) return 'ended';
  if (await queue.has(requestId)) return 'working';
  const stored = await tokens.endOf(requestId);
  if (stored === undefined) return 'unknown';
  return stored.isComplete ? 'ended' : 'cut';
}
