/**
 * An executor that is cut off with messages on their way, on a real nats-server, kv-manager and attention-shard: its
 * blocks are somebody else's when they arrive.
 */
import type { Bus } from '@lamina/bus';
import {
  attendBytes,
  type BlockRef,
  ENDPOINTS,
  emptyFrameHeader,
  encodeStepPlan,
  FRAME_HEADER_BYTES,
  FRAME_KIND,
  type FrameHeader,
  readFrameHeader,
  type StepPlan,
  SUBJECTS,
  unpackMessage,
  writeFrameHeader,
} from '@lamina/protocol';
import { type AttentionSpec, blockBytes } from '@lamina/tensor';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest';
import { startAttentionShard } from '../../services/attention-shard/src/service.ts';
import { startKvManager } from '../../services/kv-manager/src/service.ts';
import { connect, eventually, type InProcessService, startInProcess } from './in-process.ts';

const SPEC: AttentionSpec = { numLayers: 2, numHeads: 4, numKvHeads: 2, headDim: 32, scale: 0.2 };
const BLOCK = 16;
const HEARTBEAT_MS = 50;
const HEARTBEAT_TIMEOUT_MS = 300;
const TIMEOUT = { timeoutMs: 1000 };
const NUM_PROMPT_TOKENS = 5;

let nats: NatsServer;
let bus: Bus;
let services: InProcessService[];
let executors: FakeExecutor[];

/** An executor of one worker: registered, and on the tensor plane under an origin id. */
class FakeExecutor {
  readonly executorId: string;
  originId: number;
  readonly answers: { header: FrameHeader; body: Uint8Array }[] = [];
  readonly #reply: string;
  #beats: NodeJS.Timeout | undefined;

  constructor(executorId: string, originId: number) {
    this.executorId = executorId;
    this.originId = originId;
    this.#reply = SUBJECTS.workerTensors(`${executorId}-0`, 0, 0);
    bus.subscribe(this.#reply, ({ data }) => {
      const header = emptyFrameHeader();
      readFrameHeader(data, header);
      this.answers.push({ header, body: data.slice(FRAME_HEADER_BYTES) });
    });
    executors.push(this);
  }

  beat() {
    const { executorId, originId } = this;
    const body = { executorId, modelId: 'm', spec: SPEC, originIds: [originId] };
    return bus.request(ENDPOINTS.executorHeartbeat, body, TIMEOUT);
  }

  keepBeating(): void {
    this.#beats = setInterval(() => void this.beat().catch(() => undefined), HEARTBEAT_MS);
  }

  /** No more signs of life; nothing is said. */
  cutOff(): void {
    clearInterval(this.#beats);
  }

  async allocate(): Promise<BlockRef> {
    const { executorId } = this;
    const body = { requestId: executorId, executorId, numTokens: BLOCK, maxTokens: BLOCK, deliveryCount: 1 };
    return (await bus.request(ENDPOINTS.allocate, body, TIMEOUT)).blocks[0]!;
  }

  sendPlan({ shardId }: BlockRef, stepId: number, plan: StepPlan): void {
    this.#send(shardId, encodeStepPlan(plan), { kind: FRAME_KIND.plan, stepId });
  }

  sendLayer({ shardId }: BlockRef, stepId: number, plan: StepPlan, value: number): void {
    const message = new Uint8Array(FRAME_HEADER_BYTES + attendBytes(plan, { ...SPEC, kvDtype: 'f32' }));
    const qkv = new Float32Array(message.buffer, FRAME_HEADER_BYTES);
    for (let i = 0; i < qkv.length; i++) qkv[i] = Math.sin(value * (i + 1));
    this.#send(shardId, message, { kind: FRAME_KIND.attend, stepId });
  }

  #send(shardId: string, message: Uint8Array, header: Partial<FrameHeader>): void {
    const bodyBytes = message.length - FRAME_HEADER_BYTES;
    writeFrameHeader(message, { ...emptyFrameHeader(), originId: this.originId, bodyBytes, ...header });
    bus.publish(SUBJECTS.shardTensors(shardId), message, this.#reply);
  }

  /** Runs layer 0 of a step, and returns the partial output. */
  async run(ref: BlockRef, stepId: number, plan: StepPlan, value: number): Promise<Uint8Array> {
    this.sendPlan(ref, stepId, plan);
    this.sendLayer(ref, stepId, plan, value);
    const { header, body } = await eventually(() => this.answers.find((answer) => answer.header.stepId === stepId));
    expect(header.kind).toBe(FRAME_KIND.partial);
    return body;
  }
}

const prefill = ({ block }: BlockRef): StepPlan => ({
  numQueryRows: NUM_PROMPT_TOKENS,
  numKvRows: NUM_PROMPT_TOKENS,
  segments: Int32Array.of(0, NUM_PROMPT_TOKENS, 0, 0, 1),
  blocks: Int32Array.of(block, 0, NUM_PROMPT_TOKENS),
  kvSlots: Int32Array.from({ length: NUM_PROMPT_TOKENS }, (_, token) => block * BLOCK + token),
});
const decode = ({ block }: BlockRef): StepPlan => ({
  numQueryRows: 1,
  numKvRows: 1,
  segments: Int32Array.of(0, 1, NUM_PROMPT_TOKENS, 0, 1),
  blocks: Int32Array.of(block, 0, NUM_PROMPT_TOKENS + 1),
  kvSlots: Int32Array.of(block * BLOCK + NUM_PROMPT_TOKENS),
});

beforeAll(async () => {
  nats = await startNatsServer();
});
afterAll(() => nats.stop());
beforeEach(async () => {
  bus = await connect(nats.url);
  executors = [];
  const beat = ['--heartbeat-interval-ms', String(HEARTBEAT_MS)];
  const timeout = ['--heartbeat-timeout-ms', String(HEARTBEAT_TIMEOUT_MS)];
  const manager = await startInProcess('kv-manager', startKvManager, nats.url, [
    '--kv-dtype',
    'f32',
    ...beat,
    ...timeout,
  ]);
  const budget = ['--kv-budget-bytes', String(blockBytes({ ...SPEC, blockSizeTokens: BLOCK, kvDtype: 'f32' }))];
  services = [await startInProcess('attention-shard', startAttentionShard, nats.url, budget), manager];
});
afterEach(async () => {
  for (const executor of executors) executor.cutOff();
  for (const service of services) await service.stop();
  await bus.close();
});

/** Allocates the one block of the cluster as soon as it is to be had. */
const allocateSoon = (executor: FakeExecutor): Promise<BlockRef> =>
  eventually(() => executor.allocate().catch(() => undefined));

test.each(['a layer', 'a plan and its layer'])(
  "%s of an executor that was lost changes nobody else's KV",
  async (late) => {
    const lost = new FakeExecutor('lost', 1);
    await lost.beat();
    const block = await allocateSoon(lost);
    if (late === 'a layer') lost.sendPlan(block, 1, prefill(block));
    lost.keepBeating();
    const heir = new FakeExecutor('heir', 2);
    await heir.beat();
    heir.keepBeating();
    lost.cutOff();
    expect(await allocateSoon(heir)).toEqual(block);
    await heir.run(block, 1, prefill(block), 0.1);
    const before = await heir.run(block, 2, decode(block), 0.2);
    // What sat in the socket arrives.
    if (late !== 'a layer') lost.sendPlan(block, 1, prefill(block));
    lost.sendLayer(block, 1, prefill(block), 0.3);
    // One step of the heir's that comes after it, and one that begins when the late layer has certainly been through.
    await heir.run(block, 3, decode(block), 0.2);
    expect(await heir.run(block, 4, decode(block), 0.2)).toEqual(before);
    lost.answers.length = 0;
    lost.sendPlan(block, 2, prefill(block));
    const { header, body } = await eventually(() => lost.answers[0]);
    expect(header.kind).toBe(FRAME_KIND.failure);
    expect(unpackMessage(body)).toMatchObject({ code: 'unavailable' });
  },
);

test('the blocks of an executor that was lost are free a heartbeat later, again and again', async () => {
  const heir = new FakeExecutor('heir', 2);
  await heir.beat();
  heir.keepBeating();
  const waitsMs: number[] = [];
  for (let round = 0; round < 5; round++) {
    const lost = new FakeExecutor(`lost${round}`, 10 + round);
    await lost.beat();
    await allocateSoon(lost);
    await eventually(async () => {
      const { executors } = await bus.request(ENDPOINTS.kvStatus, {}, TIMEOUT);
      return executors.length === 1 ? true : undefined;
    });
    const lostAtMs = performance.now();
    await allocateSoon(heir);
    waitsMs.push(performance.now() - lostAtMs);
    await bus.request(ENDPOINTS.free, { requestId: 'heir', executorId: 'heir' }, TIMEOUT);
  }
  waitsMs.sort((a, b) => a - b);
  console.log(`free after ${waitsMs.map(Math.round).join(', ')} ms, with a heartbeat every ${HEARTBEAT_MS} ms`);
  // Not the silence of a shard that does not confirm.
  expect(waitsMs[2]).toBeLessThan(HEARTBEAT_TIMEOUT_MS);
});
