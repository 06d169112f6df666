/**
 * A running cluster against hostile input: mutated messages on every live subject and the HTTP port, and a model that makes
 * NaN of one prompt. No process ends or grows, and a request that runs beside it gets its undisturbed answer.
 */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { connect as connectSocket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { readHealth } from '@lamina/cli';
import {
  decodeTokens,
  ENDPOINTS,
  EVENTS,
  emptyFrameHeader,
  encodeStepPlan,
  FRAME_HEADER_BYTES,
  FRAME_KIND,
  type FrameHeader,
  packMessage,
  SERVICE_NAMES,
  STREAMS,
  SUBJECTS,
  type TokenMessage,
  writeFrameHeader,
} from '@lamina/protocol';
import { ERROR_CODES } from '@lamina/tensor';
import { writeRandomCheckpoint } from '@lamina/testkit';
import { startNatsServer } from '@lamina/testkit/nats-server';
import { connect, type NatsConnection } from 'nats';
import { afterEach, expect, test } from 'vitest';
import { startTestCluster, type TestCluster, type TestClusterOptions } from '../cluster.ts';
import { mutate, randomOf } from '../mutate.ts';

const IS_LONG = process.env.LAMINA_FUZZ === 'long';
const CASES = IS_LONG ? 10_000 : 200;
const BATCH = 100;
/** Prompts of the fuzzer that are open at a time. */
const OPEN_PROMPTS = 32;
const MAX_GROWTH_BYTES = 96e6;

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

function frame(header: Partial<FrameHeader>, body: Uint8Array): Uint8Array {
  const bytes = new Uint8Array(FRAME_HEADER_BYTES + body.length);
  bytes.set(body, FRAME_HEADER_BYTES);
  writeFrameHeader(bytes, { ...emptyFrameHeader(), bodyBytes: body.length, originId: 77, stepId: 1, ...header });
  return bytes;
}

const SPEC = { numLayers: 2, numHeads: 4, numKvHeads: 2, headDim: 32, scale: 0.25 };
const PLAN = encodeStepPlan({
  numQueryRows: 2,
  numKvRows: 1,
  segments: Int32Array.of(0, 1, 17, 0, 2, 1, 1, 0, 2, 1),
  blocks: Int32Array.of(5, 0, 16, 9, 16, 2),
  kvSlots: Int32Array.of(145),
}).subarray(FRAME_HEADER_BYTES);
const WORK = {
  id: 'w',
  model: 'm',
  tokenIds: [1, 300],
  maxTokens: 10,
  sampling: { temperature: 0, topP: 1, topK: 0, minP: 0, seed: 7 },
  stop: [],
  logprobs: null,
  ignoreEos: false,
  priority: 0,
  deadlineAtMs: null,
  encoding: 'json',
  submittedAtMs: 1_700_000_000_000,
};
const TOKEN = { id: 'beside-0', index: 3, token: 5, text: 'x', finish_reason: null };

/** A message that would be taken, for every subject that somebody listens to. */
function seedsOf(
  shardIds: readonly string[],
  workerId: string,
  statusIds: readonly string[],
): [string, Uint8Array[]][] {
  const bodies: Readonly<Record<keyof typeof ENDPOINTS, object>> = {
    executorHeartbeat: { executorId: 'e1', modelId: 'm', spec: SPEC, originIds: [7] },
    executorLeave: { executorId: 'e1' },
    shardHeartbeat: { shardId: 's1', budgetBytes: 5, kernel: 'k', numBlocks: null, fencedUpTo: 0 },
    shardLeave: { shardId: 's1' },
    suspectShard: { shardId: 's1' },
    allocate: { requestId: 'a', executorId: 'e1', numTokens: 5, maxTokens: 9, deliveryCount: 1 },
    extend: { requestId: 'a', executorId: 'e1', numBlocks: 1, numTokens: 5 },
    trim: { requestId: 'a', executorId: 'e1', numFreedBlocks: 1 },
    free: { requestId: 'a', executorId: 'e1' },
    kvStatus: {},
  };
  const endpoints = Object.entries(ENDPOINTS).map(([name, { subject }]): [string, Uint8Array[]] => {
    const body = Object.entries(bodies).find(([key]) => key === name)?.[1];
    return [subject, [packMessage(body)]];
  });
  const tensors = [
    frame({ kind: FRAME_KIND.plan }, PLAN),
    frame({ kind: FRAME_KIND.attend }, new Uint8Array(64)),
    frame({ kind: FRAME_KIND.partial, layer: 1 }, new Uint8Array(64)),
    frame({ kind: FRAME_KIND.failure }, packMessage({ code: 'internal', message: 'm' })),
  ];
  return [
    ...endpoints,
    [EVENTS.shardLost.subject, [packMessage({ shardId: 's1' })]],
    [EVENTS.capacityFreed.subject, [packMessage({ freeBlocks: 5 })]],
    [SUBJECTS.metrics, [packMessage({})]],
    ...statusIds.map((id): [string, Uint8Array[]] => [SUBJECTS.status(id), [packMessage({})]]),
    [SUBJECTS.cancel('w'), [packMessage({})]],
    [SUBJECTS.cancel('*'), [packMessage({})]],
    [SUBJECTS.work('w'), [packMessage(WORK)]],
    [SUBJECTS.tokens('nobody'), [packMessage(TOKEN), Buffer.from(JSON.stringify(TOKEN))]],
    ...shardIds.map((id): [string, Uint8Array[]] => [SUBJECTS.shardTensors(id), tensors]),
    [SUBJECTS.workerTensors(workerId, 0, 0), tensors],
    [SUBJECTS.workerTensors(workerId, 'x', 99), tensors],
  ];
}

/** A stream confirms there what it takes, whatever the subject; a service must refuse to answer there. */
const REPLIES = [
  '_INBOX.nobody',
  SUBJECTS.work('w'),
  SUBJECTS.tokens('w'),
  SUBJECTS.prompts,
  SUBJECTS.cancel('w'),
  SUBJECTS.metrics,
  ENDPOINTS.free.subject,
  EVENTS.shardLost.subject,
  ...Object.values(STREAMS).flatMap(({ name }) => [
    `$JS.API.STREAM.PURGE.${name}`,
    `$JS.API.STREAM.MSG.DELETE.${name}`,
    `$JS.API.STREAM.UPDATE.${name}`,
    `$JS.API.STREAM.DELETE.${name}`,
  ]),
  '$JS.API.CONSUMER.DELETE.LAMINA_WORK.dense-executors',
  '$JS.API.CONSUMER.MSG.NEXT.LAMINA_WORK.dense-executors',
];

async function flood(
  nats: NatsConnection,
  subject: string,
  seeds: readonly Uint8Array[],
  cases: number,
): Promise<void> {
  const random = randomOf(subject.length);
  for (let done = 0; done < cases; done++) {
    nats.publish(subject, mutate(seeds, random), { reply: REPLIES[done % REPLIES.length]! });
    if (done % BATCH === BATCH - 1) await nats.flush();
  }
  await nats.flush();
}

/** Mutated prompts; those that are taken are cancelled after some tokens. */
async function floodPrompts(nats: NatsConnection, cases: number): Promise<void> {
  const request = { id: 'fuzz', prompt: 'Once upon a time', max_tokens: 5, temperature: 0.5, stop: ['x'], logprobs: 3 };
  const seeds = [Buffer.from(JSON.stringify(request)), packMessage({ ...request, id: 'f2' }), Buffer.from('Once upon')];
  const random = randomOf(7);
  const ask = async (): Promise<void> => {
    for await (const reply of await nats.requestMany(SUBJECTS.generate, mutate(seeds, random), { maxWait: 60_000 })) {
      const [first] = decodeTokens(reply.data);
      if (reply.headers?.get('Lamina-Final') === 'true') return;
      if (first !== undefined) nats.publish(SUBJECTS.cancel(first.id));
    }
    throw new Error('a prompt got no last message');
  };
  let left = cases;
  const worker = async (): Promise<void> => {
    while (left-- > 0) await ask();
  };
  await Promise.all(Array.from({ length: OPEN_PROMPTS }, worker));
}

async function floodHttp(port: number, cases: number): Promise<void> {
  const body = JSON.stringify({ model: 'm', prompt: 'x' });
  const seeds = [
    'GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n',
    'GET /metrics?x=%2e HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n',
    `POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: ${body.length}\r\n\r\n${body}`,
    'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n',
  ].map((text) => Buffer.from(text));
  const random = randomOf(80);
  const send = (): Promise<void> =>
    new Promise((resolve) => {
      const socket = connectSocket(port, '127.0.0.1');
      const end = (): void => {
        socket.destroy();
        resolve();
      };
      // A request that is not complete is waited for by the server; we do not.
      socket.setTimeout(200, end);
      socket
        .on('error', end)
        .on('close', end)
        .on('data', () => undefined);
      socket.end(mutate(seeds, random));
    });
  let left = cases;
  await Promise.all(
    Array.from({ length: 16 }, async () => {
      while (left-- > 0) await send();
    }),
  );
}

function residentBytes(pid: number | undefined): number {
  const status = readFileSync(`/proc/${pid}/status`, 'utf8');
  return 1024 * Number(/VmRSS:\s+(\d+)/.exec(status)?.[1]);
}

test(
  'mutated messages on every subject and the HTTP port end nothing, grow nothing and touch no other request',
  async () => {
    // Without users: what each role could send, the fuzzer sends.
    const server = await startNatsServer();
    cleanUp.push(() => server.stop());
    const { cluster, generate } = await start({
      natsUrl: server.url,
      settings: { denseWorkers: '1', logLevel: 'error', tensorChecksum: 'all' },
    });
    const nats = await connect({ servers: server.url });
    cleanUp.unshift(() => nats.close());
    const request = { prompt: 'Once upon a time, there was a fox.', temperature: 0, max_tokens: 60, ignore_eos: true };
    const expected = textOf(await generate(request));

    const executor = (await cluster.bus.serviceStats(SERVICE_NAMES['dense-executor'], 500))[0]!;
    const { shards } = await cluster.bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 2_000 });
    const statusIds = [executor.id];
    const seeds = seedsOf(
      shards.map(({ shardId }) => shardId),
      `${executor.metadata.instance}-0`,
      statusIds,
    );
    const services = (['gateway', 'kv-manager', 'dense-executor', 'attention-shard'] as const).flatMap((kind) =>
      cluster.processes(kind).map((child) => ({ kind, pid: child.pid })),
    );
    const round = async (cases: number): Promise<void> => {
      for (const [subject, messages] of seeds) await flood(nats, subject, messages, cases);
      await floodPrompts(nats, Math.ceil(cases / 2));
      await floodHttp(Number(new URL(cluster.httpUrl).port), cases);
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
    // Once to warm up: heaps have the size that such a flood gives them. What leaks grows in the second as in the first.
    await round(CASES);
    const before = services.map(({ pid }) => residentBytes(pid));
    await round(CASES);
    isDone = true;
    const texts = await beside;
    expect(texts.length).toBeGreaterThan(1);
    expect([...new Set(texts)]).toEqual([expected]);
    const grown = services.map(({ kind, pid }, index) => ({ kind, bytes: residentBytes(pid) - before[index]! }));
    console.log(
      grown.map(({ kind, bytes }) => `${kind} ${(bytes / 1e6).toFixed(1)} MB`).join(', '),
      `${texts.length} answers, ${numRefused} refused`,
    );
    expect(grown.filter(({ bytes }) => bytes > MAX_GROWTH_BYTES)).toEqual([]);
    // What was refused was counted, and the cluster is as well as before.
    const metrics = await (await fetch(`${cluster.httpUrl}/metrics`)).text();
    expect(metrics).toMatch(/lamina_bus_errors_total\{[^}]*code="protocol_violation"[^}]*\} [1-9]/);
    expect((await readHealth(cluster.httpUrl, 2_000)).isReady).toBe(true);
    expect(textOf(await generate(request))).toBe(expected);
  },
  IS_LONG ? 3_600_000 : 120_000,
);

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
