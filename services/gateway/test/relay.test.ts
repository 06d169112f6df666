/** Tokens of an answer on their way through a relay: each once, in order, whatever is missed or doubted. */
import type { TokenMessage } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { bench, bytes, item, token } from './relay-bench.ts';

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
