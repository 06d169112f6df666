/**
 * Owns the per-layer part of the request machine as a table of bytes, for the hot path.
 *
 * `actor.send` costs some 20 us; with 32 requests and 30 layers that would be a third of a step. All requests of a wave
 * pass the same layers together, so a wave keeps one cursor, and its table is computed from the machine at start by
 * asking the machine's own transition function. There is no second definition: what the machine forbids, the table forbids.
 *
 * Invariants
 * 1. table[state * NUM_EVENTS + event] is the machine's next state, LEAVES_CYCLE or FORBIDDEN.
 * 2. The cycles of prefill and decode are the same; compiling fails if they differ.
 */
import { LaminaError } from '@lamina/tensor';
import { transition } from 'xstate';
import { type RequestContext, requestMachine } from './machine.ts';

const STATES = ['dense', 'qkvDispatch', 'attentionGather'] as const;
const EVENTS = ['QKV_READY', 'DISPATCHED', 'GATHERED', 'CHUNK_READY', 'LOGITS_READY'] as const;
const NUM_EVENTS = EVENTS.length;

export const LAYER_STATE = { dense: 0, qkvDispatch: 1, attentionGather: 2 } as const;
export const LAYER_EVENT = { QKV_READY: 0, DISPATCHED: 1, GATHERED: 2, CHUNK_READY: 3, LOGITS_READY: 4 } as const;
export const LEAVES_CYCLE = 254;
export const FORBIDDEN = 255;

const CONTEXT: RequestContext = { requestId: 'compile', recoveries: 0, deadlineMs: null, error: null };

function nextState(
  phase: 'prefill' | 'decode',
  state: (typeof STATES)[number],
  event: (typeof EVENTS)[number],
): number {
  const from = requestMachine.resolveState({ value: { active: { [phase]: state } }, context: CONTEXT });
  if (!from.can({ type: event })) return FORBIDDEN;
  const [to] = transition(requestMachine, from, { type: event });
  const index = STATES.findIndex((candidate) => to.matches({ active: { [phase]: candidate } }));
  return index >= 0 ? index : LEAVES_CYCLE;
}

/** @throws LaminaError `internal` when the machine's two cycles differ. */
export function compileLayerCycle(): Uint8Array {
  const table = new Uint8Array(STATES.length * NUM_EVENTS);
  STATES.forEach((state, stateIndex) => {
    EVENTS.forEach((event, eventIndex) => {
      const next = nextState('decode', state, event);
      if (next !== nextState('prefill', state, event))
        throw new LaminaError('internal', `prefill and decode differ at ${state}, ${event}`);
      table[stateIndex * NUM_EVENTS + eventIndex] = next;
    });
  });
  return table;
}

/** Where a wave stands in the layer cycle. */
export class LayerCursor {
  readonly #table: Uint8Array;
  #state: number = LAYER_STATE.dense;

  constructor(table: Uint8Array) {
    this.#table = table;
  }

  get state(): number {
    return this.#state;
  }

  restart(): void {
    this.#state = LAYER_STATE.dense;
  }

  /** @throws LaminaError `internal` when the machine forbids the event here. */
  advance(event: number): void {
    const next = this.#table[this.#state * NUM_EVENTS + event]!;
    if (next === FORBIDDEN)
      throw new LaminaError('internal', `${EVENTS[event]} is forbidden in ${STATES[this.#state]}`);
    this.#state = next === LEAVES_CYCLE ? LAYER_STATE.dense : next;
  }
}
