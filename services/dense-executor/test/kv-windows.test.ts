/**
 * Block tables of models whose layers all have a window: any prompt, window, chunk and block size runs to its end with
 * blocks for its window and one step, also when its KV is lost on the way. The kv-manager is a count of blocks.
 */
import type { BlockRef } from '@lamina/protocol';
import { createLogger, Registry } from '@lamina/runtime';
import type { KvLayout } from '@lamina/tensor';
import fc from 'fast-check';
import { expect, test } from 'vitest';
import { type KvCalls, KvTables } from '../src/kv-tables.ts';
import { ExecutorMetrics } from '../src/metrics.ts';
import { RunningRequests } from '../src/running-requests.ts';
import { Scheduler } from '../src/scheduling/scheduler.ts';
import { buildStep } from '../src/scheduling/step-builder.ts';
import { request } from './requests.ts';

interface Case {
  readonly numPromptTokens: number;
  readonly maxTokens: number;
  readonly windowTokens: readonly number[];
  readonly chunk: number;
  readonly blockSizeTokens: number;
  /** Steps after which the KV is lost, once. */
  readonly lossAfterSteps: number;
}

/** A kv-manager with one table. */
class FakeKv implements KvCalls {
  readonly holdsLease = true;
  readonly leaseTerm = 1;
  readonly #blockSizeTokens: number;
  #numBlocks = 0;
  #numFreed = 0;
  mostHeld = 0;
  maxTokens = 0;

  constructor(blockSizeTokens: number) {
    this.#blockSizeTokens = blockSizeTokens;
  }

  get numHeld(): number {
    return this.#numBlocks - this.#numFreed;
  }

  #grow(numTokens: number): Promise<BlockRef[]> {
    const first = this.#numBlocks;
    this.#numBlocks = Math.max(first, Math.ceil(numTokens / this.#blockSizeTokens));
    this.mostHeld = Math.max(this.mostHeld, this.numHeld);
    return Promise.resolve(
      Array.from({ length: this.#numBlocks - first }, (_, i) => ({ shardId: 'a', block: first + i })),
    );
  }

  suspect(): Promise<void> {
    return Promise.resolve();
  }

  allocate(_requestId: string, numTokens: number, maxTokens: number): Promise<BlockRef[]> {
    expect(this.numHeld).toBe(0);
    expect(numTokens).toBeLessThanOrEqual(maxTokens);
    this.#numBlocks = 0;
    this.#numFreed = 0;
    this.maxTokens = maxTokens;
    return this.#grow(numTokens);
  }

  extend(_requestId: string, numBlocks: number, numTokens: number): Promise<BlockRef[]> {
    expect(numBlocks).toBe(this.#numBlocks);
    return this.#grow(numTokens);
  }

  trim(_requestId: string, numFreedBlocks: number): Promise<void> {
    expect(numFreedBlocks).toBeGreaterThan(this.#numFreed);
    expect(numFreedBlocks).toBeLessThanOrEqual(this.#numBlocks);
    this.#numFreed = numFreedBlocks;
    return Promise.resolve();
  }

  free(): Promise<void> {
    this.#numFreed = this.#numBlocks;
    return Promise.resolve();
  }
}

async function runToTheEnd(each: Case): Promise<void> {
  const { blockSizeTokens, windowTokens, chunk } = each;
  const layout: KvLayout = {
    numLayers: windowTokens.length,
    numHeads: 1,
    numKvHeads: 1,
    headDim: 8,
    scale: 1,
    windowTokens,
    blockSizeTokens,
    kvDtype: 'f32',
  };
  const kv = new FakeKv(blockSizeTokens);
  const scheduler = new Scheduler({ maxBatchedTokens: chunk, prefillChunkTokens: chunk, speculation: 'off' }, 1, 1);
  const metrics = new ExecutorMetrics(new Registry(), { running: () => 0, waves: () => 0 });
  const log = createLogger({ level: 'silent', service: 'dense-executor', instance: 'test' });
  const requests = new RunningRequests();
  const tables = new KvTables({
    requests,
    scheduler,
    metrics,
    log,
    onRunnable: () => {},
    onReleaseWaits: () => {},
    onShardLost: () => {},
  });
  tables.connect(kv, layout);
  const subject = request({ numPromptTokens: each.numPromptTokens, maxTokens: each.maxTokens, numBlocks: 0 });
  const begin = async () => {
    await tables.allocate(subject);
    subject.phase = 'prefill';
    scheduler.add(subject);
  };
  await begin();
  const end = subject.maxKvTokens;
  for (let numSteps = 1; subject.numComputed < end; numSteps++) {
    expect(numSteps).toBeLessThan(4 * end + 100);
    const [entry] = scheduler.formStep(0);
    if (entry !== undefined) {
      // Throws when the table lacks a block that some query sees or that a token is stored in.
      buildStep([entry], scheduler, 0, numSteps, 1);
      subject.isInStep = true;
    }
    tables.extendAhead(subject);
    await new Promise((resolve) => setImmediate(resolve));
    subject.isInStep = false;
    if (numSteps === each.lossAfterSteps) {
      tables.release(subject);
      expect(kv.numHeld).toBe(0);
      await begin();
    } else if (entry !== undefined) {
      subject.numComputed = entry.start + entry.numTokens;
      if (subject.numComputed === subject.tokens.length) {
        subject.tokens.push(7);
        subject.phase = 'decode';
      }
    }
  }
  const maxWindow = Math.max(...windowTokens);
  const atMost = windowTokens.includes(0) ? end : Math.min(end, maxWindow + chunk + 2 * blockSizeTokens);
  expect(kv.maxTokens).toBe(atMost);
  expect(kv.mostHeld).toBeLessThanOrEqual(Math.ceil(atMost / blockSizeTokens));
  tables.release(subject);
  expect(kv.numHeld).toBe(0);
}

test('runs to its end with blocks for its window and one step', async () => {
  await fc.assert(
    fc.asyncProperty(
      fc.record({
        numPromptTokens: fc.integer({ min: 1, max: 150 }),
        maxTokens: fc.integer({ min: 1, max: 60 }),
        windowTokens: fc.array(
          fc.oneof({ weight: 9, arbitrary: fc.integer({ min: 1, max: 60 }) }, { weight: 1, arbitrary: fc.constant(0) }),
          { minLength: 1, maxLength: 3 },
        ),
        chunk: fc.integer({ min: 1, max: 70 }),
        blockSizeTokens: fc.constantFrom(8, 16, 24),
        lossAfterSteps: fc.integer({ min: 1, max: 60 }),
      }),
      runToTheEnd,
    ),
    { numRuns: 200 },
  );
});
