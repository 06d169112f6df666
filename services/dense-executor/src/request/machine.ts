/**
 * Owns the life of a request: one XState machine, the single definition that the actors run, the hot path is
 * compiled from (layer-cycle.ts) and the chart in docs/architecture.md is generated from.
 *
 * Invariants
 * 1. Effects and time are injected: actions and the allocateKv actor are provided, the clock belongs to the actor.
 * 2. No tensor and no token text is in the context.
 * 3. One layer is one cycle dense -> qkvDispatch -> attentionGather -> dense that leaves the context as it was,
 *    so a whole number of layers may be skipped without changing the actor (tested).
 * 4. Every state that holds KV is left through releaseKv.
 */
import { asLaminaError, LaminaError } from '@lamina/tensor';
import { assign, fromPromise, setup } from 'xstate';

export interface RequestContext {
  readonly requestId: string;
  /** Times that KV was lost since the last token. */
  readonly recoveries: number;
  /** Milliseconds from admission until the request is given up; null = never. */
  readonly deadlineMs: number | null;
  readonly error: LaminaError | null;
}

export type RequestEvent =
  | { type: 'ADMIT' }
  | { type: 'QKV_READY' }
  | { type: 'DISPATCHED' }
  | { type: 'GATHERED' }
  | { type: 'CHUNK_READY' }
  | { type: 'LOGITS_READY' }
  | { type: 'TOKEN_SAMPLED' }
  | { type: 'FINISHED' }
  | { type: 'PREEMPT' }
  | { type: 'KV_LOST'; error: LaminaError }
  | { type: 'FAIL'; error: LaminaError }
  | { type: 'TAKEN_OVER' }
  | { type: 'CANCEL' };

/** What the scheduler needs to know of a request's state. */
export type RequestPhase =
  | 'queued'
  | 'allocating'
  | 'prefill'
  | 'sampling'
  | 'decode'
  | 'finished'
  | 'cancelled'
  | 'failed'
  | 'handedOver';

export interface RequestInput {
  readonly requestId: string;
  readonly deadlineMs: number | null;
}

/** KV of a request is computed again at most so often without a token in between. */
export const MAX_RECOVERIES = 5;
/** The longest delay that timers take; stands for "no deadline". */
const NEVER_MS = 2_147_483_647;

const unprovided = (): never => {
  throw new Error('the request machine runs with provided effects');
};

const LAYER_CYCLE = {
  initial: 'dense',
  states: {
    dense: { on: { QKV_READY: 'qkvDispatch', CHUNK_READY: 'dense', LOGITS_READY: '#request.active.sampling' } },
    qkvDispatch: { on: { DISPATCHED: 'attentionGather' } },
    attentionGather: { on: { GATHERED: 'dense' } },
  },
} as const;

const KV_LOST = [
  { guard: 'mayRecover', target: 'recovering', actions: 'countRecovery' },
  { target: '#request.failed', actions: 'keepError' },
] as const;

export const requestMachine = setup({
  types: {
    context: {} as RequestContext,
    events: {} as RequestEvent,
    input: {} as RequestInput,
  },
  actors: {
    /** Gets a block table; rejects with a LaminaError; a retryable one sends the request back to the queue. */
    allocateKv: fromPromise<void, { requestId: string }>(unprovided),
  },
  actions: {
    enter: (_, _params: { phase: RequestPhase }) => unprovided(),
    releaseKv: unprovided,
    emitCancelled: unprovided,
    emitFailed: unprovided,
    keepError: assign({ error: ({ event }) => ('error' in event ? asLaminaError(event.error) : null) }),
    keepDeadlineError: assign({
      error: () => new LaminaError('deadline_exceeded', 'deadline_ms passed before the answer was complete'),
    }),
    forgetRecoveries: assign({ recoveries: 0 }),
    countRecovery: assign({ recoveries: ({ context }) => context.recoveries + 1 }),
  },
  guards: {
    mayRecover: ({ context }) => context.recoveries < MAX_RECOVERIES,
    isTakenOver: ({ event }) =>
      'error' in event && event.error instanceof LaminaError && event.error.code === 'duplicate_id',
    hasDeadline: ({ context }) => context.deadlineMs !== null && context.deadlineMs <= NEVER_MS,
    isWorthWaiting: ({ event }) => 'error' in event && event.error instanceof LaminaError && event.error.retryable,
  },
  delays: {
    deadline: ({ context }) => Math.min(context.deadlineMs ?? NEVER_MS, NEVER_MS),
  },
}).createMachine({
  id: 'request',
  context: ({ input }) => ({ requestId: input.requestId, recoveries: 0, deadlineMs: input.deadlineMs, error: null }),
  initial: 'active',
  states: {
    active: {
      initial: 'queued',
      on: {
        CANCEL: { target: 'cancelled' },
        TAKEN_OVER: { target: 'handedOver' },
        FAIL: { target: 'failed', actions: 'keepError' },
      },
      after: { deadline: { guard: 'hasDeadline', target: 'failed', actions: 'keepDeadlineError' } },
      exit: 'releaseKv',
      states: {
        queued: {
          entry: { type: 'enter', params: { phase: 'queued' } },
          // What another executor stored may be all that is asked for.
          on: { ADMIT: 'allocating', FINISHED: '#request.finished' },
        },
        allocating: {
          entry: { type: 'enter', params: { phase: 'allocating' } },
          invoke: {
            src: 'allocateKv',
            input: ({ context }) => ({ requestId: context.requestId }),
            onDone: 'prefill',
            onError: [
              { guard: 'isWorthWaiting', target: 'queued' },
              { guard: 'isTakenOver', target: '#request.handedOver' },
              { target: '#request.failed', actions: 'keepError' },
            ],
          },
        },
        prefill: {
          entry: { type: 'enter', params: { phase: 'prefill' } },
          ...LAYER_CYCLE,
          on: { PREEMPT: 'preempted', KV_LOST },
        },
        sampling: {
          entry: { type: 'enter', params: { phase: 'sampling' } },
          on: {
            TOKEN_SAMPLED: { target: 'decode', actions: 'forgetRecoveries' },
            FINISHED: '#request.finished',
            PREEMPT: 'preempted',
            KV_LOST,
          },
        },
        decode: {
          entry: { type: 'enter', params: { phase: 'decode' } },
          ...LAYER_CYCLE,
          on: { PREEMPT: 'preempted', KV_LOST },
        },
        preempted: { entry: 'releaseKv', always: 'queued' },
        recovering: { entry: 'releaseKv', always: 'allocating' },
      },
    },
    /** Another executor has the request now: it ends here without a word. */
    handedOver: { type: 'final', entry: { type: 'enter', params: { phase: 'handedOver' } } },
    finished: { type: 'final', entry: { type: 'enter', params: { phase: 'finished' } } },
    cancelled: { type: 'final', entry: [{ type: 'enter', params: { phase: 'cancelled' } }, 'emitCancelled'] },
    failed: { type: 'final', entry: [{ type: 'enter', params: { phase: 'failed' } }, 'emitFailed'] },
  },
});
