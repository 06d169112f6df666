/** The life of a request: what the machine allows, which effects it causes, and that the layer cycle is derived from it. */
import { LaminaError } from '@lamina/tensor';
import { describe, expect, it, vi } from 'vitest';
import { createActor, fromPromise, SimulatedClock } from 'xstate';
import {
  compileLayerCycle,
  FORBIDDEN,
  LAYER_EVENT,
  LAYER_STATE,
  LayerCursor,
  LEAVES_CYCLE,
} from '../src/request/layer-cycle.ts';
import { MAX_RECOVERIES, type RequestPhase, requestMachine } from '../src/request/machine.ts';

const settle = async (): Promise<void> => {
  await new Promise((resolve) => setImmediate(resolve));
};

const lost = new LaminaError('shard_lost', 'gone');

function startRequest(options: { allocate?: () => Promise<void>; deadlineMs?: number | null } = {}) {
  const phases: RequestPhase[] = [];
  const clock = new SimulatedClock();
  const releaseKv = vi.fn();
  const emitCancelled = vi.fn();
  const failures: (LaminaError | null)[] = [];
  const allocate = vi.fn(options.allocate ?? (() => Promise.resolve()));
  const actor = createActor(
    requestMachine.provide({
      actors: { allocateKv: fromPromise(allocate) },
      actions: {
        enter: (_, { phase }) => phases.push(phase),
        releaseKv,
        emitCancelled,
        emitFailed: ({ context }) => failures.push(context.error),
      },
    }),
    { input: { requestId: 'r', deadlineMs: options.deadlineMs ?? null }, clock },
  );
  actor.start();
  return { actor, clock, phases, releaseKv, emitCancelled, failures, allocate };
}

describe('request machine', () => {
  it('takes a request from the queue to its last token', async () => {
    const { actor, phases, releaseKv } = startRequest();
    actor.send({ type: 'ADMIT' });
    await settle();
    actor.send({ type: 'CHUNK_READY' });
    actor.send({ type: 'LOGITS_READY' });
    actor.send({ type: 'TOKEN_SAMPLED' });
    actor.send({ type: 'LOGITS_READY' });
    actor.send({ type: 'FINISHED' });
    expect(phases).toEqual(['queued', 'allocating', 'prefill', 'sampling', 'decode', 'sampling', 'finished']);
    expect(actor.getSnapshot().status).toBe('done');
    expect(releaseKv).toHaveBeenCalledTimes(1);
  });

  it('passes every layer through dispatch and gather, and a layer leaves no trace', async () => {
    const { actor } = startRequest();
    actor.send({ type: 'ADMIT' });
    await settle();
    const before = actor.getPersistedSnapshot();
    for (let layer = 0; layer < 3; layer++) {
      actor.send({ type: 'QKV_READY' });
      expect(actor.getSnapshot().value).toEqual({ active: { prefill: 'qkvDispatch' } });
      actor.send({ type: 'DISPATCHED' });
      expect(actor.getSnapshot().value).toEqual({ active: { prefill: 'attentionGather' } });
      actor.send({ type: 'GATHERED' });
    }
    expect(actor.getPersistedSnapshot()).toEqual(before);
  });

  it('waits in the queue while the KV cache is full, and fails when the request can never fit', async () => {
    const outcomes = [new LaminaError('overloaded', 'full'), new LaminaError('kv_capacity_exceeded', 'too long')];
    const { actor, phases, failures } = startRequest({ allocate: () => Promise.reject(outcomes.shift()) });
    actor.send({ type: 'ADMIT' });
    await settle();
    expect(phases.at(-1)).toBe('queued');
    actor.send({ type: 'ADMIT' });
    await settle();
    expect(phases.at(-1)).toBe('failed');
    expect(failures[0]?.code).toBe('kv_capacity_exceeded');
  });

  it('computes lost KV again, but not for ever', async () => {
    const { actor, phases, allocate, failures, releaseKv } = startRequest();
    actor.send({ type: 'ADMIT' });
    await settle();
    for (let i = 0; i < MAX_RECOVERIES; i++) {
      actor.send({ type: 'KV_LOST', error: lost });
      await settle();
      expect(phases.at(-1)).toBe('prefill');
    }
    expect(allocate).toHaveBeenCalledTimes(1 + MAX_RECOVERIES);
    expect(releaseKv).toHaveBeenCalledTimes(MAX_RECOVERIES);
    actor.send({ type: 'KV_LOST', error: lost });
    expect(failures[0]?.code).toBe('shard_lost');
  });

  it('computes lost KV again as often as it is lost, while tokens come in between', async () => {
    const { actor, phases, failures } = startRequest();
    actor.send({ type: 'ADMIT' });
    await settle();
    for (let i = 0; i < 3 * MAX_RECOVERIES; i++) {
      actor.send({ type: 'KV_LOST', error: lost });
      await settle();
      if (i % MAX_RECOVERIES !== 0) continue;
      actor.send({ type: 'LOGITS_READY' });
      actor.send({ type: 'TOKEN_SAMPLED' });
      expect(phases.at(-1)).toBe('decode');
    }
    expect(failures).toEqual([]);
  });

  it('goes back to the queue without its KV when it is preempted', async () => {
    const { actor, phases, releaseKv } = startRequest();
    actor.send({ type: 'ADMIT' });
    await settle();
    actor.send({ type: 'PREEMPT' });
    expect(phases.at(-1)).toBe('queued');
    expect(releaseKv).toHaveBeenCalledTimes(1);
  });

  it.each(['queued', 'prefill', 'sampling', 'decode'] as const)(
    'is cancelled in %s and frees its KV',
    async (phase) => {
      const { actor, phases, emitCancelled, releaseKv } = startRequest();
      const path: Record<typeof phase, readonly ('ADMIT' | 'LOGITS_READY' | 'TOKEN_SAMPLED')[]> = {
        queued: [],
        prefill: ['ADMIT'],
        sampling: ['ADMIT', 'LOGITS_READY'],
        decode: ['ADMIT', 'LOGITS_READY', 'TOKEN_SAMPLED'],
      };
      for (const type of path[phase]) {
        actor.send({ type });
        await settle();
      }
      expect(phases.at(-1)).toBe(phase);
      actor.send({ type: 'CANCEL' });
      expect(phases.at(-1)).toBe('cancelled');
      expect(emitCancelled).toHaveBeenCalledOnce();
      expect(releaseKv).toHaveBeenCalledOnce();
    },
  );

  it('gives up at its deadline, on injected time', async () => {
    const { actor, clock, failures } = startRequest({ deadlineMs: 5_000 });
    actor.send({ type: 'ADMIT' });
    await settle();
    clock.increment(4_999);
    expect(failures).toEqual([]);
    clock.increment(1);
    expect(failures[0]?.code).toBe('deadline_exceeded');
  });

  it.each([2 ** 31, 3e9, Number.MAX_SAFE_INTEGER])(
    'takes a deadline in %s ms, beyond all timers, for none',
    (deadlineMs) => {
      const { actor, clock, failures, phases } = startRequest({ deadlineMs });
      clock.increment(2 ** 31 - 2);
      expect(failures).toEqual([]);
      expect(phases).toEqual(['queued']);
      actor.send({ type: 'CANCEL' });
      expect(phases.at(-1)).toBe('cancelled');
    },
  );

  it('ends without a word when another executor has taken it over, wherever it is', async () => {
    const over = new LaminaError('duplicate_id', 'taken over');
    const refused = startRequest({ allocate: () => Promise.reject(over) });
    refused.actor.send({ type: 'ADMIT' });
    await settle();
    const running = startRequest();
    running.actor.send({ type: 'ADMIT' });
    await settle();
    running.actor.send({ type: 'TAKEN_OVER' });
    for (const { actor, phases, releaseKv, emitCancelled, failures } of [refused, running]) {
      expect(phases.at(-1)).toBe('handedOver');
      expect(actor.getSnapshot().status).toBe('done');
      expect(releaseKv).toHaveBeenCalledOnce();
      expect([emitCancelled.mock.calls.length, failures.length]).toEqual([0, 0]);
    }
  });
});

describe('layer cycle', () => {
  const table = compileLayerCycle();
  const next = (state: number, event: number): number => table[state * Object.keys(LAYER_EVENT).length + event]!;

  it('has exactly the transitions of the machine', () => {
    const { dense, qkvDispatch, attentionGather } = LAYER_STATE;
    const { QKV_READY, DISPATCHED, GATHERED, CHUNK_READY, LOGITS_READY } = LAYER_EVENT;
    expect(next(dense, QKV_READY)).toBe(qkvDispatch);
    expect(next(qkvDispatch, DISPATCHED)).toBe(attentionGather);
    expect(next(attentionGather, GATHERED)).toBe(dense);
    expect(next(dense, CHUNK_READY)).toBe(dense);
    expect(next(dense, LOGITS_READY)).toBe(LEAVES_CYCLE);
    const allowed = [...table].filter((entry) => entry !== FORBIDDEN);
    expect(allowed).toHaveLength(5);
  });

  it('refuses what the machine forbids', () => {
    const cursor = new LayerCursor(table);
    expect(() => cursor.advance(LAYER_EVENT.GATHERED)).toThrow('GATHERED is forbidden in dense');
    cursor.advance(LAYER_EVENT.QKV_READY);
    expect(() => cursor.advance(LAYER_EVENT.LOGITS_READY)).toThrow('LOGITS_READY is forbidden in qkvDispatch');
  });
});
