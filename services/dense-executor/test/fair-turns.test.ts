/** While KV is short: whose turn it is, between clients and within one, and that preemption comes to an end. */
import type { BlockRef } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';
import fc from 'fast-check';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import type { KvCalls } from '../src/kv-tables.ts';
import { Bench, type BenchRequest, BLOCK, settle } from './executor-bench.ts';

beforeEach(() => {
  vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout', 'setInterval', 'clearInterval'] });
});
afterEach(() => vi.useRealTimers());

/** A kv-manager with so many blocks, which tells of those that are freed. */
class CountingKv implements KvCalls {
  readonly holdsLease = true;
  readonly leaseTerm = 1;
  onFreed: (numFreeBlocks: number) => void = () => undefined;
  #numFree: number;
  readonly #held = new Map<string, number>();

  constructor(numBlocks: number) {
    this.#numFree = numBlocks;
  }

  #grow(requestId: string, numTokens: number): Promise<BlockRef[]> {
    const held = this.#held.get(requestId) ?? 0;
    const numMore = Math.max(0, Math.ceil(numTokens / BLOCK) - held);
    if (numMore > this.#numFree) return Promise.reject(new LaminaError('overloaded', 'no free blocks'));
    this.#numFree -= numMore;
    this.#held.set(requestId, held + numMore);
    return Promise.resolve(Array.from({ length: numMore }, (_, i) => ({ shardId: 'a', block: held + i })));
  }

  allocate(requestId: string, numTokens: number): Promise<BlockRef[]> {
    return this.#grow(requestId, numTokens);
  }

  extend(requestId: string, _numBlocks: number, numTokens: number): Promise<BlockRef[]> {
    return this.#grow(requestId, numTokens);
  }

  free(requestId: string): Promise<void> {
    this.#numFree += this.#held.get(requestId) ?? 0;
    this.#held.delete(requestId);
    setImmediate(() => this.onFreed(this.#numFree));
    return Promise.resolve();
  }

  suspect(): Promise<void> {
    return Promise.resolve();
  }

  trim(): Promise<void> {
    return Promise.resolve();
  }
}

function benchOf(numBlocks: number): Bench {
  const kv = new CountingKv(numBlocks);
  const bench = new Bench(kv);
  kv.onFreed = (numFreeBlocks) => bench.executor.tables.onCapacityFreed(numFreeBlocks);
  return bench;
}

/** Ends the steps that are in flight, and lets what follows happen. */
async function turn(bench: Bench): Promise<void> {
  for (const wave of [...bench.steps.keys()]) bench.finish(wave);
  await settle();
  if (bench.steps.size === 0) await vi.advanceTimersByTimeAsync(1_000);
}

async function runAll(bench: Bench, requests: readonly BenchRequest[], maxTurns = 2_000): Promise<string[]> {
  for (const request of requests) bench.admit(request);
  for (let turns = 0; bench.completed.length < requests.length; turns++) {
    expect(turns).toBeLessThan(maxTurns);
    await turn(bench);
  }
  return bench.completed;
}

const preemptions = async (bench: Bench): Promise<number> =>
  (await bench.metrics.preemptions.get()).values[0]?.value ?? 0;

/** Needs three blocks of KV. */
const ONE = { numPromptTokens: 20, maxTokens: 12 };

test("a client's one request is not kept waiting by another's stream of a higher priority", async () => {
  const bench = benchOf(3);
  let numBusy = 0;
  const busy = () => bench.admit({ ...ONE, id: `busy-${numBusy++}`, client: 'busy', priority: 100 });
  for (let i = 0; i < 4; i++) busy();
  await settle();
  bench.admit({ ...ONE, id: 'modest', client: 'modest' });
  while (!bench.completed.includes('modest') && bench.completed.length < 50) {
    await turn(bench);
    while (numBusy < bench.completed.length + 4) busy();
  }
  // One had its KV when it came, and the other client has waited longer.
  expect(bench.completed.indexOf('modest')).toBe(2);
});

test('clients take turns for KV, whatever they have waiting', async () => {
  const of = (client: string, count: number) =>
    Array.from({ length: count }, (_, i) => ({ ...ONE, id: `${client}${i}`, client }));
  const ended = await runAll(benchOf(3), [...of('a', 6), ...of('b', 2), ...of('c', 1)]);
  expect(ended).toEqual(['a0', 'b0', 'c0', 'a1', 'b1', 'a2', 'a3', 'a4', 'a5']);
});

test.each([undefined, 'one'])('within one client, %s, priority counts, then age', async (client) => {
  const requests = [0, 0, 5, 0, 9, 5].map((priority, i) => ({ ...ONE, id: `r${i}`, client, priority }));
  expect(await runAll(benchOf(3), requests)).toEqual(['r0', 'r4', 'r2', 'r5', 'r1', 'r3']);
});

/** Grows from 2 blocks to 7. */
const GROWING = { numPromptTokens: 15, maxTokens: 90 };

test('of one client, that of the lowest priority is preempted, then the youngest', async () => {
  const requests = [0, 5, 5].map((priority, i) => ({ ...GROWING, id: `r${i}`, priority }));
  const bench = benchOf(8);
  expect(await runAll(bench, requests)).toEqual(['r1', 'r2', 'r0']);
  // r0, then r2 for r1, then r0 beside r2.
  expect(await preemptions(bench)).toBe(3);
});

test('what had its turn is not preempted for a later one of another client, of whatever priority', async () => {
  const bench = benchOf(8);
  const first = { ...GROWING, id: 'first', client: 'a' };
  const urgent = [0, 1, 2].map((i) => ({ ...GROWING, id: `urgent-${i}`, client: 'b', priority: 100 }));
  expect((await runAll(bench, [first, ...urgent]))[0]).toBe('first');
});

test('a deadline ends a request that waits for its turn', async () => {
  const bench = benchOf(3);
  const late = { ...ONE, id: 'late', client: 'b', deadlineAtMs: Date.now() + 500 };
  for (const request of [{ ...ONE, id: 'r', client: 'a' }, late]) bench.admit(request);
  await settle();
  await vi.advanceTimersByTimeAsync(600);
  await settle();
  expect(bench.completed).toEqual(['late']);
  await turn(bench);
  expect(bench.messages[0]).toMatchObject({ id: 'late', error: { code: 'deadline_exceeded' } });
});

test('everybody ends, however requests come, grow and preempt each other, and no request more often than there are', async () => {
  const anyRequest = fc.record({
    client: fc.constantFrom(undefined, 'a', 'b', 'c'),
    priority: fc.integer({ min: 0, max: 2 }),
    numPromptTokens: fc.integer({ min: 1, max: 60 }),
    maxTokens: fc.integer({ min: 1, max: 60 }),
    /** Turns after the one before. */
    afterTurns: fc.nat(8),
  });
  const run = async (numBlocks: number, specs: readonly (BenchRequest & { readonly afterTurns: number })[]) => {
    const bench = benchOf(numBlocks);
    let turns = 0;
    for (const spec of specs) {
      for (let i = 0; i < spec.afterTurns; i++, turns++) await turn(bench);
      bench.admit(spec);
    }
    for (; bench.completed.length < specs.length; turns++) {
      expect(turns).toBeLessThan(4_000);
      await turn(bench);
    }
    expect(bench.executor.requests.clients.size).toBe(0);
    expect(await preemptions(bench)).toBeLessThanOrEqual(specs.length ** 2);
  };
  await fc.assert(
    fc.asyncProperty(
      fc.integer({ min: 9, max: 16 }),
      fc.array(anyRequest, { minLength: 1, maxLength: 10 }),
      (numBlocks, specs) =>
        run(
          numBlocks,
          specs.map((spec, i) => ({ ...spec, id: `r${i}` })),
        ),
    ),
    { numRuns: 60 },
  );
}, 60_000);
