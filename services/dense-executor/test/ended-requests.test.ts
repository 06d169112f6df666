/** Requests that a gateway ended while their items waited: cancelled, or past their deadline. */
import { LaminaError } from '@lamina/tensor';
import { beforeEach, expect, test, vi } from 'vitest';
import { Bench, ScriptedKv, settle } from './executor-bench.ts';

let kv: ScriptedKv;
let bench: Bench;

beforeEach(() => {
  kv = new ScriptedKv();
  bench = new Bench(kv);
});

const END = { id: 'r', index: 0, token: null, text: '', finish_reason: 'cancelled' } as const;

test('an item that waited is completed without a block when its answer has ended', async () => {
  bench.stored = [END];
  bench.admit({ id: 'r', maxTokens: 5, waitedMs: 1_000 });
  await settle();
  expect([bench.completed, kv.log, bench.messages]).toEqual([['r'], [], []]);
});

test('an item that waited and has no end is computed', async () => {
  bench.admit({ id: 'r', maxTokens: 5, waitedMs: 1_000 });
  await settle();
  expect([bench.numReads, kv.log, bench.completed]).toEqual([1, ['allocate r'], []]);
});

test('an item that comes at once is not asked after', async () => {
  bench.admit({ id: 'r', maxTokens: 5 });
  await settle();
  expect([bench.numReads, kv.log]).toEqual([0, ['allocate r']]);
});

test('an item whose cancel came first is completed when its gateway has ended it, else ended here', async () => {
  for (const [stored, messages] of [
    [[END], []],
    [[], [{ id: 'r', finish_reason: 'cancelled' }]],
  ] as const) {
    bench = new Bench(kv);
    bench.stored = stored;
    bench.executor.cancel('r');
    bench.admit({ id: 'r', maxTokens: 5 });
    await settle();
    expect(bench.messages).toMatchObject(messages);
    expect([bench.completed, kv.log]).toEqual([['r'], []]);
  }
});

test('an item that was submitted long after a cancel of its id is computed, one from before it is ended', async () => {
  vi.useFakeTimers({ toFake: ['Date'] });
  try {
    bench.executor.cancel('r');
    bench.executor.cancel('old');
    vi.setSystemTime(Date.now() + 60_000);
    bench.admit({ id: 'r', maxTokens: 5, waitedMs: 58_000 });
    bench.admit({ id: 'old', maxTokens: 5, waitedMs: 61_000 });
    await settle();
    expect(kv.log).toEqual(['allocate r']);
    expect(bench.messages).toMatchObject([{ id: 'old', finish_reason: 'cancelled' }]);
  } finally {
    vi.useRealTimers();
  }
});

test('a cancel that comes while the stored part is read ends the item, whatever the clock of its gateway says', async () => {
  bench.admit({ id: 'r', maxTokens: 5, deliveryCount: 2, waitedMs: -60_000 });
  bench.executor.cancel('r');
  await settle();
  expect(bench.messages).toMatchObject([{ id: 'r', finish_reason: 'cancelled' }]);
});

test('an item whose answer has lost its beginning is ended with that behind what is stored, and what has ended is completed', async () => {
  for (const [last, messages] of [
    [
      { id: 'r', index: 7, token: 5, text: '', finish_reason: null },
      [{ id: 'r', index: 8, token: null, finish_reason: 'error', error: { code: 'unknown_request', message: 'gone' } }],
    ],
    [END, []],
  ] as const) {
    bench = new Bench(kv);
    bench.stored = [last];
    bench.unreadable = new LaminaError('unknown_request', 'gone');
    bench.admit({ id: 'r', maxTokens: 50, deliveryCount: 2 });
    await settle();
    expect(bench.messages).toMatchObject(messages);
    expect([bench.completed, bench.released, kv.log]).toEqual([['r'], [], []]);
  }
});

test('an item whose stored part cannot be read now, or is gone meanwhile, is handed back', async () => {
  for (const code of ['unavailable', 'unknown_request'] as const) {
    bench = new Bench(kv);
    bench.unreadable = new LaminaError(code, 'scripted');
    bench.admit({ id: 'r', maxTokens: 50, deliveryCount: 2 });
    await settle();
    expect([bench.completed, bench.released, bench.messages]).toEqual([[], ['r'], []]);
  }
});

test('an item whose answer another process writes meanwhile is left to that', async () => {
  bench.stored = [{ id: 'r', index: 7, token: 5, text: '', finish_reason: null }];
  bench.unreadable = new LaminaError('unknown_request', 'gone');
  bench.isTakenOver = true;
  bench.admit({ id: 'r', maxTokens: 50, deliveryCount: 2 });
  await settle();
  expect([bench.completed, bench.released, bench.messages]).toEqual([[], [], []]);
});

test.for([
  // Delivery, that of the last stored message, whether it is computed.
  [10, 0, true],
  [11, 0, false],
  [11, 1, true],
  [12, 1, false],
  [50, 49, true],
  [50, 40, true],
  [50, 39, false],
  // The queue was made anew and counts from 1.
  [10, 50, true],
  [11, 50, false],
] as const)(
  'an item of delivery %i, of which that of %i stored something, is computed: %s',
  async ([delivery, last, isComputed]) => {
    bench.stored = last === 0 ? [] : [{ id: 'r', index: 0, token: 5, text: '', finish_reason: null }];
    bench.storedDeliveryCount = last;
    bench.admit({ id: 'r', maxTokens: 50, deliveryCount: delivery });
    await settle();
    expect(kv.log).toEqual(isComputed ? ['allocate r'] : []);
    expect(bench.messages).toMatchObject(isComputed ? [] : [{ id: 'r', error: { code: 'internal' } }]);
  },
);
