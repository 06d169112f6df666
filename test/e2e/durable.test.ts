/**
 * Durable prompts on real processes: what the server acknowledged is answered as by the uncut graph, each token once,
 * though gateways are killed and nothing ran when the prompts came.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Bus, ensureStreams, TokenStream } from '@lamina/bus';
import { ROOT_DIRECTORY } from '@lamina/cli';
import { buildModel, loadTokenizer } from '@lamina/model';
import { decodeTokens, STREAMS, SUBJECTS } from '@lamina/protocol';
import { UncutReference } from '@lamina/testkit';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { beforeAll, beforeEach, expect, onTestFinished, test } from 'vitest';
import { startForTest, TEST_CACHE_DIRECTORY, type TestCluster } from '../cluster.ts';

const MODEL = join(ROOT_DIRECTORY, 'models', 'lamina-tiny');
const NUM_PROMPTS = 24;
const NUM_TOKENS = 60;
const SETTINGS = {
  heartbeatIntervalMs: '100',
  heartbeatTimeoutMs: '600',
  requestTimeoutMs: '1000',
  kvDtype: 'f32',
  denseWorkers: '1',
  logLevel: 'warn',
} as const;

const promptOf = (index: number): string => `Once upon a time there was a dog. ${'It ran. '.repeat(index % 6)}`;
const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

let expected: number[][];
let storeDir: string;
let nats: NatsServer;
let bus: Bus;

beforeAll(async () => {
  const tokenizer = await loadTokenizer(MODEL);
  const reference = await UncutReference.load(await buildModel(MODEL, { cacheDir: TEST_CACHE_DIRECTORY }));
  expected = [];
  for (let index = 0; index < 6; index++) {
    const answer = await reference.greedy(tokenizer.encode(promptOf(index)), NUM_TOKENS, { ignoreEos: true });
    expected.push(answer.tokenIds);
  }
  await reference.release();
}, 60_000);
beforeEach(async () => {
  storeDir = mkdtempSync(join(tmpdir(), 'lamina-store-'));
  onTestFinished(() => rmSync(storeDir, { recursive: true, force: true }));
  nats = await startNatsServer({ storeDir });
  // Whichever there is by then.
  onTestFinished(() => nats.stop());
  await connect();
  onTestFinished(async () => void (await bus.close()));
});

async function connect(): Promise<void> {
  bus = await Bus.connect({ url: nats.url, name: 'test', connectTimeoutMs: 5_000 }, { onError: () => undefined });
  await ensureStreams(bus);
}

const start = (): Promise<TestCluster> =>
  startForTest({ natsUrl: nats.url, onExit: () => undefined, settings: SETTINGS });

/** Publishes one prompt and returns its id, from nothing but the acknowledgement. */
async function publish(index: number): Promise<string> {
  const body = { prompt: promptOf(index), temperature: 0, max_tokens: NUM_TOKENS, ignore_eos: true };
  const { seq } = await bus.connection.jetstream().publish(SUBJECTS.prompts, Buffer.from(JSON.stringify(body)));
  return `p${seq}`;
}

/** Every message of every answer is as it must be: equal to the uncut graph, each index once. */
async function expectAllAnswered(ids: readonly string[]): Promise<void> {
  const stream = new TokenStream(bus, () => undefined);
  const deadlineMs = performance.now() + 60_000;
  for (const [index, id] of ids.entries()) {
    while (!(await stream.endOf(id))?.isComplete) {
      if (performance.now() > deadlineMs) throw new Error(`${id} has no end`);
      await sleep(50);
    }
    const indices: number[] = [];
    const tokens: (number | null)[] = [];
    let isEnded = false;
    const reading = await stream.replay(id, (data, isFinal) => {
      for (const message of decodeTokens(data)) {
        indices.push(message.index);
        tokens.push(message.token);
      }
      isEnded ||= isFinal;
    });
    while (!isEnded) await sleep(5);
    await sleep(20);
    reading.unsubscribe();
    expect(tokens, id).toEqual(expected[index % 6]);
    expect(indices, id).toEqual(tokens.map((_, position) => position));
  }
  const manager = await bus.connection.jetstreamManager();
  for (const name of [STREAMS.prompts.name, STREAMS.work.name]) {
    while ((await manager.streams.info(name)).state.messages > 0) {
      if (performance.now() > deadlineMs) throw new Error(`${name} is not empty`);
      await sleep(50);
    }
  }
}

test('published while nothing ran, and nats-server was restarted before anything did', async () => {
  const ids: string[] = [];
  for (let index = 0; index < NUM_PROMPTS; index++) ids.push(await publish(index));
  await bus.close();
  await nats.kill();
  nats = await startNatsServer({ storeDir, port: nats.port });
  await connect();
  await start();
  await expectAllAnswered(ids);
}, 120_000);

test('while the only gateway is killed again and again', async () => {
  const { cluster } = await start();
  const ids: string[] = [];
  for (let index = 0; index < NUM_PROMPTS; index++) {
    ids.push(await publish(index));
    if (index % 6 === 3) {
      await sleep(index);
      cluster.processes('gateway').at(-1)!.kill('SIGKILL');
      await cluster.add('gateway');
    }
  }
  await expectAllAnswered(ids);
}, 120_000);

test('while every process is killed in the middle', async () => {
  const first = await start();
  const ids: string[] = [];
  for (let index = 0; index < NUM_PROMPTS; index++) ids.push(await publish(index));
  await sleep(300);
  for (const service of ['gateway', 'dense-executor', 'attention-shard', 'kv-manager'] as const)
    for (const child of first.cluster.processes(service)) child.kill('SIGKILL');
  await nats.kill();
  nats = await startNatsServer({ storeDir, port: nats.port });
  await first.stop();
  await bus.close();
  await connect();
  await start();
  await expectAllAnswered(ids);
}, 120_000);
