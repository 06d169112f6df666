/**
 * Owns the order in which requests get KV and give it up.
 *
 * Invariants
 * 1. A request that gets KV takes a turn; turns are fair between clients (clients.ts). It is kept until the end, also in the
 *    queue after a preemption, where it comes before all that have none.
 * 2. A turn is its client's: of its queued requests the one with the highest priority has it, then the one that came first.
 * 3. The client of the latest turn gives KV up: that of its running request with the lowest priority, which has its latest
 *    turn from then on. So the earliest turn ends without being preempted but for a higher priority of its own client,
 *    requests cannot preempt each other in a circle, and nobody's KV is taken for another client whose turn was later.
 */
import type { GenerationRequest } from '../request/request.ts';

/** The requests of an executor, in the order of arrival. */
interface Requests {
  all(): Iterable<GenerationRequest>;
}

export const isWaiting = (request: GenerationRequest): boolean =>
  request.phase === 'queued' && !request.isReleasePending;

const isRunning = ({ phase }: GenerationRequest): boolean => phase === 'prefill' || phase === 'decode';

/** Whether it is `a`'s turn for KV before it is that of `b`. */
export const isSooner = (a: GenerationRequest, b: GenerationRequest): boolean =>
  a.kvTurn < b.kvTurn || (a.kvTurn === b.kvTurn && a.client.kvTurn < b.client.kvTurn);

function exchangeTurns(a: GenerationRequest, b: GenerationRequest): void {
  const turn = a.kvTurn;
  a.kvTurn = b.kvTurn;
  b.kvTurn = turn;
}

/** The waiting request that gets the turn of `first`, of the same client; it has the turn from now on. */
export function takeTurnOf(first: GenerationRequest, requests: Requests): GenerationRequest {
  let next = first;
  for (const request of requests.all()) {
    if (request.client !== first.client || !isWaiting(request)) continue;
    if (request.item.priority > next.item.priority) next = request;
  }
  exchangeTurns(first, next);
  return next;
}

/** The request that gives its KV up for `starved`: that one itself, if nobody has a later turn; it has the latest from now on. */
export function leastUrgent(starved: GenerationRequest, requests: Requests): GenerationRequest {
  let last = starved;
  for (const request of requests.all()) if (isRunning(request) && request.kvTurn > last.kvTurn) last = request;
  let least = last;
  for (const request of requests.all()) {
    if (request.client !== last.client || !isRunning(request)) continue;
    const isLater = request.kvTurn > least.kvTurn;
    const { priority } = least.item;
    if (request.item.priority < priority || (request.item.priority === priority && isLater)) least = request;
  }
  makeLast(least, requests);
  return least;
}

/** The others of its client that run keep their order, each with the turn of the one before. */
function makeLast(least: GenerationRequest, requests: Requests): void {
  for (;;) {
    let following: GenerationRequest | undefined;
    for (const request of requests.all()) {
      if (request.client !== least.client || !isRunning(request) || request.kvTurn <= least.kvTurn) continue;
      if (following === undefined || request.kvTurn < following.kvTurn) following = request;
    }
    if (following === undefined) return;
    exchangeTurns(least, following);
  }
}
