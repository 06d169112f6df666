/**
 * What a real executor makes of a work item in the light of what came before: cancels of its id, a part of its answer.
 * On a real nats-server with a kv-manager, an attention-shard and a gateway.
 */
import { join } from 'node:path';
import { type Bus, TokenStream, type WorkLease, WorkQueue } from '@lamina/bus';
import { ROOT_DIRECTORY } from '@lamina/cli';
import {
  CLOCK_TOLERANCE_MS,
  decodeTokens,
  packMessage,
  STREAMS,
  SUBJECTS,
  type TokenMessage,
  type WorkItem,
} from '@lamina/protocol';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { startAttentionShard } from '../../services/attention-shard/src/service.ts';
import { startDenseExecutor } from '../../services/dense-executor/dist/service.js';
import { startGateway } from '../../services/gateway/src/service.ts';
import { startKvManager } from '../../services/kv-manager/src/service.ts';
import { TEST_CACHE_DIRECTORY } from '../cluster.ts';
import { numQueued, token, workItem, workSubject } from './bus-bench.ts';
import { GATEWAY_FLAGS } from './gateway-bench.ts';
import { connect, eventually, type InProcessService, startInProcess } from './in-process.ts';
import { store } from './store-answer.ts';

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
    await startInProcess('gateway', startGateway, nats.url, GATEWAY_FLAGS),
  ];
  await startExecutor();
  queue = new WorkQueue(bus);
  tokens = new TokenStream(bus, () => undefined);
});
afterAll(async () => {
  for (const service of [executor, ...others]) await service.stop();
  await bus.close();
  await nats.stop();
});

async function startExecutor(): Promise<void> {
  const flags = ['--model', MODEL, '--cache-dir', TEST_CACHE_DIRECTORY];
  executor = await startInProcess('dense-executor', startDenseExecutor, nats.url, flags);
}

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

test('a work item that the executor cannot read, as of another version, is ended with an error', async () => {
  const { tokenIds, ...rest } = workItem('other-version');
  bus.publish(await workSubject(bus, 'other-version'), packMessage({ ...rest, prompt: tokenIds }));
  const [end, ...more] = await answerOf('other-version');
  expect(more).toEqual([]);
  expect(end).toMatchObject({ index: 0, token: null, finish_reason: 'error', error: { code: 'protocol_violation' } });
  expect(end?.error?.message).toMatch(/are they of one version\?.*tokenIds/);
});

describe('an answer whose beginning the stream has discarded', () => {
  /** A client that has the id, and waits for the last message. */
  async function ask(id: string): Promise<readonly TokenMessage[]> {
    const messages: TokenMessage[] = [];
    const asked = bus.requestStream(SUBJECTS.generate, Buffer.from(JSON.stringify({ id, prompt: 'Hi' })), (reply) =>
      messages.push(...decodeTokens(reply!.data)),
    );
    await eventually(() => (messages.at(-1)?.finish_reason ? true : undefined), 10_000);
    asked.unsubscribe();
    return messages;
  }

  test('is ended behind what is left of it, and who asks is told once, whenever', async () => {
    const manager = await bus.connection.jetstreamManager();
    const { config } = await manager.streams.info(STREAMS.tokens.name);
    for (let index = 0; index < 4; index++) await store(tokens, [token('half', index)]);
    await manager.streams.update(STREAMS.tokens.name, { ...config, max_msgs: 2 });
    await manager.streams.update(STREAMS.tokens.name, config);
    const refused = [{ id: 'half', index: 0, token: null, finish_reason: 'error', error: { code: 'unknown_request' } }];
    // Nobody works on it any more: the gateway has the rest computed.
    expect(await ask('half')).toMatchObject(refused);
    await eventually(async () => ((await numQueued(bus)) === 0 ? true : undefined));
    const stored: TokenMessage[] = [];
    const reading = await tokens.replay('half', (data) => stored.push(...decodeTokens(data)));
    await eventually(() => (stored.length === 3 ? true : undefined));
    reading.unsubscribe();
    expect(stored.map(({ index }) => index)).toEqual([2, 3, 4]);
    expect(stored.at(-1)).toMatchObject({ token: null, finish_reason: 'error', error: { code: 'unknown_request' } });
    expect(await ask('half')).toMatchObject(refused);
    expect(await numQueued(bus)).toBe(0);
  });

  test('is computed from its start when nothing of it is left', async () => {
    const manager = await bus.connection.jetstreamManager();
    const { config } = await manager.streams.info(STREAMS.tokens.name);
    await store(tokens, [token('none', 0)]);
    await store(tokens, [token('other', 0)]);
    await manager.streams.update(STREAMS.tokens.name, { ...config, max_msgs: 1 });
    await manager.streams.update(STREAMS.tokens.name, config);
    await submit('none', { isContinued: true });
    expect((await answerOf('none')).map(({ index }) => index)).toEqual([0, 1, 2, 3]);
  });
});

test('an item that was handed back often is computed, whether something was stored each time or nothing', async () => {
  await executor.stop();
  const MANY = 12;
  await submit('further', { maxTokens: MANY + NUM_TOKENS });
  await submit('vain');
  const texts: string[] = [];
  const held = new Map<string, WorkLease>();
  while (held.size < 2) {
    const work = await eventually(() => queue.lease(1_000, () => undefined));
    const { id } = work.item;
    if (id === 'further' && texts.length < MANY) {
      const lastSequence = (await tokens.endOf(id))?.sequence ?? 0;
      await tokens.append([token(id, texts.length)], 'json', lastSequence, work.deliveryCount);
      texts.push(`t${texts.length}`);
    }
    // A message that is given out and lost under load is a delivery without a text.
    if (id === 'further' ? texts.length < MANY : work.deliveryCount < MANY) work.release();
    else held.set(id, work);
  }
  for (const work of held.values()) work.release();
  await startExecutor();
  expect((await answerOf('vain')).map(({ index }) => index)).toEqual(
    Array.from({ length: NUM_TOKENS }, (_, index) => index),
  );
  const answer = await answerOf('further');
  expect(answer.slice(0, MANY).map(({ text }) => text)).toEqual(texts);
  expect(answer.map(({ index }) => index)).toEqual(Array.from({ length: MANY + NUM_TOKENS }, (_, index) => index));
  expect(answer.at(-1)).toMatchObject({ finish_reason: 'length' });
});
