/** A step that was cut off is taken back: every shard has answered or is lost before it ends, whatever goes wrong meanwhile. */
import { emptyFrameHeader, FRAME_HEADER_BYTES, FRAME_KIND, type FrameHeader, readFrameHeader } from '@lamina/protocol';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { STEP_ID_STRIDE } from '../src/worker/messages.ts';
import { Retraction } from '../src/worker/retraction.ts';

const ORIGIN = 77;
const SILENCE_MS = 1_000;
const none = new Int32Array(0);
const part = (shardId: string) => ({ shardId, plan: new Uint8Array(0), queryRows: none, kvRows: none });
const stepOf = (stepId: number, ...shardIds: string[]) => ({ waveIndex: 3, stepId, shards: shardIds.map(part) });

/** Steps that a shard was sent, in order: one plan and one layer each. */
let sent: { subject: string; header: FrameHeader; reply: string | undefined }[];
let late: string[];
let isConnected: boolean;
let retraction: Retraction;

beforeEach(() => {
  vi.useFakeTimers();
  sent = [];
  late = [];
  isConnected = true;
  retraction = new Retraction({
    publish: (subject, data, reply) => {
      const header = emptyFrameHeader();
      readFrameHeader(data, header);
      expect(data.length).toBe(FRAME_HEADER_BYTES + header.bodyBytes);
      sent.push({ subject, header, reply });
    },
    flush: () => (isConnected ? Promise.resolve() : Promise.reject(new Error('cut'))),
    replySubjectOf: (wave, shard) => `reply.${wave}.${shard}`,
    onLate: (shardId) => late.push(shardId),
    silenceMs: SILENCE_MS,
  });
});
afterEach(() => vi.useRealTimers());

const answer = (shardIndex: number, stepId: number, originId = ORIGIN): void =>
  retraction.receive({ ...emptyFrameHeader(), kind: FRAME_KIND.partial, originId, waveIndex: 3, shardIndex, stepId });

/** 'open', 'ended' or the error's message. */
function watch(promise: Promise<void>): () => Promise<string> {
  let state = 'open';
  promise.then(
    () => (state = 'ended'),
    (cause: Error) => (state = cause.message),
  );
  return async () => {
    await vi.advanceTimersByTimeAsync(0);
    return state;
  };
}

test('every shard gets an empty plan and a layer of a later step, and all must answer', async () => {
  const state = watch(retraction.retract(stepOf(32, 'a', 'b'), ORIGIN));
  expect(
    sent.map(({ subject, header, reply }) => [subject.split('.').at(-1), header.kind, header.stepId, reply]),
  ).toEqual([
    ['a', FRAME_KIND.plan, 33, 'reply.3.0'],
    ['a', FRAME_KIND.attend, 33, undefined],
    ['b', FRAME_KIND.plan, 33, 'reply.3.1'],
    ['b', FRAME_KIND.attend, 33, undefined],
  ]);
  answer(1, 33);
  answer(1, 33);
  // Late answers to the step itself, and those to nobody here, confirm nothing.
  answer(0, 32);
  answer(0, 32 + STEP_ID_STRIDE);
  answer(0, 33, ORIGIN + 1);
  expect(await state()).toBe('open');
  answer(0, 33);
  expect(await state()).toBe('ended');
  await vi.advanceTimersByTimeAsync(100 * SILENCE_MS);
  expect([sent.length, late]).toEqual([4, []]);
});

test('step ids wrap', async () => {
  const state = watch(retraction.retract(stepOf(2 ** 32 - 1, 'a'), ORIGIN));
  expect(sent[0]!.header.stepId).toBe(0);
  answer(0, 0);
  expect(await state()).toBe('ended');
});

test('a shard that connects again is asked until it hears, under the same id; it is suspected', async () => {
  const state = watch(retraction.retract(stepOf(0, 'a'), ORIGIN));
  for (let i = 0; i < 50; i++) {
    retraction.unheard(3, 0);
    await vi.advanceTimersByTimeAsync(100);
  }
  expect(new Set(sent.map(({ header }) => header.stepId))).toEqual(new Set([1]));
  expect(late).toHaveLength(50);
  expect(await state()).toBe('open');
  answer(0, 1);
  expect(await state()).toBe('ended');
});

test.each(['before', 'meanwhile'])('a shard that was lost %s need not answer', async (when) => {
  if (when === 'before') retraction.shardLost('a');
  const state = watch(retraction.retract(stepOf(0, 'a', 'b'), ORIGIN));
  expect(await state()).toBe('open');
  answer(1, 1);
  if (when === 'meanwhile') retraction.shardLost('a');
  expect(await state()).toBe('ended');
});

test('the end of the origin ends it', async () => {
  const state = watch(retraction.retract(stepOf(0, 'a', 'b'), ORIGIN));
  retraction.originEnded();
  expect(await state()).toBe('ended');
});

test('a silent shard is asked again under other ids, and after the last one it is an error; not while nobody is connected', async () => {
  const state = watch(retraction.retract(stepOf(0, 'a'), ORIGIN));
  isConnected = false;
  await vi.advanceTimersByTimeAsync(1_000 * SILENCE_MS);
  expect([sent.length, await state()]).toEqual([2, 'open']);
  isConnected = true;
  await vi.advanceTimersByTimeAsync((STEP_ID_STRIDE - 2) * SILENCE_MS);
  const ids = sent.filter(({ header }) => header.kind === FRAME_KIND.plan).map(({ header }) => header.stepId);
  expect(ids).toEqual(Array.from({ length: STEP_ID_STRIDE - 1 }, (_, i) => i + 1));
  expect(await state()).toBe('open');
  await vi.advanceTimersByTimeAsync(SILENCE_MS);
  expect(await state()).toMatch(/^a does not confirm/);
});

test('an answer to an earlier try counts', async () => {
  const state = watch(retraction.retract(stepOf(0, 'a'), ORIGIN));
  await vi.advanceTimersByTimeAsync(2 * SILENCE_MS);
  answer(0, 1);
  expect(await state()).toBe('ended');
});
