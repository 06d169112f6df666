/** Requests that a gateway ended while their items waited: cancelled, or past their deadline. */
import { LaminaError } from '@lamina/tensor';
import { beforeEach, describe, expect, test, vi } from 'vitest';
import { Bench, description, ScriptedKv, settle } from './executor-bench.ts';

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

describe('an answer that was cut off', () => {
  const token = (index: number) => ({ id: 'r', index, token: 40 + index, text: '', finish_reason: null });

  test.each([
    ['more', 7],
    ['as many', 5],
  ])(
    'has %s tokens than are asked for now: it ends with `length` at once, behind what is stored',
    async (_, numStored) => {
      bench.stored = Array.from({ length: numStored }, (_, index) => token(index));
      bench.admit({ id: 'r', maxTokens: 5, deliveryCount: 2 });
      await settle();
      expect(bench.messages).toMatchObject([
        { id: 'r', index: numStored, token: null, finish_reason: 'length', usage: { completion_tokens: numStored } },
      ]);
      expect([bench.completed, kv.log, bench.executor.requests.size]).toEqual([['r'], [], 0]);
    },
  );

  test('has fewer: the rest is computed', async () => {
    bench.stored = Array.from({ length: 4 }, (_, index) => token(index));
    bench.admit({ id: 'r', maxTokens: 5, deliveryCount: 2 });
    await settle();
    expect([bench.messages, bench.completed, kv.log]).toEqual([[], [], ['allocate r']]);
  });

  test('has a token that ends it by what is asked for now', async () => {
    bench.stored = [token(0), { ...token(1), token: description.eosTokenIds[0]! }];
    bench.admit({ id: 'r', maxTokens: 50, deliveryCount: 2, ignoreEos: false });
    await settle();
    expect(bench.messages).toMatchObject([{ index: 2, token: null, finish_reason: 'stop' }]);
  });
});

test.for([
  // Delivery, that of the last stored message, those in vain.
  [1, 0, 1],
  [11, 0, 11],
  [11, 1, 10],
  [50, 49, 1],
  [50, 50, 1],
  // The queue was made anew and counts from 1.
  [11, 50, 11],
] as const)(
  'an item of delivery %i, of which that of %i stored something, is begun, and the kv-manager told that %i were in vain',
  async ([delivery, last, numVain]) => {
    bench.stored = last === 0 ? [] : [{ id: 'r', index: 0, token: 5, text: '', finish_reason: null }];
    bench.storedDeliveryCount = last;
    bench.admit({ id: 'r', numPromptTokens: 20, maxTokens: 50, deliveryCount: delivery });
    await settle();
    const call = kv.next();
    expect(call).toMatchObject({ kind: 'allocate', deliveryCount: delivery, vainDeliveryCount: numVain });
    call.give(5);
    await settle();
    bench.finish(0);
    // It got further: what it asks for anew is in vain no more.
    bench.failStep(0, 'shard_lost', ['a']);
    expect(kv.next()).toMatchObject({ kind: 'allocate', deliveryCount: delivery, vainDeliveryCount: 1 });
  },
);

test('an item that the kv-manager gives up ends with its error', async () => {
  bench.admit({ id: 'r', maxTokens: 50, deliveryCount: 11 });
  await settle();
  kv.next().refuse('internal');
  await settle();
  expect(bench.messages).toMatchObject([{ id: 'r', finish_reason: 'error', error: { code: 'internal' } }]);
  expect(bench.completed).toEqual(['r']);
});

test("a request that goes back to the queue is not said to be another executor's", async () => {
  const [info, warn] = [vi.spyOn(bench.log, 'info'), vi.spyOn(bench.log, 'warn')];
  bench.admit({ id: 'r', maxTokens: 50 });
  await bench.executor.handBack();
  expect(bench.released).toEqual(['r']);
  expect(info).toHaveBeenCalledWith({ id: 'r' }, expect.stringContaining('back to the queue'));
  expect(warn).not.toHaveBeenCalled();
});
