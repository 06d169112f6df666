import { attendBytes, partialBytes, type StepPlan } from '@lamina/tensor';
import { expect, test } from 'vitest';
import { FRAME_HEADER_BYTES } from '../src/frame.ts';
import { LIMITS } from '../src/limits.ts';
import { decodeStepPlan, encodeStepPlan } from '../src/step-plan.ts';

const PLAN: StepPlan = {
  numQueryRows: 3,
  numKvRows: 2,
  segments: Int32Array.of(0, 1, 17, 0, 2, 1, 2, 0, 2, 1),
  blocks: Int32Array.of(5, 0, 16, 9, 16, 2, 2147483647, 0, 2),
  kvSlots: Int32Array.of(145, -1),
};
const EMPTY: StepPlan = {
  numQueryRows: 0,
  numKvRows: 0,
  segments: new Int32Array(0),
  blocks: new Int32Array(0),
  kvSlots: new Int32Array(0),
};

const bodyOf = (plan: StepPlan): Uint8Array => encodeStepPlan(plan).subarray(FRAME_HEADER_BYTES);

/** As NATS delivers it, with other bytes around. */
function delivered(body: Uint8Array, offset: number): Buffer {
  const chunk = Buffer.alloc(offset + body.length + 9, 0xee);
  chunk.set(body, offset);
  return chunk.subarray(offset, offset + body.length);
}

test('a plan comes back from its body, at any alignment', () => {
  for (let offset = 0; offset < 5; offset++) {
    expect(decodeStepPlan(delivered(bodyOf(PLAN), offset))).toEqual(PLAN);
    expect(decodeStepPlan(delivered(bodyOf(EMPTY), offset))).toEqual(EMPTY);
  }
});

test('the body is little-endian integers in the documented order behind room for a header', () => {
  const message = encodeStepPlan(PLAN);
  expect(message.subarray(0, FRAME_HEADER_BYTES).every((byte) => byte === 0)).toBe(true);
  const view = new DataView(message.buffer, FRAME_HEADER_BYTES);
  const ints = Array.from({ length: view.byteLength / 4 }, (_, i) => view.getInt32(4 * i, true));
  expect(ints).toEqual([3, 2, 2, 3, ...PLAN.segments, ...PLAN.blocks, ...PLAN.kvSlots]);
});

test('a decoded plan does not change with the chunk that it came in', () => {
  const body = delivered(bodyOf(PLAN), 4);
  const plan = decodeStepPlan(body);
  body.fill(0);
  expect(plan).toEqual(PLAN);
});

test('counts that are negative, over their limit or disagree with the size are refused', () => {
  const withInts = (change: Record<number, number>, numInts = bodyOf(PLAN).length / 4): Uint8Array => {
    const ints = new Int32Array(numInts);
    ints.set(new Int32Array(bodyOf(PLAN).slice().buffer).subarray(0, numInts));
    for (const [at, value] of Object.entries(change)) ints[Number(at)] = value;
    return new Uint8Array(ints.buffer);
  };
  const bodies = {
    nothing: new Uint8Array(0),
    'less than its counts': bodyOf(PLAN).subarray(0, 12),
    'no whole number of integers': bodyOf(PLAN).subarray(0, bodyOf(PLAN).length - 1),
    'an integer too few': withInts({}, bodyOf(PLAN).length / 4 - 1),
    'an integer too many': withInts({}, bodyOf(PLAN).length / 4 + 1),
    'negative query rows': withInts({ 0: -1 }),
    'negative KV rows': withInts({ 1: -1 }),
    'negative segments': withInts({ 2: -1 }),
    'negative blocks': withInts({ 3: -1 }),
    'too many query rows': withInts({ 0: LIMITS.planRows + 1 }),
    'too many KV rows': withInts({ 1: LIMITS.planRows + 1 }),
    'too many segments': withInts({ 2: LIMITS.planSegments + 1 }),
    'too many blocks': withInts({ 3: LIMITS.planBlocks + 1 }),
    'another KV row': withInts({ 1: 3 }),
    'another segment': withInts({ 2: 3 }),
    'another block': withInts({ 3: 4 }),
    // Three segments fewer and five blocks more would take the same room.
    'negative, in balance': withInts({ 2: -1, 3: 8 }),
  };
  const codes = Object.entries(bodies).map(([name, body]) => {
    try {
      decodeStepPlan(body);
      return `${name}: taken`;
    } catch (error) {
      return `${name}: ${Object(error).code}`;
    }
  });
  expect(codes).toEqual(Object.keys(bodies).map((name) => `${name}: protocol_violation`));
});

test('sizes of the layer messages', () => {
  // q 3 x 4 x 32, k and v 2 x 2 x 32 each; o 3 x 4 x 32 and, always float32, lse 3 x 4.
  for (const [kvDtype, bytes] of [
    ['f32', 4],
    ['f16', 2],
  ] as const) {
    const layout = { numHeads: 4, numKvHeads: 2, headDim: 32, kvDtype };
    expect(attendBytes(PLAN, layout)).toBe(bytes * (3 * 4 * 32 + 2 * (2 * 2 * 32)));
    expect(partialBytes(3, layout)).toBe(bytes * 3 * 4 * 32 + 4 * 3 * 4);
  }
});
