/**
 * Real processes that die, stall and come back under load: every answer is that of the uncut graph, each token once, and
 * everybody who asked is told how it ended.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { TokenStream } from '@lamina/bus';
import { ROOT_DIRECTORY, readHealth, type ServiceSettings } from '@lamina/cli';
import { buildModel, loadTokenizer, type Tokenizer } from '@lamina/model';
import { ENDPOINTS, type KvStatus, SUBJECTS, type TokenMessage } from '@lamina/protocol';
import { UncutReference } from '@lamina/testkit';
import { startNatsServer } from '@lamina/testkit/nats-server';
import { afterAll, beforeAll, expect, onTestFinished, test } from 'vitest';
import { startForTest, TEST_CACHE_DIRECTORY, type TestCluster, type TestClusterOptions } from '../cluster.ts';

const MODEL = join(ROOT_DIRECTORY, 'models', 'lamina-tiny');
const PROMPT = 'Once upon a time, there was a little girl named Lily.';
const NUM_REQUESTS = 8;
const NUM_TOKENS = 200;
const FAST: ServiceSettings = {
  heartbeatIntervalMs: '100',
  heartbeatTimeoutMs: '600',
  gatherTimeoutMs: '1000',
  requestTimeoutMs: '1000',
  kvDtype: 'f32',
  denseWorkers: '1',
  logLevel: 'warn',
};

let tokenizer: Tokenizer;
let reference: UncutReference;
let tested: TestCluster;

beforeAll(async () => {
  tokenizer = await loadTokenizer(MODEL);
  reference = await UncutReference.load(await buildModel(MODEL, { cacheDir: TEST_CACHE_DIRECTORY }));
}, 60_000);
afterAll(() => reference.release());

async function start(options: TestClusterOptions = {}): Promise<void> {
  tested = await startForTest({ onExit: () => undefined, ...options, settings: { ...FAST, ...options.settings } });
}

const promptOf = (index: number): string => `${PROMPT} ${'Tom. '.repeat(index)}`;

const expectedOf = new Map<string, Promise<number[]>>();
function expected(index: number, numTokens: number): Promise<number[]> {
  const key = `${index}/${numTokens}`;
  const known = expectedOf.get(key);
  if (known !== undefined) return known;
  const computed = reference
    .greedy(tokenizer.encode(promptOf(index)), numTokens, { ignoreEos: true })
    .then(({ tokenIds }) => tokenIds);
  expectedOf.set(key, computed);
  return computed;
}

function ask(
  index: number,
  options: { id?: string; maxTokens?: number } = {},
  onToken?: (message: TokenMessage) => void,
): Promise<TokenMessage[]> {
  const { id, maxTokens = NUM_TOKENS } = options;
  return tested.generate(
    {
      prompt: promptOf(index),
      temperature: 0,
      max_tokens: maxTokens,
      ignore_eos: true,
      ...(id !== undefined && { id }),
    },
    onToken,
  );
}

/** Complete, right, and each token once. */
async function expectRight(answers: readonly TokenMessage[][], numTokens = NUM_TOKENS): Promise<void> {
  for (const [index, messages] of answers.entries()) {
    const last = messages.at(-1);
    expect([last?.finish_reason, last?.error], `request ${index}`).toEqual(['length', undefined]);
    expect(messages.map((message) => message.index)).toEqual(messages.map((_, position) => position));
    expect(messages.map(({ token }) => token)).toEqual(await expected(index, numTokens));
  }
}

/** Starts one request of each index; the second promise resolves when every one of them has tokens. */
function askAll(idOf?: (index: number) => string): { answers: Promise<TokenMessage[][]>; begun: Promise<unknown> } {
  const begun: Promise<void>[] = [];
  const answers = Array.from({ length: NUM_REQUESTS }, (_, index) => {
    let onBegun = (): void => undefined;
    begun.push(new Promise((resolve) => (onBegun = resolve)));
    return ask(index, idOf === undefined ? {} : { id: idOf(index) }, (message) => {
      if (message.index === 20) onBegun();
    });
  });
  return { answers: Promise.all(answers), begun: Promise.all(begun) };
}

const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

async function nothingLeft(): Promise<void> {
  const deadlineMs = performance.now() + 5_000;
  for (;;) {
    const status: KvStatus = await tested.cluster.bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 2_000 });
    const isFree = status.numRequests === 0 && status.shards.every((shard) => shard.usedBlocks === 0);
    if (isFree) return;
    if (performance.now() > deadlineMs) expect(status).toBe('free of KV');
    await sleep(50);
  }
}

test('an executor that is killed leaves its requests to another', async () => {
  await start({ denseExecutors: 2, settings: { maxRunningRequests: '4' } });
  const { answers, begun } = askAll();
  await begun;
  tested.cluster.processes('dense-executor')[0]!.kill('SIGKILL');
  await expectRight(await answers);
  await nothingLeft();
}, 60_000);

test('a request that is cancelled after its executor died gets a final message', async () => {
  await start();
  const cancel = (message: TokenMessage): void => {
    if (message.index !== 20) return;
    tested.cluster.processes('dense-executor')[0]!.kill('SIGKILL');
    setTimeout(() => tested.cluster.bus.publish(SUBJECTS.cancel('orphan'), new Uint8Array()), 300);
  };
  const messages = await ask(0, { id: 'orphan', maxTokens: 900 }, cancel);
  const last = messages.at(-1);
  expect(last).toMatchObject({ token: null, finish_reason: 'cancelled', index: messages.length - 1 });
  // Nobody computes it any more.
  await tested.cluster.add('dense-executor');
  while (!(await readHealth(tested.cluster.httpUrl, 1_000)).isReady) await sleep(50);
  await expectRight([await ask(0)]);
  await nothingLeft();
}, 60_000);

test("an executor that is stalled writes into nobody else's KV, and everybody ends", async () => {
  // Room for about eight of the sixteen: what the stalled one held is given to others at once.
  await start({ denseExecutors: 2, settings: { maxRunningRequests: '4', kvBudgetBytes: String(60 * 16 * 3072) } });
  const { answers, begun } = askAll();
  await begun;
  const stalled = tested.cluster.processes('dense-executor')[0]!;
  stalled.kill('SIGSTOP');
  const second = askAll();
  await sleep(3_000);
  stalled.kill('SIGCONT');
  await expectRight(await answers);
  await expectRight(await second.answers);
  await nothingLeft();
}, 60_000);

test('a kv-manager that is killed costs a prefill', async () => {
  await start();
  const { answers, begun } = askAll();
  await begun;
  tested.cluster.processes('kv-manager')[0]!.kill('SIGKILL');
  await sleep(300);
  await tested.cluster.add('kv-manager');
  await expectRight(await answers);
  await nothingLeft();
}, 60_000);

test('a nats-server that is killed and comes back loses no token', async () => {
  const storeDir = mkdtempSync(join(tmpdir(), 'lamina-store-'));
  onTestFinished(() => rmSync(storeDir, { recursive: true, force: true }));
  let nats = await startNatsServer({ storeDir });
  onTestFinished(() => nats.stop());
  await start({ natsUrl: nats.url });
  const stream = new TokenStream(tested.cluster.bus, () => undefined);
  for (const downMs of [0, 1_500]) {
    const idOf = (index: number): string => `down-${downMs}-${index}`;
    const { answers, begun } = askAll(idOf);
    await begun;
    await nats.kill();
    await sleep(downMs);
    nats = await startNatsServer({ storeDir, port: nats.port });
    for (const [index, messages] of (await answers).entries()) {
      expect(messages.at(-1)).toMatchObject({ finish_reason: 'length', index: NUM_TOKENS - 1 });
      // What the gateway had on its way to a client is lost with the server; the stream has everything.
      const tokens = await expected(index, NUM_TOKENS);
      for (const [at, message] of messages.entries()) {
        expect(message.token).toBe(tokens[message.index]);
        expect(message.index).toBeGreaterThan(messages[at - 1]?.index ?? -1);
      }
      const { tokens: stored } = await stream.stored(idOf(index));
      expect(stored.map(({ token }) => token)).toEqual(tokens);
    }
  }
  await nothingLeft();
}, 60_000);

test.each(['SIGKILL', 'SIGSTOP'] as const)(
  'a shard that gets a %s is noticed within a second, long before its heartbeats are missed, and no request fails',
  async (signal) => {
    const slowHeartbeats: ServiceSettings = { heartbeatIntervalMs: '1000', heartbeatTimeoutMs: '20000' };
    await start({
      attentionShards: 3,
      settings: { spreadAboveTokens: '32', gatherTimeoutMs: '20000', ...slowHeartbeats },
    });
    let endedAtMs = Number.POSITIVE_INFINITY;
    const gapsMs: number[] = [];
    const { answers, begun } = askAll();
    const watched = ask(NUM_REQUESTS, {}, () => {
      if (endedAtMs < performance.now()) gapsMs.push(performance.now() - endedAtMs);
    });
    await begun;
    const shard = tested.cluster.processes('attention-shard')[0]!;
    shard.kill(signal);
    endedAtMs = performance.now();
    await expectRight([...(await answers), await watched]);
    // Some tokens of steps that needed nothing of it may still have come; then there was a gap, and it was short.
    const longestGapMs = gapsMs.reduce((longest, at, i) => Math.max(longest, at - (gapsMs[i - 1] ?? 0)), 0);
    console.log(`${signal}: the longest pause of one request was ${longestGapMs.toFixed(0)} ms`);
    expect(longestGapMs).toBeLessThan(3_000);
    if (signal === 'SIGSTOP') shard.kill('SIGCONT');
    await nothingLeft();
  },
  60_000,
);

test('requests of two executors take turns when they outgrow the KV cache, again and again', async () => {
  // Twice 6 blocks of 16 tokens, 3,072 bytes per token: one request of 140 tokens fits, four at once do not.
  await start({ denseExecutors: 2, settings: { kvBudgetBytes: String(6 * 16 * 3072), maxRunningRequests: '2' } });
  for (let round = 0; round < 5; round++) {
    const answers = await Promise.all(Array.from({ length: 4 }, (_, index) => ask(index, { maxTokens: 120 })));
    await expectRight(answers, 120);
  }
  await nothingLeft();
}, 60_000);
