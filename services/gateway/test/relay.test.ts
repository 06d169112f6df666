import { decodeTokens, encodeTokens, type TokenMessage, type WorkItem } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { FewAtATime } from '../src/few-at-a-time.ts';
import { EXECUTOR_ANSWER_MS, Relay, type RelayLinks } from '../src/relay.ts';
import type { RequestState } from '../src/request-state.ts';

const item: WorkItem = {
  id: 'r',
  model: 'tiny',
  tokenIds: [1, 2],
  maxTokens: 8,
  sampling: { temperature: 0, topP: 1, topK: 0, minP: 0, seed: 1 },
  stop: [],
  logprobs: null,
  ignoreEos: false,
  priority: 0,
  deadlineAtMs: null,
  encoding: 'json',
  submittedAtMs: 0,
};

const token = (index: number, last = false): TokenMessage => ({
  id: 'r',
  index,
  token: index + 10,
  text: `t${index}`,
  finish_reason: last ? 'stop' : null,
});
const bytes = (...messages: TokenMessage[]): Uint8Array => encodeTokens(messages, 'json');

/** Plays the bus and the client; `live` is what a relay listens to at the moment, `stored` what it finds in the stream. */
function bench(overrides: Partial<RelayLinks['queue']> = {}, located: RequestState = 'unknown') {
  const state = {
    live: undefined as ((data: Uint8Array) => void) | undefined,
    doubt: undefined as (() => void) | undefined,
    stored: [] as { readonly data: Uint8Array; readonly sequence: number }[],
    /** Reads of the stream that are not answered before this resolves. */
    reading: Promise.resolve() as Promise<unknown>,
    looks: 0,
    reads: 0,
    cancels: 0,
    published: [] as TokenMessage[],
    /** What `append` was told to be the last message. */
    expected: [] as number[],
    refusal: undefined as LaminaError | undefined,
    isStreamDown: false,
    sent: [] as TokenMessage[],
    finals: 0,
    outcomes: [] as string[],
  };
  const links: RelayLinks = {
    tokens: {
      follow: (_, callback, onDoubt) => {
        state.doubt = onDoubt;
        state.live = (data) => callback({ data });
        return { unsubscribe: () => (state.live = undefined) };
      },
      endOf: async () => {
        state.looks++;
        const last = state.stored.at(-1);
        await state.reading;
        if (last === undefined) return undefined;
        const end = decodeTokens(last.data).at(-1)!;
        const nextIndex = end.token === null ? undefined : end.index + 1;
        return { sequence: last.sequence, isComplete: end.finish_reason !== null, nextIndex };
      },
      read: async (_, lastSequence, take) => {
        state.reads++;
        for (const { data, sequence } of [...state.stored])
          if (sequence > lastSequence || !take(data, sequence)) return;
      },
      append: async (tokens, _, lastSequence) => {
        state.expected.push(lastSequence);
        if (state.refusal !== undefined) throw state.refusal;
        if (state.isStreamDown) return undefined;
        state.published.push(...tokens);
        return lastSequence + 1;
      },
    },
    readers: new FewAtATime(1),
    queue: { submit: async () => 1, ...overrides },
    locate: async () => located,
    publishCancel: () => state.cancels++,
  };
  const sink = {
    send: (messages: readonly TokenMessage[], data: Uint8Array, isFinal: boolean) => {
      state.sent.push(...messages);
      expect(Buffer.from(data)).toEqual(Buffer.from(encodeTokens(messages, 'json')));
      if (isFinal) state.finals++;
    },
  };
  const relay = new Relay('r', 'json', sink, links, {
    onTokens: () => undefined,
    onRepair: () => undefined,
    onClosed: (_, outcome) => state.outcomes.push(outcome),
  });
  const indices = (): number[] => state.sent.map((message) => message.index);
  const isClean = (): boolean => state.live === undefined && vi.getTimerCount() === 0;
  const store = (data: Uint8Array, sequence = state.stored.length + 1): void => {
    state.stored.push({ data, sequence });
  };
  const storeAndSay = (data: Uint8Array): void => {
    store(data);
    state.live?.(data);
  };
  return { relay, state, indices, isClean, store, storeAndSay };
}

beforeEach(() => vi.useFakeTimers());
afterEach(() => vi.useRealTimers());

describe('tokens', () => {
  test('are relayed once and in order, several in one message or one', async () => {
    const { relay, state, indices, isClean } = bench();
    await relay.submit(item);
    state.live?.(bytes(token(0)));
    state.live?.(bytes(token(1), token(2)));
    state.live?.(bytes(token(1), token(2)));
    state.live?.(bytes(token(2), token(3)));
    state.live?.(bytes(token(4, true)));
    expect(indices()).toEqual([0, 1, 2, 3, 4]);
    expect(state.finals).toBe(1);
    expect(state.outcomes).toEqual(['stop']);
    expect(isClean()).toBe(true);
  });

  test('that come before the queue has taken the item wait for it', async () => {
    let take: (sequence: number) => void = () => undefined;
    const { relay, state, indices } = bench({ submit: () => new Promise((resolve) => (take = resolve)) });
    const submitted = relay.submit(item);
    state.live?.(bytes(token(0)));
    expect(indices()).toEqual([]);
    take(1);
    await submitted;
    expect(indices()).toEqual([0]);
  });

  test('of the same request that somebody else has submitted are read from the start', async () => {
    let refuse: (error: Error) => void = () => undefined;
    const submit = (): Promise<number> => new Promise((_, reject) => (refuse = reject));
    const { relay, state, indices, isClean, store, storeAndSay } = bench({ submit }, 'working');
    store(bytes(token(0)));
    const submitted = relay.submit(item);
    storeAndSay(bytes(token(1)));
    refuse(new LaminaError('duplicate_id', 'used'));
    await submitted;
    expect(indices()).toEqual([0, 1]);
    state.live?.(bytes(token(2, true)));
    expect(indices()).toEqual([0, 1, 2]);
    expect(isClean()).toBe(true);
  });

  test('of a request with the same id that left no trace are never relayed', async () => {
    let refuse: (error: Error) => void = () => undefined;
    const { relay, state, isClean } = bench({ submit: () => new Promise((_, reject) => (refuse = reject)) });
    const submitted = relay.submit(item);
    state.live?.(bytes(token(0)));
    refuse(new LaminaError('duplicate_id', 'used'));
    await submitted;
    expect(state.sent.map((message) => message.error?.code)).toEqual(['duplicate_id']);
    expect(isClean()).toBe(true);
  });

  test('of a request that the queue may have taken are for nobody, unless its client can ask again', async () => {
    for (const [isNamed, cancels] of [
      [false, 1],
      [true, 0],
    ] as const) {
      const { relay, state, isClean } = bench({ submit: () => Promise.reject(new LaminaError('unavailable', 'gone')) });
      await relay.submit(item, isNamed);
      expect(state.sent.map((message) => message.error?.code)).toEqual(['unavailable']);
      expect(state.cancels).toBe(cancels);
      expect(isClean()).toBe(true);
    }
  });

  test('that were missed are read from the stream', async () => {
    const { relay, state, indices, isClean, store, storeAndSay } = bench();
    await relay.submit(item);
    storeAndSay(bytes(token(0)));
    store(bytes(token(1)));
    storeAndSay(bytes(token(2)));
    await vi.advanceTimersByTimeAsync(0);
    expect([state.reads, indices()]).toEqual([1, [0, 1, 2]]);
    storeAndSay(bytes(token(3)));
    storeAndSay(bytes(token(4, true)));
    expect([state.reads, indices()]).toEqual([1, [0, 1, 2, 3, 4]]);
    expect(isClean()).toBe(true);
  });

  test('that come while the stream is read wait until it is', async () => {
    const { relay, state, indices, isClean, store } = bench();
    await relay.submit(item);
    let answer: (value: unknown) => void = () => undefined;
    state.reading = new Promise((resolve) => (answer = resolve));
    for (const index of [0, 1, 2]) store(bytes(token(index)));
    void relay.reconnected();
    for (const index of [2, 3, 5]) state.live?.(bytes(token(index)));
    await vi.advanceTimersByTimeAsync(0);
    expect(indices()).toEqual([]);
    for (const index of [3, 4, 5]) store(bytes(token(index)), 1 + index);
    answer(undefined);
    await vi.advanceTimersByTimeAsync(0);
    expect(indices()).toEqual([0, 1, 2, 3, 4, 5]);
    state.live?.(bytes(token(6, true)));
    expect(indices()).toEqual([0, 1, 2, 3, 4, 5, 6]);
    expect(isClean()).toBe(true);
  });

  test('are read anew when the connection breaks while they are read', async () => {
    const { relay, state, indices, isClean, store } = bench();
    await relay.submit(item);
    state.reading = new Promise(() => undefined);
    void relay.reconnected();
    for (const index of [0, 1]) store(bytes(token(index)));
    state.reading = Promise.resolve();
    void relay.reconnected();
    await vi.advanceTimersByTimeAsync(0);
    expect([state.looks, indices()]).toEqual([2, [0, 1]]);
    state.live?.(bytes(token(2, true)));
    expect(isClean()).toBe(true);
  });

  test('are not read where nothing was missed, and looked for once more: one may be stored late', async () => {
    const { relay, state, indices, isClean, store, storeAndSay } = bench();
    await relay.submit(item);
    storeAndSay(bytes(token(0)));
    await relay.reconnected();
    expect([state.looks, state.reads]).toEqual([1, 0]);
    store(bytes(token(1, true)));
    await vi.advanceTimersByTimeAsync(1_000);
    expect([state.looks, state.reads, indices()]).toEqual([2, 1, [0, 1]]);
    expect(isClean()).toBe(true);
  });

  test('are looked for no more after that', async () => {
    const { relay, state, storeAndSay } = bench();
    await relay.submit(item);
    storeAndSay(bytes(token(0)));
    await relay.reconnected();
    await vi.advanceTimersByTimeAsync(60_000);
    expect([state.looks, vi.getTimerCount()]).toEqual([2, 0]);
  });

  test('that are lost while the queue has not confirmed the item are read when it has', async () => {
    let take: (sequence: number) => void = () => undefined;
    const { relay, indices, store } = bench({ submit: () => new Promise((resolve) => (take = resolve)) });
    const submitted = relay.submit(item);
    void relay.reconnected();
    store(bytes(token(0)));
    take(1);
    await submitted;
    await vi.advanceTimersByTimeAsync(0);
    expect(indices()).toEqual([0]);
    relay.stop();
  });

  test('whose beginning the stream has no longer are refused to who does not have it', async () => {
    for (const [numHeard, outcomes] of [
      [2, ['unknown_request']],
      [3, []],
    ] as const) {
      const { relay, state, store } = bench();
      await relay.submit(item);
      for (let index = 0; index < numHeard; index++) state.live?.(bytes(token(index)));
      for (const index of [3, 4]) store(bytes(token(index)), 1 + index);
      await relay.reconnected();
      expect(state.outcomes).toEqual(outcomes);
      relay.stop();
    }
  });

  test('before which the stream has nothing yet are waited for, with few looks', async () => {
    const { relay, state, indices, isClean, store } = bench();
    await relay.submit(item);
    store(bytes(token(0)));
    store(bytes(token(2)));
    for (let time = 0; time < 20; time++) state.live?.(bytes(token(2)));
    await vi.advanceTimersByTimeAsync(1_100);
    expect(indices()).toEqual([0]);
    expect(state.looks).toBeLessThan(5);
    for (const index of [1, 2]) store(bytes(token(index)));
    store(bytes(token(3, true)));
    await vi.advanceTimersByTimeAsync(1_000);
    expect(indices()).toEqual([0, 1, 2, 3]);
    expect(isClean()).toBe(true);
  });

  test('beyond what may wait while the stream is read are read then', async () => {
    const { relay, state, indices, isClean, storeAndSay } = bench();
    await relay.submit(item);
    let answer: (value: unknown) => void = () => undefined;
    state.reading = new Promise((resolve) => (answer = resolve));
    void relay.reconnected();
    for (let index = 0; index <= 1_200; index++) storeAndSay(bytes(token(index, index === 1_200)));
    answer(undefined);
    await vi.advanceTimersByTimeAsync(0);
    expect(indices()).toEqual(Array.from({ length: 1_201 }, (_, index) => index));
    expect(isClean()).toBe(true);
  });

  test.each([
    ['also when it has no more', 0],
    ['also when it has the other only later', 100],
  ])('of which two executors wrote some at once are read from the stream, %s', async (_, delayMs) => {
    const other = (index: number): TokenMessage => ({ ...token(index), token: 99 });
    for (const isSame of [true, false]) {
      const { relay, state, indices, isClean, store, storeAndSay } = bench();
      await relay.submit(item);
      storeAndSay(bytes(token(0)));
      state.live?.(bytes(token(1), token(2)));
      store(bytes(token(1)));
      if (delayMs === 0) store(bytes(isSame ? token(2) : other(2)));
      state.doubt?.();
      await vi.advanceTimersByTimeAsync(delayMs);
      expect([state.reads, indices().slice(0, 3)]).toEqual([1, [0, 1, 2]]);
      if (delayMs > 0) store(bytes(isSame ? token(2) : other(2)));
      await vi.advanceTimersByTimeAsync(1_000);
      storeAndSay(bytes(token(3, true)));
      expect(indices()).toEqual([0, 1, 2, 3]);
      expect(state.outcomes).toEqual([isSame ? 'stop' : 'unavailable']);
      expect(state.sent.at(-1)?.token).toBe(isSame ? 13 : null);
      expect(state.cancels).toBe(0);
      expect(isClean()).toBe(true);
    }
  });

  test('other than those that were relayed are asked for in the stream', async () => {
    const { relay, state, store } = bench();
    await relay.submit(item);
    state.live?.(bytes(token(0), token(1)));
    store(bytes(token(0)));
    store(bytes({ ...token(1), token: 99 }));
    state.live?.(bytes({ ...token(1), token: 99 }));
    await vi.advanceTimersByTimeAsync(0);
    expect(state.outcomes).toEqual(['unavailable']);
  });

  test("that come in another's place are in doubt, and the stream decides", async () => {
    const { relay, state, indices, storeAndSay } = bench();
    await relay.submit(item);
    storeAndSay(bytes(token(0)));
    storeAndSay(bytes(token(1)));
    state.live?.(bytes({ ...token(1), token: 99 }));
    await vi.advanceTimersByTimeAsync(1_000);
    expect([state.reads, state.outcomes]).toEqual([2, []]);
    storeAndSay(bytes(token(2, true)));
    expect(indices()).toEqual([0, 1, 2]);
    expect(state.outcomes).toEqual(['stop']);
  });

  test('that are malformed or of another request end this one and stop the executor', async () => {
    for (const bad of [
      new TextEncoder().encode('{"x":1}'),
      new TextEncoder().encode('{'),
      bytes({ ...token(0), id: 'q' }),
    ]) {
      const { relay, state, isClean } = bench();
      await relay.submit(item);
      state.live?.(bad);
      expect(state.outcomes).toEqual(['protocol_violation']);
      expect(state.cancels).toBe(1);
      expect(isClean()).toBe(true);
    }
  });
});

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
