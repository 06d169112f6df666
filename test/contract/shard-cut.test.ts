/**
 * The connection of a shard's tensors is cut for a moment while a request decodes, with what was on its way to it: on a real
 * nats-server, kv-manager, attention-shard and executor. The KV is where it was, so nothing is computed a second time but the step.
 */
import { join } from 'node:path';
import { type Bus, WorkQueue } from '@lamina/bus';
import { ROOT_DIRECTORY } from '@lamina/cli';
import { readModel } from '@lamina/model';
import { decodeTokens, SUBJECTS, type TokenMessage } from '@lamina/protocol';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { startAttentionShard } from '../../services/attention-shard/src/service.ts';
import { startDenseExecutor } from '../../services/dense-executor/dist/service.js';
import { startKvManager } from '../../services/kv-manager/src/service.ts';
import { TEST_CACHE_DIRECTORY } from '../cluster.ts';
import { workItem } from './bus-bench.ts';
import { HoldingProxy } from './holding-proxy.ts';
import { connect, eventually, type InProcessService, startInProcess } from './in-process.ts';

const MODEL = join(ROOT_DIRECTORY, 'models', 'lamina-tiny');
const TENSORS = /^attention-shard .* tensors$/;
const WORKER = SUBJECTS.workerTensors('', '', '').replace(/\.+$/, '.');
const PROMPT = Array.from({ length: 150 }, (_, i) => 5 + i);
const NUM_CUTS = 4;
/** Between the cuts: a connection that was made just before is not made again at once. */
const PAUSE_MS = 300;
const MAX_TOKENS = 850;

let nats: NatsServer;
let bus: Bus;
let proxy: HoldingProxy;
let executor: InProcessService;
let shard: InProcessService;
let manager: InProcessService;
let modelId: string;

beforeAll(async () => {
  nats = await startNatsServer();
  proxy = await HoldingProxy.start(nats.url);
  bus = await connect(nats.url);
  modelId = (await readModel(MODEL)).modelId;
  const shardFlags = ['--nats-url', proxy.url, '--kv-budget-bytes', '64m'];
  const executorFlags = ['--model', MODEL, '--cache-dir', TEST_CACHE_DIRECTORY, '--speculation', 'off'];
  manager = await startInProcess('kv-manager', startKvManager, nats.url);
  shard = await startInProcess('attention-shard', startAttentionShard, nats.url, shardFlags);
  executor = await startInProcess('dense-executor', startDenseExecutor, nats.url, executorFlags);
}, 60_000);
afterAll(async () => {
  for (const service of [executor, shard, manager]) await service.stop();
  await proxy.stop();
  await bus.close();
  await nats.stop();
});

async function counter(name: string): Promise<number> {
  const line = new RegExp(`^${name}(?:{.*})? (\\S+)$`, 'm').exec(await executor.context.registry.metrics());
  return Number(line?.[1] ?? 0);
}

/** The answer as it is stored. */
async function answer(id: string, maxTokens: number): Promise<TokenMessage[]> {
  const messages: TokenMessage[] = [];
  bus.subscribe(SUBJECTS.tokens(id), ({ data }) => messages.push(...decodeTokens(data)));
  await bus.flush();
  const item = workItem(id, { tokenIds: PROMPT, maxTokens, stop: [], ignoreEos: true });
  await new WorkQueue(bus).submit({ ...item, model: modelId, submittedAtMs: Date.now() });
  await eventually(() => (messages.length > 0 ? true : undefined), 30_000);
  return messages;
}

const tokensOf = (messages: readonly TokenMessage[]): (number | null)[] => messages.map(({ token }) => token);

test.each([
  ['layer', (chunk: string) => chunk.includes('MSG ') && !chunk.includes(WORKER)],
  ['plan', (chunk: string) => chunk.includes(WORKER)],
])(
  'with a %s, its layers run again at once, with the KV that there is',
  { timeout: 120_000 },
  async (name, isFirst) => {
    const numRecoveries = await counter('lamina_recoveries_total');
    const numPrefilled = await counter('lamina_prefilled_tokens_total');
    const messages = await answer(`cut-${name}`, MAX_TOKENS);
    const gapsMs: number[] = [];
    for (let cut = 1; cut <= NUM_CUTS; cut++) {
      await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
      proxy.lose(TENSORS, isFirst);
      await eventually(() => (proxy.isLosing ? true : undefined));
      const numBefore = messages.length;
      const cutAtMs = performance.now();
      proxy.cutLosing();
      await eventually(() => (messages.length > numBefore ? true : undefined), 30_000);
      gapsMs.push(performance.now() - cutAtMs);
    }
    console.log(`the next token ${gapsMs.map(Math.round).join(', ')} ms after a cut`);
    bus.publish(SUBJECTS.cancel(`cut-${name}`), new Uint8Array(0));
    await eventually(() => messages.at(-1)?.finish_reason ?? undefined, 30_000);
    expect(await counter('lamina_recoveries_total')).toBe(numRecoveries);
    expect(await counter('lamina_prefilled_tokens_total')).toBe(numPrefilled + PROMPT.length);
    const tokens = tokensOf(messages).slice(0, -1);
    const whole = await answer(`whole-${name}`, tokens.length);
    await eventually(() => whole.at(-1)?.finish_reason ?? undefined, 30_000);
    expect(tokens).toEqual(tokensOf(whole));
  },
);
