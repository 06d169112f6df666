/** Every decoder against mutated bytes: nothing but a LaminaError ever comes out, it comes quickly, and nothing is kept. */
import { LaminaError } from '@lamina/tensor';
import { afterAll, beforeAll, expect, test, vi } from 'vitest';
import type { z } from 'zod';
import { count, heldBytes, IS_LONG, megabytes, secondsSince, tell } from '../../../test/fuzz-report.ts';
import { mutate, randomOf } from '../../../test/mutate.ts';
import { packMessage, unpackMessage } from '../src/codec.ts';
import {
  emptyFrameHeader,
  FRAME_HEADER_BYTES,
  FRAME_KIND,
  FrameAssembler,
  readFrameHeader,
  splitFrame,
  writeFrameHeader,
} from '../src/frame.ts';
import { encodingOf, parseGenerateBody, requestIdOf } from '../src/generate-request.ts';
import { errorBodySchema, parseMessage } from '../src/schema.ts';
import { decodeStepPlan, encodeStepPlan } from '../src/step-plan.ts';
import { ENDPOINTS, EVENTS } from '../src/subjects.ts';
import { decodeTokens, encodeTokens, type TokenMessage } from '../src/token-message.ts';
import { type WorkItem, workItemSchema } from '../src/work-item.ts';

/** In the long form every decoder sees a million. */
const LONG_CASES = 1_000_000;
/** What a decoder sees otherwise; those of the kv-manager's messages share as many. */
const CASES = 30_000;
/** Frames and plans are read faster. */
const TENSOR_CASES = 100_000;
/** CPU time for all of a decoder's cases, some 30 us each. A case that grows with what its bytes promise takes far longer. */
const LIMIT_MS = IS_LONG ? 200_000 : 20_000;
/** On a machine that others use too. */
const TIMEOUT_MS = 4 * LIMIT_MS;
/** So often the event loop has a turn, in which the test runner hears of us. */
const TURN_CASES = 50_000;
/** What may be held after all cases and was not before. */
const MAX_GROWTH_BYTES = 4e6;
vi.setConfig({ testTimeout: TIMEOUT_MS });

// Stack traces of millions of expected errors would take most of the time.
const { stackTraceLimit } = Error;
beforeAll(() => {
  Error.stackTraceLimit = 0;
});
afterAll(() => {
  Error.stackTraceLimit = stackTraceLimit;
});

/** Runs the decoder on the cases. Fails on what is no LaminaError, on slowness, when memory grows, and when nothing was taken or refused. */
async function fuzz(
  name: string,
  seeds: readonly Uint8Array[],
  decode: (bytes: Uint8Array) => unknown,
  shortCases = CASES,
): Promise<void> {
  const cases = IS_LONG ? LONG_CASES : shortCases;
  for (const seed of seeds) decode(seed);
  const random = randomOf(seeds.length);
  const foreign: string[] = [];
  let numTaken = 0;
  const startedMs = performance.now();
  const heldBefore = heldBytes();
  const before = process.cpuUsage();
  for (let i = 0; i < cases && foreign.length < 5; i++) {
    if (i % TURN_CASES === TURN_CASES - 1) await new Promise(setImmediate);
    const bytes = mutate(seeds, random);
    try {
      decode(bytes);
      numTaken++;
    } catch (error) {
      if (!(error instanceof LaminaError) || error.code === 'internal')
        foreign.push(`${error} of ${Buffer.from(bytes).toString('hex')}`);
    }
  }
  expect(foreign).toEqual([]);
  const { user, system } = process.cpuUsage(before);
  expect((user + system) / 1e3).toBeLessThan(LIMIT_MS);
  const held = heldBytes();
  tell(
    `${name}: ${count(cases)} messages, ${count(numTaken)} of them taken, in ${secondsSince(startedMs)} ` +
      `(${((user + system) / cases).toFixed(1)} us of CPU each); holds ${megabytes(heldBefore)} before, ${megabytes(held)} after`,
  );
  expect(held - heldBefore).toBeLessThan(MAX_GROWTH_BYTES);
  // Otherwise the mutations prove nothing.
  expect(numTaken).toBeGreaterThan(cases / 500);
  expect(cases - numTaken).toBeGreaterThan(cases / 500);
  // Whatever came before, a good message is still read.
  for (const seed of seeds) decode(seed);
}

const SPEC = { numLayers: 2, numHeads: 4, numKvHeads: 2, headDim: 32, scale: 0.25 };
const TOKEN: TokenMessage = {
  id: 'a-1',
  index: 3,
  token: 5,
  text: 'caf\u00e9',
  logprob: -0.5,
  top_logprobs: [{ token: 5, text: 'x', logprob: -0.5 }],
  finish_reason: null,
};
const LAST: TokenMessage = {
  id: 'a-1',
  index: 4,
  token: null,
  text: '',
  finish_reason: 'error',
  usage: { prompt_tokens: 3, completion_tokens: 1, total_tokens: 4 },
  error: { code: 'internal', message: 'm' },
};
const WORK: WorkItem = {
  id: 'a-1',
  model: 'm',
  tokenIds: [1, 300, 70_000],
  maxTokens: 10,
  sampling: { temperature: 0.5, topP: 0.9, topK: 5, minP: 0, seed: 7 },
  stop: ['end'],
  logprobs: 2,
  ignoreEos: false,
  priority: 0,
  deadlineAtMs: null,
  encoding: 'json',
  submittedAtMs: 1_700_000_000_000,
};
const PLAN = {
  numQueryRows: 2,
  numKvRows: 1,
  segments: Int32Array.of(0, 1, 17, 0, 2, 1, 1, 0, 2, 1),
  blocks: Int32Array.of(5, 0, 16, 9, 16, 2),
  kvSlots: Int32Array.of(145),
};

function framesOf(bodyBytes: number, maxPayload: number): Uint8Array[] {
  const header = { ...emptyFrameHeader(), kind: FRAME_KIND.attend, stepId: 7, layer: 3, bodyBytes };
  const message = new Uint8Array(FRAME_HEADER_BYTES + bodyBytes).fill(0x55);
  writeFrameHeader(message, header);
  return splitFrame(message, header, maxPayload);
}

test('frames and their joining', async () => {
  const header = emptyFrameHeader();
  const assembler = new FrameAssembler();
  await fuzz(
    'frames',
    [...framesOf(200, 132), ...framesOf(40, 100)],
    (frame) => {
      readFrameHeader(frame, header);
      // Seeds come as they are: a whole message, the first part and, right after it, the second.
      const body = assembler.push(frame, header);
      if (body !== undefined && body.length !== header.bodyBytes) throw new Error('a body of another size');
    },
    TENSOR_CASES,
  );
});

test('step plans', async () => {
  const seeds = [encodeStepPlan(PLAN).subarray(FRAME_HEADER_BYTES), new Uint8Array(16)];
  await fuzz(
    'step plans',
    seeds,
    (body) => {
      const plan = decodeStepPlan(body);
      const ints = 4 + plan.segments.length + plan.blocks.length + plan.kvSlots.length;
      if (4 * ints !== body.length || plan.kvSlots.length !== plan.numKvRows) throw new Error('a plan of another size');
    },
    TENSOR_CASES,
  );
});

test('bodies of lamina.v1.generate', async () => {
  const request = {
    id: 'a-1',
    prompt: 'Once upon a time',
    max_tokens: 5,
    temperature: 0.5,
    stop: ['x'],
    logprobs: 3,
  };
  const chat = { messages: [{ role: 'user', content: 'Hi' }], seed: 5 };
  const seeds = [
    Buffer.from(JSON.stringify(request)),
    Buffer.from(JSON.stringify(chat)),
    packMessage(request),
    packMessage({ ...chat, top_k: 5 }),
    packMessage({ token_ids: [1, 300, 70_000] }),
    Buffer.from('\u0780\u07c0 text'),
  ];
  await fuzz('bodies of lamina.v1.generate', seeds, (body) => {
    // These two answer for bad bodies as well, so they must never throw.
    const encoding = encodingOf(body);
    requestIdOf(body);
    const parsed = parseGenerateBody(body);
    if (parsed.encoding !== encoding) throw new Error('encodingOf disagrees');
  });
});

test('token messages', async () => {
  const seeds = (['json', 'msgpack'] as const).flatMap((encoding) =>
    [[TOKEN], [LAST], [TOKEN, LAST]].map((messages) => encodeTokens(messages, encoding)),
  );
  await fuzz('token messages', seeds, decodeTokens);
});

test('work items', async () => {
  await fuzz('work items', [packMessage(WORK), packMessage({ ...WORK, deadlineAtMs: 1.5, logprobs: null })], (bytes) =>
    parseMessage('work item', workItemSchema, unpackMessage(bytes)),
  );
});

const LAYOUT = { ...SPEC, blockSizeTokens: 16, kvDtype: 'f16' };
const BEAT = { managerEpoch: 'e', heartbeatIntervalMs: 5, known: true };
const BLOCKS = { managerEpoch: 'e', blocks: [{ shardId: 's1', block: 3 }] };
const SHARD = { shardId: 's1', kernel: 'portable', budgetBytes: 1, numBlocks: 8, usedBlocks: 0, usedBlocksPeak: 0 };
/** A message and an answer of each endpoint. */
const CALLS: Readonly<Record<keyof typeof ENDPOINTS, readonly [object, object]>> = {
  executorHeartbeat: [
    { executorId: 'e1', modelId: 'm', spec: SPEC, originIds: [7, 8] },
    {
      ...BEAT,
      layout: LAYOUT,
      heartbeatTimeoutMs: 9,
      voidRequestIds: ['a', 'b'],
      takenOverRequestIds: ['c'],
      registration: 1,
    },
  ],
  executorLeave: [{ executorId: 'e1' }, {}],
  shardHeartbeat: [
    { shardId: 's1', budgetBytes: 5, kernel: 'k', numBlocks: null, fencedUpTo: 0 },
    { ...BEAT, layout: null, usedBlocks: 0, usedBlocksPeak: 0, fences: [{ number: 1, originIds: [7] }] },
  ],
  shardLeave: [{ shardId: 's1' }, {}],
  suspectShard: [{ shardId: 's1' }, { isLost: false }],
  allocate: [{ requestId: 'a', executorId: 'e1', numTokens: 5, maxTokens: 9, deliveryCount: 1 }, BLOCKS],
  extend: [{ requestId: 'a', executorId: 'e1', numBlocks: 1, numTokens: 5 }, BLOCKS],
  trim: [{ requestId: 'a', executorId: 'e1', numFreedBlocks: 1 }, {}],
  free: [{ requestId: 'a', executorId: 'e1' }, {}],
  kvStatus: [
    {},
    {
      managerEpoch: 'e',
      modelId: 'm',
      layout: LAYOUT,
      executors: [{ executorId: 'e1', modelId: 'm' }],
      shards: [SHARD],
      numRequests: 1,
    },
  ],
};
const EVENT_BODIES: Readonly<Record<keyof typeof EVENTS, object>> = {
  shardLost: { shardId: 's1' },
  capacityFreed: { freeBlocks: 5 },
};

/** What is sent and answered on the control plane, one message for each schema: some subjects have the same. */
function controlMessages(): Map<z.ZodType, [name: string, message: object]> {
  const messages = new Map<z.ZodType, [string, object]>();
  for (const [key, [request, reply]] of Object.entries(CALLS)) {
    const found = Object.entries(ENDPOINTS).find(([name]) => name === key)![1];
    messages.set(found.request, [found.subject, request]);
    messages.set(found.reply, [`answer to ${found.subject}`, reply]);
  }
  for (const [key, body] of Object.entries(EVENT_BODIES)) {
    const found = Object.entries(EVENTS).find(([name]) => name === key)![1];
    messages.set(found.body, [found.subject, body]);
  }
  messages.set(errorBodySchema, ['error', { code: 'overloaded', message: 'm', retryAfterMs: 5 }]);
  return messages;
}

const CONTROL_MESSAGES = [...controlMessages()].map(([schema, [name, message]]) => ({ name, schema, message }));

test.each(CONTROL_MESSAGES)('$name', ({ name, schema, message }) =>
  fuzz(
    name,
    [packMessage(message)],
    (bytes) => parseMessage(name, schema, unpackMessage(bytes)),
    Math.ceil(CASES / CONTROL_MESSAGES.length),
  ),
);
