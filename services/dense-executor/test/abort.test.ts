/** A step that keeps the blocks of requests which ended is aborted where that pays; its other requests lose nothing. */
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import type { StepRequest } from '../src/worker/messages.ts';
import { Bench, ScriptedKv, settle } from './executor-bench.ts';

let kv: ScriptedKv;
let bench: Bench;

function start(speculation: 'auto' | 'off' = 'off'): void {
  kv = new ScriptedKv();
  bench = new Bench(kv, speculation);
}
beforeEach(() => {
  vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout', 'setInterval', 'clearInterval'] });
  start();
});
afterEach(() => vi.useRealTimers());

let numBlocksGiven = 0;
async function admit(id: string, numPromptTokens: number, tokenIds?: number[]): Promise<void> {
  bench.admit({ id, numPromptTokens, maxTokens: 60, ...(tokenIds !== undefined && { tokenIds }) });
  while (bench.request(id).phase === 'queued') await settle();
  kv.next().give(40, 'a', numBlocksGiven);
  numBlocksGiven += 40;
  await settle();
}

/** Requests that share wave 0; wave 1 has as many others. The step in flight on wave 0 is of all of them. */
async function sharing(prompts: Readonly<Record<string, number>>): Promise<void> {
  let index = 0;
  for (const [id, numPromptTokens] of Object.entries(prompts)) {
    await admit(id, numPromptTokens);
    await admit(`other ${index++}`, 1);
  }
  if (index > 1) bench.finish(0);
  for (const id of Object.keys(prompts)) {
    expect(bench.request(id).waveIndex, id).toBe(0);
    expect(bench.request(id).isInStep, id).toBe(true);
  }
}

const stepOf = (wave: number): StepRequest => bench.steps.get(wave)!;
/** Tokens, positions and sampling of rows [from, to). */
const rowsOf = ({ tokenIds, positionIds, sampledRows, sampling }: StepRequest, from: number, to: number): unknown => ({
  tokenIds: [...tokenIds.subarray(from, to)],
  positionIds: [...positionIds.subarray(from, to)],
  sampling: [...sampledRows].flatMap((row, i) =>
    row >= from && row < to ? [[row - from, ...sampling.subarray(8 * i, 8 * i + 8)]] : [],
  ),
});
const abortFails = (wave: number): void => bench.failStep(wave, 'unavailable', []);
const freed = (): string[] => kv.log.filter((call) => call.startsWith('free'));
const counted = async (metric: { get(): Promise<{ values: { value: number }[] }> }): Promise<number> =>
  (await metric.get()).values.reduce((sum, { value }) => sum + value, 0);

describe('a request that is cancelled', () => {
  test('alone in its step: the step is aborted once, and its blocks are free when that has ended', async () => {
    await sharing({ r: 300 });
    const { stepId } = stepOf(0);
    bench.executor.cancel('r');
    expect(bench.aborts).toEqual([{ wave: 0, stepId }]);
    expect(freed()).toEqual([]);
    abortFails(0);
    expect(freed()).toEqual(['free r']);
    expect(bench.steps.has(0)).toBe(false);
    expect(await counted(bench.metrics.abortedSteps)).toBe(1);
    expect(await counted(bench.metrics.failedSteps)).toBe(0);
  });

  test('with a chunk beside others: those run again with the same tokens, positions and random numbers', async () => {
    await sharing({ decoding: 20, r: 300 });
    const before = rowsOf(stepOf(0), 0, 1);
    const numMessages = bench.messages.length;
    const { kvGeneration, numComputed } = bench.request('decoding');
    bench.executor.cancel('r');
    expect(bench.aborts).toHaveLength(1);
    abortFails(0);
    expect(freed()).toEqual(['free r']);
    expect(bench.request('decoding')).toMatchObject({ kvGeneration, numComputed, isInStep: true });
    expect(stepOf(0).tokenIds).toHaveLength(1);
    expect(rowsOf(stepOf(0), 0, 1)).toEqual(before);
    bench.finish(0, [77]);
    await settle();
    expect(bench.messages.slice(numMessages).filter(({ id }) => id === 'decoding')).toMatchObject([{ token: 77 }]);
  });

  test('beside a draft: the same draft runs again', async () => {
    start('auto');
    const periodic = Array.from({ length: 40 }, (_, i) => 5 + (i % 4));
    await admit('decoding', 0, periodic);
    await admit('other', 1);
    await admit('r', 300);
    bench.finish(0, [5]);
    const numRows = stepOf(0).positionIds.indexOf(0n);
    expect(numRows).toBeGreaterThan(1);
    const before = rowsOf(stepOf(0), 0, numRows);
    bench.executor.cancel('r');
    expect(bench.aborts).toHaveLength(1);
    abortFails(0);
    expect(rowsOf(stepOf(0), 0, numRows)).toEqual(before);
    expect(await counted(bench.metrics.draftedTokens)).toBe(0);
  });

  test('with a few rows beside others: the step goes on', async () => {
    await sharing({ decoding: 20, r: 20 });
    bench.executor.cancel('r');
    expect(bench.aborts).toEqual([]);
    bench.finish(0);
    expect(freed()).toEqual(['free r']);
    expect(bench.request('decoding').numComputed).toBe(21);
  });

  test('when its step is about to end: the result counts for the others', async () => {
    await sharing({ decoding: 20, r: 300 });
    bench.executor.cancel('r');
    expect(bench.aborts).toHaveLength(1);
    bench.finish(0);
    expect(freed()).toEqual(['free r']);
    expect(bench.request('decoding').numComputed).toBe(21);
    expect(await counted(bench.metrics.abortedSteps)).toBe(0);
  });

  test('when its step fails because of a shard: that counts', async () => {
    await sharing({ decoding: 20, r: 300 });
    bench.executor.cancel('r');
    bench.failStep(0, 'shard_lost', ['a']);
    expect(freed().sort()).toEqual(['free decoding', 'free r']);
    expect(await counted(bench.metrics.failedSteps)).toBe(1);
  });
});

describe('cancels in a row', () => {
  test('abort every second step of a wave at most, so the others get on', async () => {
    await sharing({ decoding: 20, first: 300, second: 300 });
    const { numComputed } = bench.request('decoding');
    bench.executor.cancel('first');
    bench.executor.cancel('second');
    expect(bench.aborts, 'once a step').toHaveLength(1);
    abortFails(0);
    await admit('third', 300);
    bench.finish(0);
    expect(bench.request('decoding').numComputed).toBe(numComputed + 1);
    bench.executor.cancel('third');
    expect(bench.aborts).toHaveLength(2);
    await admit('fourth', 300);
    abortFails(0);
    expect(bench.request('fourth')).toMatchObject({ waveIndex: 0, isInStep: true });
    bench.executor.cancel('fourth');
    expect(bench.aborts).toHaveLength(2);
    bench.finish(0);
    expect(bench.request('decoding').numComputed).toBe(numComputed + 2);
    expect(freed()).toEqual(['free first', 'free second', 'free third', 'free fourth']);
  });

  test('abort each step that is for nothing', async () => {
    await sharing({ first: 600, second: 300 });
    bench.executor.cancel('first');
    abortFails(0);
    bench.executor.cancel('second');
    expect(bench.aborts).toHaveLength(2);
    abortFails(0);
    expect(freed()).toEqual(['free first', 'free second']);
  });
});
