/** The tensor plane of a real attention-shard over a real nats-server, against attention in float64. */
import type { Bus } from '@lamina/bus';
import {
  ENDPOINTS,
  emptyFrameHeader,
  encodeStepPlan,
  FRAME_HEADER_BYTES,
  FRAME_KIND,
  FrameAssembler,
  type FrameHeader,
  readFrameHeader,
  SUBJECTS,
  splitFrame,
  unpackMessage,
  writeFrameHeader,
} from '@lamina/protocol';
import { type AttentionSpec, attendBytes, BLOCK_FIELDS, blockBytes, partialBytes, type StepPlan } from '@lamina/tensor';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { afterAll, afterEach, beforeAll, beforeEach, expect, test, vi } from 'vitest';
import { startAttentionShard } from '../../services/attention-shard/src/service.ts';
import { TensorPlane } from '../../services/attention-shard/src/tensor-plane.ts';
import { startKvManager } from '../../services/kv-manager/src/service.ts';
import { connect, eventually, type InProcessService, startInProcess } from './in-process.ts';

const SPEC: AttentionSpec = { numLayers: 2, numHeads: 4, numKvHeads: 2, headDim: 32, scale: 0.2 };
const WIRE = { ...SPEC, kvDtype: 'f32' } as const;
const BLOCK = 16;
const BLOCK_BYTES = blockBytes({ ...SPEC, blockSizeTokens: BLOCK, kvDtype: 'f32' });
const MAX_PAYLOAD_BYTES = 8192;
const ORIGIN = 77;
const REPLY = SUBJECTS.workerTensors('test-worker', 0, 0);
/** fp32 KV: only the order of the sums differs from the oracle. */
const TOLERANCE = 1e-5;

let nats: NatsServer;
let bus: Bus;
let manager: InProcessService;
let shard: InProcessService;
let shardId: string;
let answers: { header: FrameHeader; body: Uint8Array; numFrames: number }[];

beforeAll(async () => {
  nats = await startNatsServer({ maxPayloadBytes: MAX_PAYLOAD_BYTES });
});
afterAll(() => nats.stop());

beforeEach(async () => {
  bus = await connect(nats.url);
  manager = await startInProcess('kv-manager', startKvManager, nats.url, ['--kv-dtype', 'f32']);
  const flags = ['--kv-budget-bytes', String(8 * BLOCK_BYTES)];
  shard = await startInProcess('attention-shard', startAttentionShard, nats.url, flags);
  const first = { executorId: 'e1', modelId: 'm', spec: SPEC, originIds: [ORIGIN] };
  await bus.request(ENDPOINTS.executorHeartbeat, first, { timeoutMs: 1000 });
  shardId = await eventually(async () => {
    const { shards } = await bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 1000 });
    return shards.find((entry) => entry.numBlocks === 8)?.shardId;
  });
  answers = [];
  const assembler = new FrameAssembler();
  let numFrames = 0;
  bus.subscribe(REPLY, ({ data }) => {
    const header = emptyFrameHeader();
    readFrameHeader(data, header);
    numFrames++;
    const body = assembler.push(data, header);
    if (body === undefined) return;
    answers.push({ header, body: new Uint8Array(body), numFrames });
    numFrames = 0;
  });
  await bus.flush();
});
afterEach(async () => {
  await shard.stop();
  await manager.stop();
  await bus.close();
});

function headerOf(overrides: Partial<FrameHeader> = {}): FrameHeader {
  return { ...emptyFrameHeader(), originId: ORIGIN, waveIndex: 1, stepId: 5, shardIndex: 3, ...overrides };
}

function sendPlan(plan: StepPlan, overrides: Partial<FrameHeader> = {}): void {
  const message = encodeStepPlan(plan);
  const header = headerOf({ kind: FRAME_KIND.plan, bodyBytes: message.length - FRAME_HEADER_BYTES, ...overrides });
  writeFrameHeader(message, header);
  for (const frame of splitFrame(message, header, bus.maxPayloadBytes))
    bus.publish(SUBJECTS.shardTensors(shardId), frame, REPLY);
}

function sendLayer(layer: number, qkv: Float32Array, overrides: Partial<FrameHeader> = {}): void {
  const header = headerOf({ kind: FRAME_KIND.attend, layer, bodyBytes: qkv.byteLength, ...overrides });
  const message = new Uint8Array(FRAME_HEADER_BYTES + qkv.byteLength);
  writeFrameHeader(message, header);
  message.set(new Uint8Array(qkv.buffer), FRAME_HEADER_BYTES);
  for (const frame of splitFrame(message, header, bus.maxPayloadBytes))
    bus.publish(SUBJECTS.shardTensors(shardId), frame);
}

async function answer(index: number): Promise<(typeof answers)[number]> {
  return eventually(() => answers[index]);
}

async function failure(index: number): Promise<{ code: unknown; message: unknown; header: FrameHeader }> {
  const { header, body } = await answer(index);
  expect(header.kind).toBe(FRAME_KIND.failure);
  const value = unpackMessage(body);
  if (typeof value !== 'object' || value === null || !('code' in value) || !('message' in value))
    throw new Error('no failure body');
  return { code: value.code, message: value.message, header };
}

/** `numTokens` of a new request, all in one chunk, in the given blocks. */
function prefillPlan(numTokens: number, blockIds: readonly number[]): StepPlan {
  const blocks = blockIds.flatMap((block, i) => [block, i * BLOCK, Math.min(BLOCK, numTokens - i * BLOCK)]);
  const kvSlots = Array.from({ length: numTokens }, (_, t) => blockIds[Math.floor(t / BLOCK)]! * BLOCK + (t % BLOCK));
  return {
    numQueryRows: numTokens,
    numKvRows: numTokens,
    segments: Int32Array.of(0, numTokens, 0, 0, blocks.length / BLOCK_FIELDS),
    blocks: Int32Array.from(blocks),
    kvSlots: Int32Array.from(kvSlots),
  };
}

let seed = 1;
function randomTensor(length: number): Float32Array {
  return Float32Array.from({ length }, () => {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
    return seed / 2 ** 31 - 1;
  });
}

function randomLayer(plan: StepPlan): Float32Array {
  return randomTensor(attendBytes(plan, WIRE) / 4);
}

/** Causal attention of the last chunk over itself and the ones before it of the same request, in float64: o, then lse. */
function oracle(
  chunks: readonly { qkv: Float32Array; numTokens: number }[],
  spec: AttentionSpec = SPEC,
  layer = 0,
): Float64Array {
  const { numHeads, numKvHeads, headDim, scale, softcap, alibiSlopes } = spec;
  const windowTokens = spec.windowTokens?.[layer] || Number.POSITIVE_INFINITY;
  const keys: { k: Float32Array; v: Float32Array }[] = [];
  for (const { qkv, numTokens } of chunks) {
    const kStart = numTokens * numHeads * headDim;
    const vStart = kStart + numTokens * numKvHeads * headDim;
    const rowSize = numKvHeads * headDim;
    for (let t = 0; t < numTokens; t++)
      keys.push({
        k: qkv.subarray(kStart + t * rowSize, kStart + (t + 1) * rowSize),
        v: qkv.subarray(vStart + t * rowSize, vStart + (t + 1) * rowSize),
      });
  }
  const { qkv, numTokens } = chunks.at(-1)!;
  const firstPosition = keys.length - numTokens;
  const out = new Float64Array(numTokens * numHeads * (headDim + 1));
  for (let row = 0; row < numTokens; row++)
    for (let head = 0; head < numHeads; head++) {
      const kvHead = Math.floor((head * numKvHeads) / numHeads);
      const cell = row * numHeads + head;
      const queryPosition = firstPosition + row;
      const firstSeen = Math.max(0, queryPosition - windowTokens + 1);
      const seen = keys.slice(firstSeen, queryPosition + 1);
      const scores = seen.map(({ k }, i) => {
        let dot = 0;
        for (let d = 0; d < headDim; d++) dot += qkv[cell * headDim + d]! * k[kvHead * headDim + d]!;
        const score = softcap === undefined ? dot * scale : softcap * Math.tanh((dot * scale) / softcap);
        return score + (alibiSlopes?.[head] ?? 0) * (firstSeen + i - queryPosition);
      });
      const maximum = Math.max(...scores);
      const sum = scores.reduce((total, score) => total + Math.exp(score - maximum), 0);
      for (const [t, score] of scores.entries()) {
        const weight = Math.exp(score - maximum) / sum;
        for (let d = 0; d < headDim; d++) out[cell * headDim + d]! += weight * seen[t]!.v[kvHead * headDim + d]!;
      }
      out[numTokens * numHeads * headDim + cell] = maximum + Math.log(sum);
    }
  return out;
}

function expectClose(body: Uint8Array, expected: Float64Array): void {
  const actual = new Float32Array(new Uint8Array(body).buffer);
  expect(actual.length).toBe(expected.length);
  let worst = 0;
  for (let i = 0; i < expected.length; i++) worst = Math.max(worst, Math.abs(actual[i]! - expected[i]!));
  expect(worst).toBeLessThan(TOLERANCE);
}

test('a prefill chunk and a decode step equal float64 attention, in every layer', async () => {
  const prompt = prefillPlan(5, [6]);
  const layers = [randomLayer(prompt), randomLayer(prompt)];
  sendPlan(prompt);
  for (const [layer, qkv] of layers.entries()) {
    sendLayer(layer, qkv);
    const { header, body } = await answer(layer);
    expect(header).toEqual(headerOf({ kind: FRAME_KIND.partial, layer, bodyBytes: partialBytes(5, WIRE) }));
    expectClose(body, oracle([{ qkv, numTokens: 5 }]));
  }
  const decode: StepPlan = {
    numQueryRows: 1,
    numKvRows: 1,
    segments: Int32Array.of(0, 1, 5, 0, 1),
    blocks: Int32Array.of(6, 0, 6),
    kvSlots: Int32Array.of(6 * BLOCK + 5),
  };
  sendPlan(decode, { stepId: 6 });
  for (const [layer, past] of layers.entries()) {
    const qkv = randomLayer(decode);
    sendLayer(layer, qkv, { stepId: 6 });
    const { body } = await answer(2 + layer);
    expectClose(
      body,
      oracle([
        { qkv: past, numTokens: 5 },
        { qkv, numTokens: 1 },
      ]),
    );
  }
  const metrics = await shard.context.registry.metrics();
  expect(metrics).toContain('lamina_shard_attends_total 4');
  expect(metrics).toContain('lamina_shard_query_rows_total 12');
  expect(metrics).toContain('lamina_shard_kv_tokens_read_total 22');
  expect(metrics).toContain('lamina_shard_queue_depth 0');
  expect(shard.running.stats?.()).toMatchObject({ numBlocks: 8, attends: 4, tokensAttended: 22, bytesRead: 22 * 512 });
});

test('messages above max_payload travel in parts, both ways, two waves at a time', async () => {
  const plans = [prefillPlan(40, [0, 1, 2]), prefillPlan(37, [5, 3, 4])];
  for (const [waveIndex, plan] of plans.entries()) sendPlan(plan, { waveIndex });
  const layers = plans.map(randomLayer);
  for (const [waveIndex, qkv] of layers.entries()) sendLayer(0, qkv, { waveIndex });
  await answer(1);
  for (const { header, body, numFrames } of answers) {
    expect(numFrames).toBeGreaterThan(1);
    expectClose(body, oracle([{ qkv: layers[header.waveIndex]!, numTokens: plans[header.waveIndex]!.numQueryRows }]));
  }
});

test('a plan above max_payload travels in parts', async () => {
  // Every block of the request 200 times over: 9 kB of references, most of them to blocks without a token.
  const empty = Array.from({ length: 800 }, (_, i) => [7, (i + 1) * BLOCK, 0]).flat();
  const plan: StepPlan = {
    ...prefillPlan(3, [2]),
    segments: Int32Array.of(0, 3, 0, 0, 801),
    blocks: Int32Array.from([2, 0, 3, ...empty]),
  };
  sendPlan(plan);
  const qkv = randomLayer(plan);
  sendLayer(0, qkv);
  expectClose((await answer(0)).body, oracle([{ qkv, numTokens: 3 }]));
});

test('bad frames are answered with a failure that echoes their header, and the shard goes on', async () => {
  const plan = prefillPlan(5, [0]);
  const qkv = randomLayer(plan);
  const subject = SUBJECTS.shardTensors(shardId);
  bus.publish(subject, new Uint8Array(3));
  bus.publish(subject, new Uint8Array(100).fill(255), REPLY);
  expect(await failure(0)).toMatchObject({
    code: 'protocol_violation',
    message: expect.stringContaining('not a Lamina'),
  });
  sendLayer(0, qkv);
  sendPlan({ ...plan, blocks: Int32Array.of(99, 0, 5) });
  expect(await failure(1)).toMatchObject({
    message: expect.stringContaining('99'),
    header: { stepId: 5, originId: ORIGIN },
  });
  sendPlan(plan);
  sendLayer(0, qkv, { stepId: 4 });
  expect(await failure(2)).toMatchObject({
    code: 'protocol_violation',
    message: expect.stringContaining('step 4'),
    header: { kind: FRAME_KIND.failure, stepId: 4, waveIndex: 1, shardIndex: 3, originId: ORIGIN, layer: 0 },
  });
  sendLayer(0, qkv.slice(1));
  expect(await failure(3)).toMatchObject({ message: expect.stringContaining('bytes of q, k and v') });
  sendLayer(2, qkv);
  expect(await failure(4)).toMatchObject({ message: expect.stringContaining('layer 2') });
  sendPlan(plan, { waveIndex: 64 });
  expect(await failure(5)).toMatchObject({ message: expect.stringContaining('at most 64') });
  sendLayer(0, qkv);
  expectClose((await answer(6)).body, oracle([{ qkv, numTokens: 5 }]));
  expect(await shard.context.registry.metrics()).toContain('lamina_shard_failures_total 8');
});

test('brief layers after the first are answered where they arrive; what is odd about a frame is answered as before', async () => {
  const seen = vi.spyOn(TensorPlane.prototype, 'onMessage');
  const plan = prefillPlan(5, [3]);
  const [first, second] = [randomLayer(plan), randomLayer(plan)];
  sendPlan(plan);
  sendLayer(0, first);
  await answer(0);
  expect(seen).toHaveBeenCalledTimes(2);
  const header = headerOf({ kind: FRAME_KIND.attend, layer: 1, bodyBytes: second.byteLength });
  const damaged = new Uint8Array(FRAME_HEADER_BYTES + second.byteLength);
  writeFrameHeader(damaged, header);
  damaged[30]! ^= 1;
  bus.publish(SUBJECTS.shardTensors(shardId), damaged);
  expect(await failure(1)).toMatchObject({ code: 'unavailable', header: { stepId: 5, layer: 0 } });
  sendLayer(1, second.slice(1));
  expect(await failure(2)).toMatchObject({ code: 'protocol_violation', header: { stepId: 5, layer: 1 } });
  sendLayer(1, second, { waveIndex: 2 });
  sendLayer(1, second, { stepId: 4 });
  expect(await failure(3)).toMatchObject({ message: expect.stringContaining('step 4') });
  sendLayer(0, first);
  sendLayer(1, second);
  const { header: answered, body } = await answer(4);
  expect(answered).toEqual(headerOf({ kind: FRAME_KIND.partial, layer: 1, bodyBytes: partialBytes(5, WIRE) }));
  expectClose(body, oracle([{ qkv: second, numTokens: 5 }]));
  expect(seen).toHaveBeenCalledTimes(7);
  sendLayer(1, second);
  sendLayer(2, second);
  expect(await failure(5)).toMatchObject({ message: expect.stringContaining('layer 2') });
  expect(seen).toHaveBeenCalledTimes(9);

  // Checksums of tensors are checked by JavaScript.
  sendPlan(plan, { stepId: 6 });
  for (const layer of [0, 1]) {
    const isChecked = headerOf({
      kind: FRAME_KIND.attend,
      layer,
      stepId: 6,
      bodyBytes: second.byteLength,
      isBodyChecked: true,
    });
    const message = new Uint8Array(FRAME_HEADER_BYTES + second.byteLength);
    message.set(new Uint8Array(second.buffer), FRAME_HEADER_BYTES);
    writeFrameHeader(message, isChecked);
    bus.publish(SUBJECTS.shardTensors(shardId), message);
    expect((await answer(6 + layer)).header).toMatchObject({ kind: FRAME_KIND.partial, layer, isBodyChecked: true });
  }
  expect(seen).toHaveBeenCalledTimes(12);
  expect(await shard.context.registry.metrics()).toContain('lamina_shard_attend_seconds_count 4');
  seen.mockRestore();
});

test('a layer that comes twice while it is in flight is answered once', async () => {
  const plan = prefillPlan(40, [0, 1, 2]);
  const qkv = randomLayer(plan);
  sendPlan(plan);
  sendLayer(0, qkv);
  sendLayer(0, qkv);
  sendLayer(1, qkv, { waveIndex: 9 });
  await answer(0);
  sendLayer(1, qkv);
  await answer(1);
  expect(answers.map(({ header }) => header.layer)).toEqual([0, 1]);
});

test('a plan that takes the place of a step in flight: the former is not answered, the next is right', async () => {
  const first = prefillPlan(60, [0, 1, 2, 3]);
  const second = prefillPlan(5, [4]);
  const qkv = randomLayer(second);
  sendPlan(first);
  sendLayer(0, randomLayer(first));
  sendPlan(second, { stepId: 6 });
  sendLayer(0, qkv, { stepId: 6 });
  const last = await eventually(() => answers.find(({ header }) => header.stepId === 6));
  expectClose(last.body, oracle([{ qkv, numTokens: 5 }]));
  await shard.stop();
  await bus.flush();
  expect(answers.filter(({ header }) => header.stepId === 5).length).toBeLessThanOrEqual(1);
});

test('a shard that stops answers what is in flight', async () => {
  const plan = prefillPlan(40, [0, 1, 2]);
  const qkv = randomLayer(plan);
  sendPlan(plan);
  sendLayer(0, qkv);
  await bus.flush();
  await shard.stop();
  expectClose((await answer(0)).body, oracle([{ qkv, numTokens: 40 }]));
});

test('a model that soft-caps, has windows, ALiBi and sinks takes the place of another: partials equal float64 attention', async () => {
  const spec: AttentionSpec = {
    ...SPEC,
    softcap: 2,
    windowTokens: [12, 0],
    alibiSlopes: [0.5, 0.25, 0.125, 0.0625],
    // Not a shard's business: they would be counted once per shard.
    sinkLogits: [
      [9, 9, 9, 9],
      [9, 9, 9, 9],
    ],
  };
  const formerId = shardId;
  await bus.request(ENDPOINTS.executorLeave, { executorId: 'e1' }, { timeoutMs: 1000 });
  const second = { executorId: 'e2', modelId: 'n', spec, originIds: [ORIGIN] };
  await bus.request(ENDPOINTS.executorHeartbeat, second, { timeoutMs: 1000 });
  shardId = await eventually(async () => {
    const { shards } = await bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 1000 });
    return shards.find((entry) => entry.numBlocks === 8 && entry.shardId !== formerId)?.shardId;
  });
  const prompt = prefillPlan(40, [4, 1, 6]);
  const layers = [randomLayer(prompt), randomLayer(prompt)];
  sendPlan(prompt);
  for (const [layer, qkv] of layers.entries()) {
    sendLayer(layer, qkv);
    expectClose((await answer(layer)).body, oracle([{ qkv, numTokens: 40 }], spec, layer));
  }
  const decode: StepPlan = {
    numQueryRows: 1,
    numKvRows: 1,
    segments: Int32Array.of(0, 1, 40, 0, 3),
    blocks: Int32Array.of(4, 0, 16, 1, 16, 16, 6, 32, 9),
    kvSlots: Int32Array.of(6 * BLOCK + 8),
  };
  sendPlan(decode, { stepId: 6 });
  for (const [layer, past] of layers.entries()) {
    const qkv = randomLayer(decode);
    sendLayer(layer, qkv, { stepId: 6 });
    const chunks = [
      { qkv: past, numTokens: 40 },
      { qkv, numTokens: 1 },
    ];
    expectClose((await answer(2 + layer)).body, oracle(chunks, spec, layer));
  }
  // Prefill reads all 40 tokens in both layers; then the window leaves 16 + 9 of 41 in the first layer.
  expect(shard.running.stats?.()).toMatchObject({ attends: 4, tokensAttended: 40 + 40 + 25 + 41 });
});
