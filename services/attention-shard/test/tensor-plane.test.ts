/** The tensor plane against a kernel that finishes when the test says so. */
import type { AttentionKernel, KernelStep } from '@lamina/attention-kernel';
import {
  emptyFrameHeader,
  encodeStepPlan,
  FRAME_HEADER_BYTES,
  FRAME_KIND,
  type FrameHeader,
  readFrameHeader,
  SUBJECTS,
  unpackMessage,
  writeFrameHeader,
} from '@lamina/protocol';
import { createLogger, Registry } from '@lamina/runtime';
import { attendBytes, type KvLayout, LaminaError, type StepPlan } from '@lamina/tensor';
import { expect, test } from 'vitest';
import { ShardStats } from '../src/shard-stats.ts';
import { TensorPlane } from '../src/tensor-plane.ts';

const LAYOUT: KvLayout = {
  numLayers: 2,
  numHeads: 2,
  numKvHeads: 1,
  headDim: 8,
  scale: 1,
  blockSizeTokens: 8,
  kvDtype: 'f32',
};
const PLAN: StepPlan = {
  numQueryRows: 1,
  numKvRows: 1,
  segments: Int32Array.of(0, 1, 2, 0, 1),
  blocks: Int32Array.of(0, 0, 3),
  kvSlots: Int32Array.of(2),
};

class FakeKernel implements AttentionKernel {
  readonly name = 'portable';
  readonly layout = LAYOUT;
  readonly numBlocks = 4;
  readonly frames = undefined;
  readonly attends: { layer: number; qkv: Uint8Array; out: Uint8Array; done: (error: Error | null) => void }[] = [];
  readonly open = new Set<KernelStep>();
  /** Attends are done when `attend` returns. */
  isBrief = false;

  beginStep(plan: StepPlan): KernelStep {
    const step = { plan };
    this.open.add(step);
    return step;
  }

  attend(_: KernelStep, layer: number, qkv: Uint8Array, out: Uint8Array, done: (error: Error | null) => void): void {
    this.attends.push({ layer, qkv, out, done });
    if (this.isBrief) done(null);
  }

  endStep(step: KernelStep): void {
    if (!this.open.delete(step)) throw new Error('a step ended twice');
  }

  close(): Promise<void> {
    return Promise.resolve();
  }
}

function setUp() {
  const kernel = new FakeKernel();
  const sent: { subject: string; data: Uint8Array; header: FrameHeader }[] = [];
  const stats = new ShardStats(new Registry());
  const plane = new TensorPlane({
    kernel,
    link: {
      maxPayloadBytes: 1_048_576,
      publish: (subject, data) => {
        const header = emptyFrameHeader();
        readFrameHeader(data, header);
        sent.push({ subject, data, header });
      },
    },
    log: createLogger({ level: 'silent', service: 'attention-shard', instance: 'test' }),
    stats,
    frames: undefined,
  });
  const memory = { numHolds: 0, release: () => void memory.numHolds-- };
  const hold = () => {
    memory.numHolds++;
    return memory;
  };
  const receive = (data: Uint8Array, reply?: string): void => plane.onMessage({ data, reply, hold });
  const frame = (message: Uint8Array, overrides: Partial<FrameHeader>): Uint8Array => {
    const bodyBytes = message.length - FRAME_HEADER_BYTES;
    writeFrameHeader(message, { ...emptyFrameHeader(), originId: 1, stepId: 1, bodyBytes, ...overrides });
    return message;
  };
  const sendPlan = (overrides: Partial<FrameHeader> = {}, reply: string | undefined = 'worker'): void =>
    receive(frame(encodeStepPlan(PLAN), { kind: FRAME_KIND.plan, ...overrides }), reply);
  const sendLayer = (layer: number, overrides: Partial<FrameHeader> = {}): Uint8Array => {
    const message = new Uint8Array(FRAME_HEADER_BYTES + attendBytes(PLAN, LAYOUT));
    receive(frame(message, { kind: FRAME_KIND.attend, layer, ...overrides }));
    return message;
  };
  return { kernel, sent, stats, plane, memory, receive, sendPlan, sendLayer };
}

test('a layer costs no copy: the kernel reads the received bytes and writes what is published', () => {
  const { kernel, sent, sendPlan, sendLayer, stats } = setUp();
  sendPlan();
  const message = sendLayer(0);
  const { qkv, out, done } = kernel.attends[0]!;
  expect(qkv.buffer).toBe(message.buffer);
  expect(stats.queueDepth).toBe(1);
  out.fill(7);
  done(null);
  expect(sent[0]).toMatchObject({ subject: 'worker', header: { kind: FRAME_KIND.partial, layer: 0, stepId: 1 } });
  expect(sent[0]!.data.buffer).toBe(out.buffer);
  expect(sent[0]!.data.subarray(FRAME_HEADER_BYTES).every((byte) => byte === 7)).toBe(true);
  sendLayer(1);
  expect(kernel.attends[1]!.out).toBe(out);
  kernel.attends[1]!.done(null);
  expect(stats).toMatchObject({ attends: 2, tokensAttended: 6, bytesRead: 6 * 64, queueDepth: 0 });
});

test('what the kernel reads later is held until it is done, also that of a step that was replaced; brief attention holds nothing', () => {
  const { kernel, memory, sendPlan, sendLayer } = setUp();
  sendPlan();
  sendLayer(0);
  expect(memory.numHolds).toBe(1);
  kernel.attends[0]!.done(null);
  expect(memory.numHolds).toBe(0);
  sendLayer(1);
  sendPlan({ stepId: 2 });
  sendLayer(0, { stepId: 2 });
  expect(memory.numHolds).toBe(2);
  kernel.attends[1]!.done(null);
  kernel.attends[2]!.done(new Error('failed'));
  expect(memory.numHolds).toBe(0);
  kernel.isBrief = true;
  sendLayer(0, { stepId: 2 });
  sendLayer(1, { stepId: 2 });
  expect([kernel.attends.length, memory.numHolds]).toEqual([5, 0]);
});

test('memory goes on to the step after the next one after the last layer, and not before', () => {
  const { kernel, sendPlan, sendLayer } = setUp();
  sendPlan();
  sendLayer(0);
  sendPlan({ stepId: 2 });
  sendLayer(0, { stepId: 2 });
  expect(kernel.attends[1]!.out.buffer).not.toBe(kernel.attends[0]!.out.buffer);
  kernel.attends[1]!.done(null);
  sendLayer(1, { stepId: 2 });
  kernel.attends[2]!.done(null);
  sendPlan({ stepId: 3 });
  sendLayer(0, { stepId: 3 });
  // What was published last may not have been copied yet.
  expect(kernel.attends[3]!.out.buffer).not.toBe(kernel.attends[1]!.out.buffer);
  kernel.attends[3]!.done(null);
  sendLayer(1, { stepId: 3 });
  kernel.attends[4]!.done(null);
  sendPlan({ stepId: 4 });
  sendLayer(0, { stepId: 4 });
  expect(kernel.attends[5]!.out.buffer).toBe(kernel.attends[1]!.out.buffer);
  expect(kernel.open.size).toBe(1);
});

test('the last answer of a step that was given up, and the first of the next one, which came with it, are both sent', () => {
  const { kernel, sent, stats, sendPlan, sendLayer } = setUp();
  kernel.isBrief = true;
  sendPlan();
  sendLayer(0);
  sendLayer(1);
  sendPlan({ stepId: 2 });
  sendLayer(0, { stepId: 2 });
  const headers = sent.map(({ data }) => {
    const header = emptyFrameHeader();
    readFrameHeader(data, header);
    return [header.stepId, header.layer];
  });
  // Read when all are published: the first one's memory was the second one's meanwhile, which its answer had allowed.
  expect(headers.slice(1)).toEqual([
    [1, 1],
    [2, 0],
  ]);
  expect(stats.queueDepth).toBe(0);
});

test('the answer of a step that was replaced is not sent', () => {
  const { kernel, sent, stats, sendPlan, sendLayer } = setUp();
  sendPlan();
  sendLayer(0);
  sendPlan({ stepId: 2 });
  kernel.attends[0]!.done(null);
  expect(sent).toEqual([]);
  expect(stats.queueDepth).toBe(0);
});

test('a kernel error is answered as a failure of its layer', () => {
  const { kernel, sent, stats, sendPlan, sendLayer } = setUp();
  sendPlan({ waveIndex: 3, shardIndex: 2 });
  sendLayer(1, { waveIndex: 3, shardIndex: 2 });
  kernel.attends[0]!.done(new LaminaError('internal', 'out of luck'));
  expect(sent[0]!.header).toMatchObject({ kind: FRAME_KIND.failure, layer: 1, waveIndex: 3, shardIndex: 2 });
  expect(unpackMessage(sent[0]!.data.subarray(FRAME_HEADER_BYTES))).toEqual({
    code: 'internal',
    message: 'out of luck',
  });
  expect(stats.failures).toBe(1);
  sendLayer(1, { waveIndex: 3, shardIndex: 2 });
  expect(kernel.attends).toHaveLength(2);
});

test('a duplicate in flight is ignored; another layer in flight, an answer, and a plan without reply are refused', () => {
  const { kernel, sent, stats, receive, sendPlan, sendLayer } = setUp();
  sendPlan();
  sendLayer(0);
  sendLayer(0);
  expect(kernel.attends).toHaveLength(1);
  expect(sent).toEqual([]);
  sendLayer(1);
  expect(sent[0]!.header).toMatchObject({ kind: FRAME_KIND.failure, layer: 1 });
  sendLayer(0, { kind: FRAME_KIND.partial });
  expect(sent[1]!.header.kind).toBe(FRAME_KIND.failure);
  receive(encodeStepPlan(PLAN));
  expect(stats.failures).toBe(3);
});

test('a layer of another shard of the step is refused, though its size fits', () => {
  const { kernel, sent, sendPlan, sendLayer } = setUp();
  sendPlan({ shardIndex: 1 });
  sendLayer(0, { shardIndex: 0 });
  expect(kernel.attends).toEqual([]);
  expect(sent).toMatchObject([{ subject: 'worker', header: { kind: FRAME_KIND.failure, shardIndex: 0 } }]);
  sendLayer(0, { shardIndex: 1 });
  expect(kernel.attends).toHaveLength(1);
});

test('nothing is answered where only services publish, save to a worker', () => {
  const { kernel, sent, stats, receive, sendPlan } = setUp();
  for (const reply of ['$JS.API.STREAM.PURGE.LAMINA_WORK', SUBJECTS.work('k', 'w'), SUBJECTS.shardTensors('s')]) {
    sendPlan({}, reply);
    receive(new Uint8Array(5), reply);
  }
  expect([kernel.open.size, sent, stats.failures]).toEqual([0, [], 6]);
  sendPlan({}, SUBJECTS.workerTensors('w', 0, 0));
  expect(kernel.open.size).toBe(1);
});

test('origins are bounded: the one without a plan for longest makes room', () => {
  const { kernel, sent, sendPlan, sendLayer } = setUp();
  for (let originId = 1; originId <= 256; originId++) sendPlan({ originId });
  sendPlan({ originId: 1, stepId: 2 });
  sendPlan({ originId: 257 });
  expect(kernel.open.size).toBe(256);
  sendLayer(0, { originId: 1, stepId: 2 });
  expect(kernel.attends).toHaveLength(1);
  sendLayer(0, { originId: 2 });
  expect(kernel.attends).toHaveLength(1);
  expect(sent).toEqual([]);
});

test('after close nothing is started', async () => {
  const { kernel, sent, plane, sendPlan, sendLayer } = setUp();
  sendPlan();
  await plane.close();
  sendLayer(0);
  expect(kernel.attends).toEqual([]);
  expect(kernel.open.size).toBe(0);
  expect(sent).toEqual([]);
  sendPlan();
  expect(unpackMessage(sent[0]!.data.subarray(FRAME_HEADER_BYTES))).toMatchObject({ code: 'unavailable' });
});

test('a layer that was damaged on its way is refused to its step at once, and the next try is taken', () => {
  const { kernel, sent, sendPlan, sendLayer, receive } = setUp();
  sendPlan();
  const intact = sendLayer(0, { isBodyChecked: true });
  expect(kernel.attends).toHaveLength(1);
  kernel.attends[0]!.done(new Error('to be tried again'));
  sent.length = 0;
  for (const at of [8, 28, intact.length - 1]) {
    const damaged = Uint8Array.from(intact);
    damaged[at]! ^= 4;
    receive(damaged);
  }
  expect(kernel.attends).toHaveLength(1);
  // The first says that it belongs to another step, of which nothing is known: nobody is told.
  const failures = sent.filter(({ header }) => header.kind === FRAME_KIND.failure);
  expect(failures.map(({ subject, header }) => [subject, header.stepId])).toEqual([
    ['worker', 1],
    ['worker', 1],
  ]);
  expect(unpackMessage(failures[0]!.data.subarray(FRAME_HEADER_BYTES))).toMatchObject({ code: 'unavailable' });
  receive(intact);
  expect(kernel.attends).toHaveLength(2);
  kernel.attends[1]!.done(null);
  expect(sent.at(-1)!.header).toMatchObject({ kind: FRAME_KIND.partial, isBodyChecked: true });
});

test('what comes again after its answer, or is older than what is known, changes nothing', () => {
  const { kernel, sent, sendPlan, sendLayer, receive } = setUp();
  sendPlan();
  const layer = sendLayer(0);
  kernel.attends[0]!.done(null);
  receive(layer);
  sendPlan();
  sendPlan({ stepId: 0 });
  receive(layer);
  expect([kernel.attends.length, sent.length]).toEqual([1, 1]);
  // The step goes on where it was.
  sendLayer(1);
  expect(kernel.attends).toHaveLength(2);
});

test('when the connection was cut every origin is told once, with a step of its own or none in flight, and those that are fenced are not', () => {
  const { kernel, sent, stats, plane, sendPlan, sendLayer } = setUp();
  sendPlan({ waveIndex: 1 }, 'one');
  sendPlan({ waveIndex: 2 }, 'one');
  sendPlan({ originId: 2 }, 'two');
  sendPlan({ originId: 3 }, 'three');
  sendLayer(0, { originId: 2 });
  kernel.attends[0]!.done(null);
  plane.fence([3]);
  sent.length = 0;
  plane.connectionCut();
  expect(sent).toMatchObject([
    { subject: 'one', header: { kind: FRAME_KIND.failure, originId: 1, waveIndex: 1, stepId: 1 } },
    { subject: 'two', header: { kind: FRAME_KIND.failure, originId: 2, waveIndex: 0, stepId: 1 } },
  ]);
  for (const { data } of sent)
    expect(unpackMessage(data.subarray(FRAME_HEADER_BYTES))).toMatchObject({ code: 'unavailable', retryAfterMs: 0 });
  expect(stats.failures).toBe(0);
  // The step itself goes on, if its executor does.
  sendLayer(1, { originId: 2 });
  expect(kernel.attends).toHaveLength(2);
});

test('a fenced origin has no step and gets none, whatever its wave; the others go on', () => {
  const { kernel, sent, plane, sendPlan, sendLayer } = setUp();
  sendPlan();
  sendPlan({ waveIndex: 1 });
  sendPlan({ originId: 2 });
  expect(plane.fence([1, 3])).toBe(true);
  expect(kernel.open.size).toBe(1);
  sendLayer(0);
  sendLayer(0, { waveIndex: 1 });
  expect(sent).toEqual([]);
  for (const originId of [1, 3]) sendPlan({ originId, stepId: 2 });
  for (const originId of [1, 3]) sendLayer(0, { originId, stepId: 2 });
  expect(kernel.attends).toEqual([]);
  expect(sent.map(({ data }) => unpackMessage(data.subarray(FRAME_HEADER_BYTES)))).toMatchObject([
    { code: 'unavailable', message: expect.stringContaining('origin 1 ') },
    { code: 'unavailable', message: expect.stringContaining('origin 3 ') },
  ]);
  sendLayer(0, { originId: 2 });
  expect(kernel.attends).toHaveLength(1);
});

test('a fence does not hold while a layer of its origin is in the kernel, also one of a step that was replaced', () => {
  const { kernel, sent, stats, plane, sendPlan, sendLayer } = setUp();
  sendPlan({ originId: 2 });
  sendLayer(0, { originId: 2 });
  sendPlan();
  sendLayer(0);
  sendPlan({ stepId: 2 });
  sendLayer(0, { stepId: 2 });
  expect(plane.fence([1])).toBe(false);
  kernel.attends[2]!.done(null);
  expect(plane.fence([1])).toBe(false);
  kernel.attends[1]!.done(new Error('late'));
  expect(plane.fence([1])).toBe(true);
  // Nobody is told: its executor is no more.
  expect(sent).toEqual([]);
  kernel.attends[0]!.done(null);
  expect(sent).toHaveLength(1);
  expect(stats.queueDepth).toBe(0);
});

test('fenced origins are bounded: the oldest is forgotten', () => {
  const { kernel, plane, sendPlan } = setUp();
  for (let originId = 1; originId <= 1024; originId++) plane.fence([originId]);
  sendPlan();
  expect(kernel.open.size).toBe(0);
  plane.fence([1025]);
  sendPlan();
  sendPlan({ originId: 2 });
  expect(kernel.open.size).toBe(1);
});
