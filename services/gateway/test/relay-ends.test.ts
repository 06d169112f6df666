/** How a relay ends an answer: by an end that is stored, a cancel or a deadline. */
import { LaminaError } from '@lamina/tensor';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { EXECUTOR_ANSWER_MS } from '../src/relay.ts';
import { bench, bytes, item, token } from './relay-bench.ts';

beforeEach(() => vi.useFakeTimers());
afterEach(() => vi.useRealTimers());

describe('an end that knows of fewer tokens than were relayed, as of an executor that took over', () => {
  test.each([
    ['without a token', { token: null, finish_reason: 'cancelled' as const }],
    ['with one', { token: 5, finish_reason: 'stop' as const }],
  ])('%s ends the answer after them if it is stored, not when it was only heard', async (_, end) => {
    const { relay, state, indices, isClean, store } = bench();
    await relay.submit(item);
    for (const index of [0, 1, 2]) state.live?.(bytes(token(index)));
    state.live?.(bytes(token(0)));
    for (const index of [0, 1, 2]) store(bytes(token(index)));
    // The stream may refuse it: followers hear it all the same.
    state.live?.(bytes({ id: 'r', index: 1, text: 'x', ...end }));
    await vi.advanceTimersByTimeAsync(0);
    expect([indices(), state.looks]).toEqual([[0, 1, 2], 1]);
    store(bytes({ id: 'r', index: 1, text: 'x', ...end }));
    state.live?.(bytes({ id: 'r', index: 1, text: 'x', ...end }));
    await vi.advanceTimersByTimeAsync(0);
    expect(indices()).toEqual([0, 1, 2, 3]);
    expect(state.sent.at(-1)).toMatchObject({ token: null, text: '', finish_reason: end.finish_reason });
    expect(isClean()).toBe(true);
  });
});

describe('cancel', () => {
  test('is answered by the gateway when the request was still queued', async () => {
    const { relay, state, isClean } = bench();
    relay.admitted(item);
    await relay.submit(item);
    relay.cancel();
    relay.cancel();
    await vi.advanceTimersByTimeAsync(EXECUTOR_ANSWER_MS);
    expect(state.sent).toMatchObject([
      { index: 0, token: null, finish_reason: 'cancelled', usage: { total_tokens: 2 } },
    ]);
    expect([state.published.length, state.expected]).toEqual([1, [0]]);
    expect(isClean()).toBe(true);
  });

  test('is not answered by the gateway when the executor stores a token in the same moment', async () => {
    const { relay, state, indices, isClean, store, storeAndSay } = bench();
    await relay.submit(item);
    state.refusal = new LaminaError('duplicate_id', 'the answer has messages');
    relay.cancel();
    store(bytes(token(0)), 5);
    await vi.advanceTimersByTimeAsync(EXECUTOR_ANSWER_MS);
    expect([state.expected, state.outcomes, state.reads]).toEqual([[0], [], 1]);
    storeAndSay(bytes({ id: 'r', index: 1, token: null, text: '', finish_reason: 'cancelled' }));
    expect(indices()).toEqual([0, 1]);
    expect([state.published, state.outcomes, state.finals]).toEqual([[], ['cancelled'], 1]);
    expect(isClean()).toBe(true);
  });

  test('is left to the executor when tokens have come, and repeated until it answers', async () => {
    const { relay, state, isClean } = bench();
    await relay.submit(item);
    state.live?.(bytes(token(0)));
    relay.cancel();
    await vi.advanceTimersByTimeAsync(3_000);
    expect(state.published).toEqual([]);
    expect(state.cancels).toBeGreaterThan(1);
    state.live?.(bytes({ id: 'r', index: 1, token: null, text: '', finish_reason: 'cancelled' }));
    expect(state.outcomes).toEqual(['cancelled']);
    expect(isClean()).toBe(true);
  });

  test('of a request whose executor died is answered by the gateway, behind the last token that is stored', async () => {
    const { relay, state, indices, isClean, store } = bench();
    await relay.submit(item);
    store(bytes(token(0), token(1)), 17);
    state.live?.(bytes(token(0), token(1)));
    relay.cancel();
    await vi.advanceTimersByTimeAsync(EXECUTOR_ANSWER_MS + 2_000);
    expect([state.outcomes, state.expected]).toEqual([[], []]);
    await vi.advanceTimersByTimeAsync(1_000);
    expect(indices()).toEqual([0, 1, 2]);
    expect(state.sent.at(-1)).toMatchObject({
      token: null,
      finish_reason: 'cancelled',
      usage: { completion_tokens: 2 },
    });
    expect(state.published).toEqual([state.sent.at(-1)]);
    expect(state.expected).toEqual([17]);
    expect(state.cancels).toBe(4);
    expect(isClean()).toBe(true);
  });

  test('of such a request is answered also when the stream takes nothing', async () => {
    const { relay, state, isClean } = bench();
    state.isStreamDown = true;
    await relay.submit(item);
    relay.cancel();
    await vi.advanceTimersByTimeAsync(EXECUTOR_ANSWER_MS + 3_000);
    expect(state.outcomes).toEqual(['cancelled']);
    expect(isClean()).toBe(true);
  });

  test('before the item was submitted means that it never is', async () => {
    const { relay, state, isClean } = bench({ submit: () => Promise.reject(new Error('must not be called')) });
    relay.cancel();
    await relay.submit(item);
    expect(state.outcomes).toEqual(['cancelled']);
    expect(isClean()).toBe(true);
  });
});

describe('a deadline', () => {
  test('that passes before there was a place in the queue is answered at once', async () => {
    const { relay, state, isClean } = bench({ submit: () => Promise.reject(new Error('must not be called')) });
    relay.admitted({ ...item, deadlineAtMs: Date.now() + 1_000 });
    await vi.advanceTimersByTimeAsync(1_000);
    await relay.submit(item);
    expect(state.outcomes).toEqual(['deadline_exceeded']);
    expect(isClean()).toBe(true);
  });

  test('that passes in the queue is answered by the gateway', async () => {
    const { relay, state, isClean } = bench();
    relay.admitted({ ...item, deadlineAtMs: Date.now() + 1_000 });
    await relay.submit(item);
    await vi.advanceTimersByTimeAsync(1_000 + EXECUTOR_ANSWER_MS - 1);
    expect(state.sent).toEqual([]);
    await vi.advanceTimersByTimeAsync(1);
    expect(state.outcomes).toEqual(['deadline_exceeded']);
    expect(isClean()).toBe(true);
  });

  test('that passes while no executor has the request is answered by the gateway', async () => {
    const { relay, state, isClean } = bench();
    relay.admitted({ ...item, deadlineAtMs: Date.now() + 1_000 });
    await relay.submit(item);
    state.live?.(bytes(token(0)));
    await vi.advanceTimersByTimeAsync(1_000 + EXECUTOR_ANSWER_MS + 3_000);
    expect(state.outcomes).toEqual(['deadline_exceeded']);
    expect(state.sent.at(-1)).toMatchObject({ index: 1, token: null, error: { code: 'deadline_exceeded' } });
    expect(isClean()).toBe(true);
  });

  test('in the far future fires neither now nor ever before', async () => {
    const { relay, state } = bench();
    relay.admitted({ ...item, deadlineAtMs: Date.now() + 1e15 });
    await relay.submit(item);
    await vi.advanceTimersByTimeAsync(60_000);
    expect(state.outcomes).toEqual([]);
    relay.fail(new LaminaError('unavailable', 'end'));
  });
});
