/**
 * A running cluster against hostile input: mutated messages on every live subject and the HTTP port, and a model that makes
 * NaN of one prompt. No process ends or grows, and a request that runs beside it gets its undisturbed answer.
 */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { ensureStreams, TokenStream } from '@lamina/bus';
import { readHealth } from '@lamina/cli';
import { ENDPOINTS, SERVICE_NAMES, STREAMS, type TokenMessage } from '@lamina/protocol';
import { ERROR_CODES } from '@lamina/tensor';
import { writeRandomCheckpoint } from '@lamina/testkit';
import { startNatsServer } from '@lamina/testkit/nats-server';
import { connect } from 'nats';
import { afterEach, expect, test } from 'vitest';
import { startTestCluster, type TestCluster, type TestClusterOptions } from '../cluster.ts';
import { count, IS_LONG, megabytes, secondsSince, tell } from '../fuzz-report.ts';
import { COLLECTABLE, heldBytesOf } from '../memory/held-memory.ts';
import { growthPercent } from '../memory/trend.ts';
import { flood, floodDurablePrompts, floodHttp, floodPrompts, HTTP_PROMPTS, HTTP_REQUESTS, seedsOf } from './flood.ts';

/** The first warms up: heaps get the size that such a flood gives them. What leaks grows in every one after it. */
const ROUNDS = IS_LONG ? 6 : 2;
const CASES = IS_LONG ? 2_000 : 200;
/** Of what a process holds, from the second flood to the last. */
const MAX_GROWTH_PERCENT = 5;
/** The short floods do not warm up: only a leak of tens of kilobytes a message shows. */
const MAX_SHORT_GROWTH_BYTES = 48e6;
/** In which all durable prompts are answered when the flood is over. */
const ANSWER_MS = IS_LONG ? 600_000 : 30_000;

let tested: TestCluster | undefined;
const cleanUp: (() => Promise<void> | void)[] = [];
afterEach(async ({ task }) => {
  if (task.result?.state === 'fail' && tested !== undefined) console.log(tested.logs());
  await tested?.stop();
  tested = undefined;
  for (const each of cleanUp.splice(0).reverse()) await each();
});

async function start(options: TestClusterOptions): Promise<TestCluster> {
  tested = await startTestCluster(options);
  return tested;
}

const textOf = (messages: readonly TokenMessage[]): string => messages.map(({ text }) => text).join('');

test(
  'mutated messages on every subject and the HTTP port end nothing, grow nothing and touch no other request',
  async () => {
    // Without users: what each role could send, the fuzzer sends.
    const server = await startNatsServer();
    cleanUp.push(() => server.stop());
    const { cluster, generate } = await start({
      natsUrl: server.url,
      settings: { denseWorkers: '1', logLevel: 'error', tensorChecksum: 'all' },
      environment: { NODE_OPTIONS: COLLECTABLE },
    });
    const nats = await connect({ servers: server.url });
    cleanUp.unshift(() => nats.close());
    const request = { prompt: 'Once upon a time, there was a fox.', temperature: 0, max_tokens: 60, ignore_eos: true };
    const expected = textOf(await generate(request));

    const executor = (await cluster.bus.serviceStats(SERVICE_NAMES['dense-executor'], 500))[0]!;
    const { shards } = await cluster.bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 2_000 });
    const announced = await Promise.all(
      Object.values(SERVICE_NAMES).map((name) => cluster.bus.serviceStats(name, 500)),
    );
    const work = await (await nats.jetstreamManager()).streams.info(STREAMS.work.name);
    const seeds = seedsOf({
      workKey: work.config.subjects[0]!.split('.').at(-2)!,
      shardIds: shards.map(({ shardId }) => shardId),
      workerId: `${executor.metadata.instance}-0`,
      statusIds: announced.flat().map(({ id }) => id),
    });
    const httpPort = Number(new URL(cluster.httpUrl).port);
    const durableIds = new Set<string>();
    const services = (['gateway', 'kv-manager', 'dense-executor', 'attention-shard'] as const).flatMap((kind) =>
      cluster.processes(kind).map((child) => ({ kind, pid: child.pid ?? Number.NaN })),
    );
    const timed = async (cases: number, what: string, sent: Promise<unknown>): Promise<void> => {
      const startedMs = performance.now();
      await sent;
      tell(`${count(cases)} ${what}: ${secondsSince(startedMs)}`);
    };
    const round = async (cases: number): Promise<void> => {
      for (const [subject, messages] of seeds)
        await timed(cases, `messages on ${subject}`, flood(nats, subject, messages, cases));
      const numPrompts = Math.ceil(cases / 2);
      await timed(numPrompts, 'prompts', floodPrompts(nats, numPrompts));
      const durable = floodDurablePrompts(nats, cases);
      await timed(cases, 'durable prompts', durable);
      for (const id of await durable) durableIds.add(id);
      await timed(cases, 'HTTP requests for answers', floodHttp(httpPort, HTTP_PROMPTS, cases));
      await timed(cases, 'HTTP requests about requests', floodHttp(httpPort, HTTP_REQUESTS, cases));
    };

    let isDone = false;
    let numRefused = 0;
    const beside: Promise<string[]> = (async () => {
      const texts: string[] = [];
      while (!isDone) {
        const messages = await generate(request);
        const error = messages.at(-1)?.error;
        // A flood that fills the queue has prompts refused at once; what was begun must be finished.
        if (messages.length === 1 && error !== undefined && ERROR_CODES[error.code].retryable) {
          numRefused++;
          await new Promise((resolve) => setTimeout(resolve, 100));
        } else texts.push(error?.message ?? textOf(messages));
      }
      return texts;
    })();
    const held: Map<number, number>[] = [];
    for (let i = 0; i < ROUNDS; i++) {
      await round(CASES);
      held.push(await heldBytesOf(services.map(({ pid }) => pid)));
    }
    isDone = true;
    const texts = await beside;
    expect(texts.length).toBeGreaterThan(1);
    expect([...new Set(texts)]).toEqual([expected]);
    const memory = services.map(({ kind, pid }) => ({ kind, bytes: held.map((each) => each.get(pid) ?? Number.NaN) }));
    tell(`${texts.length} answers, ${numRefused} refused; memory held after each flood:`);
    for (const { kind, bytes } of memory) tell(`${kind} ${bytes.map(megabytes).join(', ')}`);
    expect(memory.filter(({ bytes }) => !isFlat(bytes))).toEqual([]);
    await expectAnswers(cluster.bus, durableIds);
    // What was refused was counted, and the cluster is as well as before.
    const metrics = await (await fetch(`${cluster.httpUrl}/metrics`)).text();
    expect(metrics).toMatch(/lamina_bus_errors_total\{[^}]*code="protocol_violation"[^}]*\} [1-9]/);
    expect((await readHealth(cluster.httpUrl, 2_000)).isReady).toBe(true);
    expect(textOf(await generate(request))).toBe(expected);
  },
  IS_LONG ? 3_600_000 : 120_000,
);

/** @param bytes that a process holds after each flood */
function isFlat(bytes: readonly number[]): boolean {
  if (!IS_LONG) return bytes.at(-1)! - bytes[0]! < MAX_SHORT_GROWTH_BYTES;
  return growthPercent(bytes.slice(1).map((value, atMs) => ({ atMs, value }))) < MAX_GROWTH_PERCENT;
}

/** Every durable prompt that the server took has a whole answer, whatever it is, and none is left in the stream. */
async function expectAnswers(bus: TestCluster['cluster']['bus'], ids: ReadonlySet<string>): Promise<void> {
  await ensureStreams(bus);
  const tokens = new TokenStream(bus, () => undefined);
  expect(ids.size).toBeGreaterThan(CASES / 10);
  const unanswered = new Set(ids);
  for (const untilMs = performance.now() + ANSWER_MS; unanswered.size > 0 && performance.now() < untilMs; ) {
    for (const id of unanswered) if ((await tokens.endOf(id))?.isComplete === true) unanswered.delete(id);
    if (unanswered.size > 0) await new Promise((resolve) => setTimeout(resolve, 500));
  }
  expect([...unanswered]).toEqual([]);
  const manager = await bus.connection.jetstreamManager();
  expect((await manager.streams.info(STREAMS.prompts.name)).state.messages).toBe(0);
}

/**
 * Makes the keys of one token infinite, and so its attention NaN: its embedding alone has something in a dimension that the
 * first layer's keys take 3e38 times. NaN in the weights themselves is refused when a model is built.
 */
function poison(modelDir: string, token: number, hiddenSize: number): void {
  const path = join(modelDir, 'model.safetensors');
  const bytes = readFileSync(path);
  const headerBytes = Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.subarray(8, 8 + headerBytes).toString('utf8'));
  const setColumn = (name: string, numberOf: (row: number) => number): void => {
    const { shape, data_offsets: offsets } = header[name];
    for (let row = 0; row < shape[0]; row++)
      bytes.writeFloatLE(numberOf(row), 8 + headerBytes + offsets[0] + 4 * (row * hiddenSize + 3));
  };
  setColumn('model.embed_tokens.weight', (row) => (row === token ? 10 : 0));
  setColumn('model.layers.0.self_attn.k_proj.weight', () => 3e38);
  writeFileSync(path, bytes);
}

test.each(['native', 'portable'])(
  'a prompt that becomes NaN fails alone, and leaves nothing behind in its blocks (%s kernel)',
  async (attentionKernel) => {
    const modelDir = mkdtempSync(join(tmpdir(), 'lamina-nan-'));
    cleanUp.push(() => rmSync(modelDir, { recursive: true, force: true }));
    const { hiddenSize, numLayers, numKvHeads, headDim } = await writeRandomCheckpoint(modelDir, {});
    poison(modelDir, 'Z'.charCodeAt(0), hiddenSize);
    // 16 blocks of 8 tokens on each shard: all are used again and again.
    const kvBudgetBytes = String(16 * 8 * numLayers * 2 * numKvHeads * headDim * 4);
    const { cluster, generate } = await start({
      model: modelDir,
      settings: { attentionKernel, kvBudgetBytes, kvDtype: 'f32', blockSizeTokens: '8', spreadAboveTokens: '0' },
    });
    const good = (index: number): object => ({
      prompt: `hello ${index}`,
      temperature: 0,
      max_tokens: 24,
      ignore_eos: true,
    });
    const bad = {
      prompt: 'hello Z, how are you?',
      temperature: 0,
      max_tokens: 24,
      ignore_eos: true,
    };
    const expected = [textOf(await generate(good(0))), textOf(await generate(good(1)))];
    for (let round = 0; round < 8; round++) {
      const [failed, ...answers] = await Promise.all([generate(bad), generate(good(0)), generate(good(1))]);
      expect(failed?.at(-1)).toMatchObject({ finish_reason: 'error', error: { code: 'numeric_error' } });
      expect(answers.map(textOf)).toEqual(expected);
    }
    const { numRequests } = await cluster.bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 2_000 });
    expect(numRequests).toBe(0);
  },
  60_000,
);
