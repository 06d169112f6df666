/**
 * What a real executor makes of a work item in the light of what came before: cancels of its id, a part of its answer.
 * On a real nats-server with a kv-manager and an attention-shard.
 */
import { join } from 'node:path';
import { type Bus, TokenStream, WorkQueue } from '@lamina/bus';
import { ROOT_DIRECTORY } from '@lamina/cli';
import { CLOCK_TOLERANCE_MS, SUBJECTS, type TokenMessage, type WorkItem } from '@lamina/protocol';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { startAttentionShard } from '../../services/attention-shard/src/service.ts';
import { startDenseExecutor } from '../../services/dense-executor/dist/service.js';
import { startKvManager } from '../../services/kv-manager/src/service.ts';
import { TEST_CACHE_DIRECTORY } from '../cluster.ts';
import { numQueued, workItem } from './bus-bench.ts';
import { connect, eventually, type InProcessService, startInProcess } from './in-process.ts';

const MODEL = join(ROOT_DIRECTORY, 'models', 'lamina-tiny');
const NUM_TOKENS = 4;

let nats: NatsServer;
let bus: Bus;
let executor: InProcessService;
let others: InProcessService[];
let queue: WorkQueue;
let tokens: TokenStream;

beforeAll(async () => {
  nats = await startNatsServer();
  bus = await connect(nats.url);
  others = [
    await startInProcess('kv-manager', startKvManager, nats.url, ['--heartbeat-interval-ms', '100']),
    await startInProcess('attention-shard', startAttentionShard, nats.url, ['--kv-budget-bytes', '8m']),
  ];
  const flags = ['--model', MODEL, '--cache-dir', TEST_CACHE_DIRECTORY];
  executor = await startInProcess('dense-executor', startDenseExecutor, nats.url, flags);
  queue = new WorkQueue(bus);
  tokens = new TokenStream(bus, () => undefined);
});
afterAll(async () => {
  for (const service of [executor, ...others]) await service.stop();
  await bus.close();
  await nats.stop();
});

async function submit(id: string, overrides: Partial<WorkItem> = {}): Promise<void> {
  const item = { model: 'lamina-tiny', maxTokens: NUM_TOKENS, stop: [], ignoreEos: true, submittedAtMs: Date.now() };
  await queue.submit(workItem(id, { ...item, ...overrides }));
}

/** Once the answer has its end, and the item is done. */
async function answerOf(id: string): Promise<readonly TokenMessage[]> {
  await eventually(async () => ((await tokens.endOf(id))?.isComplete ? true : undefined), 10_000);
  await eventually(async () => ((await numQueued(bus)) === 0 ? true : undefined));
  return (await tokens.stored(id)).tokens;
}

describe('a cancel', () => {
  const cancel = (id: string): void => bus.publish(SUBJECTS.cancel(id), new Uint8Array(0));

  test('that overtakes the item ends it, one that was sent in advance does not', async () => {
    cancel('in-advance');
    await new Promise((resolve) => setTimeout(resolve, CLOCK_TOLERANCE_MS + 200));
    await submit('in-advance');
    expect(await answerOf('in-advance')).toHaveLength(NUM_TOKENS);
    const submittedAtMs = Date.now();
    cancel('overtaken');
    await bus.flush();
    await submit('overtaken', { submittedAtMs });
    expect(await answerOf('overtaken')).toMatchObject([{ index: 0, token: null, finish_reason: 'cancelled' }]);
  });

  test('of what is no id is counted and not kept', async () => {
    cancel('caf\u00e9');
    cancel('x'.repeat(3_000));
    await eventually(async () =>
      /^lamina_executor_ignored_total\{.*reason="bad_cancel_id".*\} 2$/m.test(await executor.context.registry.metrics())
        ? true
        : undefined,
    );
  });
});
