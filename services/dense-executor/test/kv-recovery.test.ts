/** Block tables when answers are late, lost or overtaken by events: nobody waits for ever, nothing is freed twice. */
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { Bench, BLOCK, ScriptedKv, settle } from './executor-bench.ts';

let kv: ScriptedKv;
let bench: Bench;

beforeEach(() => {
  vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout', 'setInterval', 'clearInterval'] });
  kv = new ScriptedKv();
  bench = new Bench(kv);
});
afterEach(() => vi.useRealTimers());

const ONE_SECOND = 1_000;

/** A request that has its blocks and is in its first step. */
async function running(id: string, options: { maxTokens?: number; shardId?: string } = {}): Promise<void> {
  bench.admit({ id, numPromptTokens: 20, maxTokens: options.maxTokens ?? 60 });
  kv.next().give(3, options.shardId);
  await settle();
  expect(bench.request(id).phase).toBe('prefill');
}

const waveOf = (id: string): number => bench.request(id).waveIndex;

describe('lists that the kv-manager wrote before it heard of a free', () => {
  test('free nothing twice', async () => {
    await running('r');
    bench.finish(waveOf('r'));
    bench.failStep(waveOf('r'), 'shard_lost', ['a']);
    expect(kv.log).toEqual(['allocate r', 'free r', 'allocate r']);
    bench.executor.tables.onRequestsVoid(['r']);
    bench.executor.tables.onRequestsTakenOver(['r']);
    bench.executor.tables.onShardLost('a');
    expect(kv.log).toHaveLength(3);
    kv.next().give(3, 'b', 7);
    await settle();
    expect(bench.request('r').phase).toBe('prefill');
    expect(bench.request('r').blockTable[0]).toEqual({ shardId: 'b', block: 7 });
    expect(kv.log).toHaveLength(3);
  });

  test('name requests that are gone: those are freed', () => {
    bench.executor.tables.onRequestsVoid(['gone']);
    bench.executor.tables.onRequestsTakenOver(['gone too']);
    expect(kv.log).toEqual(['free gone', 'free gone too']);
  });
});

describe('a refusal', () => {
  test('that arrives after the event of capacity freed meanwhile asks again at once', async () => {
    bench.admit({ id: 'r', numPromptTokens: 20, maxTokens: 60 });
    kv.next().refuse('overloaded');
    bench.executor.tables.onCapacityFreed(9);
    await settle();
    expect(kv.log).toEqual(['allocate r', 'allocate r']);
    kv.next().give(3);
    await settle();
    expect(bench.request('r').phase).toBe('prefill');
  });

  test('of more blocks that arrives after such an event asks again at once', async () => {
    await running('old');
    await running('young');
    while (kv.numOpen < 2) for (const id of ['old', 'young']) bench.finish(waveOf(id));
    const call = kv.next();
    expect(call).toMatchObject({ kind: 'extend', requestId: 'old' });
    call.refuse('overloaded');
    bench.executor.tables.onCapacityFreed(2);
    await settle();
    expect(kv.log.filter((call) => call === 'extend old')).toHaveLength(2);
  });

  test.each(['overloaded', 'unavailable'] as const)('as %s is tried again later when no event comes', async (code) => {
    bench.admit({ id: 'r', numPromptTokens: 20, maxTokens: 60 });
    kv.next().refuse(code);
    await settle();
    expect(bench.request('r').phase).toBe('queued');
    expect(kv.numOpen).toBe(0);
    await vi.advanceTimersByTimeAsync(ONE_SECOND);
    // What may have been given although no answer came is freed before.
    const freed = code === 'unavailable' ? ['free r'] : [];
    expect(kv.log).toEqual(['allocate r', ...freed, 'allocate r']);
  });
});

describe('more blocks', () => {
  /** Up to the moment in which more blocks are asked for. */
  async function untilExtend(): Promise<void> {
    await running('r');
    bench.finish(waveOf('r'));
    while (kv.numOpen === 0) bench.finish(waveOf('r'));
  }

  test('of which no answer came are asked for again from what is known, at the end of its room once a second', async () => {
    await untilExtend();
    while (bench.steps.size > 0) {
      if (kv.numOpen > 0) {
        const call = kv.next();
        expect(call).toMatchObject({ kind: 'extend', numBlocks: 3, numTokens: 4 * BLOCK });
        call.refuse('unavailable');
      }
      await settle();
      bench.finish(0);
    }
    expect(bench.request('r').numComputed).toBe(3 * BLOCK);
    kv.next().refuse('unavailable');
    for (let time = 0; time < 20; time++) await settle();
    expect(kv.numOpen).toBe(0);
    await vi.advanceTimersByTimeAsync(ONE_SECOND);
    // It had been given, and this is said again.
    kv.next().give(2, 'a', 3);
    await settle();
    expect(bench.request('r').blockTable).toHaveLength(5);
    expect(bench.steps.size).toBe(1);
    expect(kv.log).not.toContain('free r');
  });

  test('that turn out to be none make no loop', async () => {
    await untilExtend();
    while (bench.steps.size > 0) {
      if (kv.numOpen > 0) kv.next().give(0);
      await settle();
      if (bench.steps.size > 0) bench.finish(0);
    }
    const numCalls = kv.log.length;
    for (let time = 0; time < 20; time++) {
      if (kv.numOpen > 0) kv.next().give(0);
      await settle();
    }
    expect(kv.log.length - numCalls).toBeLessThan(2);
  });

  test('that come after the request was cancelled change nothing', async () => {
    await untilExtend();
    bench.executor.cancel('r');
    bench.finish(0);
    expect(kv.log.at(-1)).toBe('free r');
    kv.next().give(1, 'a', 3);
    await settle();
    expect(kv.log.filter((call) => call === 'free r')).toHaveLength(1);
    expect(bench.completed).toEqual(['r']);
  });

  test('refused because another executor has the request end it without a word', async () => {
    await untilExtend();
    // What was sampled before is written.
    await settle();
    const numMessages = bench.messages.length;
    kv.next().refuse('duplicate_id');
    await settle();
    expect(bench.executor.requests.get('r')).toBeUndefined();
    bench.finish(0);
    expect(kv.log.at(-1)).toBe('free r');
    await settle();
    expect(bench.messages).toHaveLength(numMessages);
    expect(bench.completed).toEqual([]);
  });
});

describe('a request that another executor has', () => {
  test('is dropped where it asks for blocks, and the next in the queue is let in', async () => {
    bench.admit({ id: 'r', numPromptTokens: 20, maxTokens: 60, deliveryCount: 3 });
    await settle();
    bench.admit({ id: 'next', numPromptTokens: 20, maxTokens: 60 });
    const call = kv.next();
    expect(call.deliveryCount).toBe(3);
    call.refuse('duplicate_id');
    await settle();
    expect(bench.executor.requests.get('r')).toBeUndefined();
    expect(kv.log).toEqual(['allocate r', 'allocate next']);
    expect([bench.messages, bench.completed]).toEqual([[], []]);
  });

  test('is dropped when a heartbeat says so, and frees its blocks after the step in flight', async () => {
    await running('r');
    bench.executor.tables.onRequestsTakenOver(['r']);
    expect(bench.executor.requests.get('r')).toBeUndefined();
    expect(kv.log).toEqual(['allocate r']);
    bench.finish(0);
    expect(kv.log).toEqual(['allocate r', 'free r']);
    expect([bench.messages, bench.completed]).toEqual([[], []]);
  });
});

describe('a step that failed', () => {
  test('by a lost connection is run again with its KV', async () => {
    await running('r');
    bench.finish(0);
    bench.failStep(0, 'unavailable', []);
    expect(bench.steps.get(0)?.tokenIds).toHaveLength(1);
    expect(kv.log).toEqual(['allocate r']);
  });

  test('by a shard that does not listen is held, others go on, and it is run again with its KV', async () => {
    await running('r', { shardId: 'deaf' });
    bench.finish(waveOf('r'));
    bench.failStep(waveOf('r'), 'unavailable', ['deaf']);
    expect(bench.steps.size).toBe(0);
    await running('other');
    bench.finish(waveOf('other'));
    expect(bench.steps.size).toBe(1);
    await vi.advanceTimersByTimeAsync(200);
    expect(bench.steps.size).toBe(2);
    expect(kv.log).toEqual(['allocate r', 'allocate other']);
  });

  test('by a shard that does not listen costs no recovery until the kv-manager says that it is lost', async () => {
    await running('r', { shardId: 'dead' });
    for (let time = 0; time < 20; time++) {
      bench.failStep(0, 'unavailable', ['dead']);
      await vi.advanceTimersByTimeAsync(200);
    }
    expect(kv.log).toEqual(['allocate r']);
    expect(new Set(kv.suspected)).toEqual(new Set(['dead']));
    bench.failStep(0, 'unavailable', ['dead']);
    bench.executor.tables.onShardLost('dead');
    expect(kv.log).toEqual(['allocate r', 'free r', 'allocate r']);
    kv.next().give(3, 'b');
    await settle();
    await vi.advanceTimersByTimeAsync(200);
    expect(bench.steps.get(0)?.tokenIds).toHaveLength(20);
  });

  /** Two requests that decode in one step; a third is in the other wave. */
  async function pair(): Promise<number> {
    for (const id of ['one', 'other', 'two']) await running(id);
    expect(waveOf('two')).toBe(waveOf('one'));
    const wave = waveOf('one');
    bench.finish(wave);
    while (bench.steps.get(wave)!.tokenIds.length > 2) bench.finish(wave);
    expect(bench.steps.get(wave)!.sampledRows).toHaveLength(2);
    return wave;
  }
  const numTokens = (id: string): number => bench.request(id).answer.numTokens;

  test.each(['internal', 'overloaded', 'protocol_violation'] as const)(
    'by itself, as %s, runs again one request at a time with its KV; who fails alone ends, the others go on',
    async (code) => {
      const wave = await pair();
      const before = { one: numTokens('one'), two: numTokens('two') };
      bench.failStep(wave, code, []);
      expect(bench.steps.get(wave)!.sampledRows).toHaveLength(1);
      bench.failStep(wave, code, []);
      await settle();
      const [failed, left] =
        bench.executor.requests.get('one') === undefined ? (['one', 'two'] as const) : (['two', 'one'] as const);
      expect(bench.messages.at(-1)).toMatchObject({ id: failed, finish_reason: 'error', error: { code } });
      expect(bench.steps.get(wave)!.sampledRows).toHaveLength(1);
      bench.finish(wave);
      bench.finish(wave);
      expect(numTokens(left)).toBe(before[left] + 2);
      expect(kv.log.filter((call) => call !== `free ${failed}`)).toEqual([
        'allocate one',
        'allocate other',
        'allocate two',
      ]);
    },
  );

  test('by itself and of which each request runs alone is formed of all again', async () => {
    const wave = await pair();
    const before = [numTokens('one'), numTokens('two')];
    bench.failStep(wave, 'internal', []);
    bench.finish(wave);
    bench.finish(wave);
    expect([numTokens('one'), numTokens('two')]).toEqual(before.map((count) => count + 1));
    expect(bench.steps.get(wave)!.sampledRows).toHaveLength(2);
  });

  test('by itself with long chunks runs again with chunks that are no longer than beside others', async () => {
    for (const id of ['one', 'other', 'two']) {
      bench.admit({ id, numPromptTokens: 400, maxTokens: 60 });
      kv.next().give(26);
      await settle();
    }
    const wave = waveOf('two');
    bench.finish(wave);
    expect(bench.steps.get(wave)!.tokenIds.length).toBeGreaterThan(256);
    bench.failStep(wave, 'overloaded', []);
    expect(bench.steps.get(wave)!.tokenIds.length).toBeLessThanOrEqual(256);
  });

  test.each(['protocol_violation', 'unavailable', 'internal'] as const)(
    'by a frame that was refused (%s) is run again at once with its KV, and a step that is done forgives it',
    async (code) => {
      await running('r');
      for (let token = 0; token < 5; token++) {
        for (let refusal = 0; refusal < 3; refusal++) {
          const { numComputed } = bench.request('r');
          bench.failStep(0, code, ['a'], true);
          expect(bench.request('r')).toMatchObject({ numComputed, isInStep: true });
        }
        bench.finish(0);
        await settle();
      }
      expect(kv.log.filter((call) => !call.startsWith('extend'))).toEqual(['allocate r']);
      expect(kv.suspected).toEqual([]);
    },
  );

  test('by frames that are refused four times in a row has its KV computed again, or is held', async () => {
    await running('lost');
    await running('held', { shardId: 'b' });
    const waves = { lost: waveOf('lost'), held: waveOf('held') };
    bench.finish(waves.lost);
    bench.finish(waves.held);
    for (let refusal = 0; refusal < 3; refusal++) {
      bench.failStep(waves.lost, 'protocol_violation', ['a'], true);
      bench.failStep(waves.held, 'unavailable', ['b'], true);
      expect(bench.steps.size).toBe(2);
    }
    bench.failStep(waves.lost, 'protocol_violation', ['a'], true);
    bench.failStep(waves.held, 'unavailable', ['b'], true);
    expect(kv.log).toEqual(['allocate lost', 'allocate held', 'free lost', 'allocate lost']);
    expect(kv.suspected).toEqual(['b']);
    expect(bench.steps.size).toBe(0);
    await vi.advanceTimersByTimeAsync(200);
    expect(bench.request('held').isInStep).toBe(true);
  });

  test('while the lease is not held waits for it', async () => {
    await running('r');
    kv.holdsLease = false;
    bench.failStep(0, 'unavailable', []);
    expect(bench.steps.size).toBe(0);
    kv.holdsLease = true;
    bench.executor.tables.onLeaseRenewed();
    expect(bench.steps.size).toBe(1);
  });
});

test('a deadline beyond what timers take is no deadline', async () => {
  bench.admit({ id: 'r', numPromptTokens: 20, maxTokens: 60, deadlineAtMs: Date.now() + 1e13 });
  await vi.advanceTimersByTimeAsync(60_000);
  expect(bench.request('r').phase).toBe('allocating');
});

test('a request whose answer another process writes is handed over without a word, and its KV is freed', async () => {
  await running('r');
  bench.isTakenOver = true;
  bench.finish(waveOf('r'));
  await settle();
  expect(bench.executor.requests.size).toBe(0);
  expect(bench.messages).toEqual([]);
  expect(bench.completed).toEqual([]);
  for (const wave of [...bench.steps.keys()]) bench.finish(wave);
  expect(kv.log.at(-1)).toBe('free r');
});
