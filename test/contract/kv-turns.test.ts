/**
 * Executors that share a KV cache which is too small for their requests, between a real kv-manager and workers that only
 * count: all come to their end, and hardly a prompt is computed more often than it must be.
 */
import type { BlockRef } from '@lamina/protocol';
import { expect, test } from 'vitest';
import type { KvCalls } from '../../services/dense-executor/src/kv-tables.ts';
import { Bench, BLOCK, settle } from '../../services/dense-executor/test/executor-bench.ts';
import { KvManager } from '../../services/kv-manager/src/kv-manager.ts';

const SPEC = { numLayers: 1, numHeads: 1, numKvHeads: 1, headDim: 8, scale: 1 };

/** A kv-manager behind a wire that keeps the order of messages and takes one turn of the event loop each way. */
class Wire {
  readonly manager: KvManager;
  readonly #benches: Bench[] = [];

  constructor(numBlocks: number) {
    this.manager = new KvManager({
      managerEpoch: 'm',
      blockSizeTokens: BLOCK,
      kvDtype: 'f32',
      spreadAboveTokens: 4096,
      heartbeatIntervalMs: 1,
      heartbeatTimeoutMs: 2,
      nowMs: () => 0,
      events: {
        onShardLost: () => undefined,
        onCapacityFreed: (freeBlocks) =>
          setImmediate(() => {
            for (const { executor } of this.#benches) executor.tables.onCapacityFreed(freeBlocks);
          }),
        onNote: () => undefined,
      },
    });
    this.addExecutor('e0');
    const shard = { shardId: 's', budgetBytes: 2 ** 40, kernel: 'k', fencedUpTo: 0 };
    this.manager.shardHeartbeat({ ...shard, numBlocks: null });
    this.manager.shardHeartbeat({ ...shard, numBlocks });
  }

  get benches(): readonly Bench[] {
    return this.#benches;
  }

  addExecutor(executorId: string): void {
    const { manager } = this;
    manager.executorHeartbeat({ executorId, modelId: 'm', spec: SPEC, originIds: [1] });
    const call = <T>(run: () => T): Promise<T> =>
      new Promise((resolve, reject) => {
        setImmediate(() => {
          try {
            const result = run();
            setImmediate(() => resolve(result));
          } catch (error) {
            setImmediate(() => reject(error));
          }
        });
      });
    const kv: KvCalls = {
      holdsLease: true,
      leaseTerm: 1,
      allocate: (requestId, numTokens, maxTokens, deliveryCount, vainDeliveryCount): Promise<BlockRef[]> =>
        call(() => manager.allocate({ requestId, executorId, numTokens, maxTokens, deliveryCount, vainDeliveryCount })),
      extend: (requestId, numBlocks, numTokens) =>
        call(() => manager.extend({ requestId, executorId, numBlocks, numTokens })),
      trim: (requestId, numFreedBlocks) => call(() => manager.trim({ requestId, executorId, numFreedBlocks })),
      free: (requestId) => call(() => manager.free(requestId, executorId)),
      suspect: () => Promise.resolve(),
    };
    this.#benches.push(new Bench(kv));
  }

  /** Runs steps until every request has ended. */
  async run(): Promise<void> {
    let idleSinceMs = performance.now();
    while (this.#benches.some(({ executor }) => executor.requests.size > 0)) {
      let isIdle = true;
      for (const bench of this.#benches)
        for (const wave of [...bench.steps.keys()]) {
          bench.finish(wave);
          isIdle = false;
        }
      if (!isIdle) idleSinceMs = performance.now();
      // Nothing lost a message here: nobody may have to wait for the timer that makes a lost one good.
      if (performance.now() - idleSinceMs > 900) throw new Error('somebody waits for ever');
      await settle();
    }
  }
}

const sumOf = async (counter: { get(): Promise<{ values: { value: number }[] }> }): Promise<number> =>
  (await counter.get()).values.reduce((sum, { value }) => sum + value, 0);

const PROMPT_TOKENS = 40;
const MAX_TOKENS = 250;

test.each([
  { numExecutors: 1, numRequests: 4, numBlocks: 24 },
  { numExecutors: 1, numRequests: 12, numBlocks: 40 },
  { numExecutors: 2, numRequests: 4, numBlocks: 24 },
  { numExecutors: 2, numRequests: 12, numBlocks: 40 },
])('$numRequests requests of $numExecutors executors take turns in $numBlocks blocks', async (each) => {
  const wire = new Wire(each.numBlocks);
  for (let index = 1; index < each.numExecutors; index++) wire.addExecutor(`e${index}`);
  for (let index = 0; index < each.numRequests; index++) {
    const bench = wire.benches[index % each.numExecutors];
    bench?.admit({ id: `r${index}`, numPromptTokens: PROMPT_TOKENS + index, maxTokens: MAX_TOKENS });
  }
  await wire.run();
  let numPreemptions = 0;
  let numPrefilled = 0;
  for (const { messages, metrics } of wire.benches) {
    const ends = messages.filter((message) => message.finish_reason !== null);
    expect(ends.map((message) => [message.finish_reason, message.index])).toEqual(
      ends.map(() => ['length', MAX_TOKENS - 1]),
    );
    numPreemptions += await sumOf(metrics.preemptions);
    numPrefilled += await sumOf(metrics.prefilledTokens);
  }
  expect(wire.benches.flatMap(({ completed }) => completed)).toHaveLength(each.numRequests);
  expect(wire.manager.status()).toMatchObject({ numRequests: 0, shards: [{ usedBlocks: 0 }] });
  // Measured: 2 preemptions of each request at most on average, and hardly more computed again than is computed once.
  expect(numPreemptions).toBeLessThan(3 * each.numRequests);
  expect(numPrefilled).toBeLessThan(1.5 * each.numRequests * (PROMPT_TOKENS + MAX_TOKENS));
});
