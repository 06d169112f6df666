/** Owns a relay with a bus, a queue, a stream and a client that tests play. */
import { decodeTokens, encodeTokens, type TokenMessage, type WorkItem } from '@lamina/protocol';
import type { LaminaError } from '@lamina/tensor';
import { expect, vi } from 'vitest';
import { FewAtATime } from '../src/few-at-a-time.ts';
import { Relay, type RelayLinks } from '../src/relay.ts';
import type { RequestState } from '../src/request-state.ts';

export const item: WorkItem = {
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

export const token = (index: number, last = false): TokenMessage => ({
  id: 'r',
  index,
  token: index + 10,
  text: `t${index}`,
  finish_reason: last ? 'stop' : null,
});
export const bytes = (...messages: TokenMessage[]): Uint8Array => encodeTokens(messages, 'json');

/** Plays the bus and the client; `live` is what a relay listens to at the moment, `stored` what it finds in the stream. */
export function bench(overrides: Partial<RelayLinks['queue']> = {}, located: RequestState = 'unknown') {
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
