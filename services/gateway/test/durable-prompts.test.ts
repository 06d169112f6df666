import type { DurablePrompt } from '@lamina/bus';
import type { TokenMessage, WorkItem } from '@lamina/protocol';
import { Counter } from '@lamina/runtime';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import type { ClusterState } from '../src/cluster-view.ts';
import { DurablePrompts } from '../src/durable-prompts.ts';

const DOWN: ClusterState = { status: 'unavailable', reason: 'a test' };
const ready = (kvCapacityTokens: number): ClusterState => ({
  status: 'ok',
  executors: 1,
  shards: 1,
  freeBlocks: 1,
  kvCapacityTokens,
});

/** Plays LAMINA_PROMPTS, the other streams and the tokenizer, and counts what is asked of them. */
function bench() {
  const state = {
    cluster: DOWN,
    offered: [] as DurablePrompt[],
    numBodyReads: 0,
    numStreamReads: 0,
    numTokenized: 0,
    /** Each 'id: tokens'. */
    submitted: [] as string[],
    stored: [] as TokenMessage[],
    numDone: 0,
  };
  const offer = (sequence: number, body: object, storedAtMs = Date.now()): void => {
    state.offered.push({
      sequence,
      storedAtMs,
      get data() {
        state.numBodyReads++;
        return Buffer.from(JSON.stringify(body));
      },
      header: () => undefined,
      done: () => state.numDone++,
      putBack: (delayMs) => void setTimeout(() => offer(sequence, body, storedAtMs), delayMs),
      setAside: () => {
        throw new Error('there is place for all');
      },
    });
  };
  const counter = new Counter({ name: 'prompts', help: 'x', labelNames: ['outcome'], registers: [] });
  const prompts = new DurablePrompts({
    model: {
      modelId: 'tiny',
      vocabSize: 10,
      contextLength: 1_000,
      maxTokenBytes: 8,
      generationDefaults: { temperature: null, topP: null, topK: null, minP: null, maxNewTokens: null },
    },
    promptTokenizer: {
      encode: async (prompt) => {
        state.numTokenized++;
        return Array.from({ length: 'text' in prompt ? prompt.text.length : 0 }, () => 1);
      },
    },
    cluster: { recent: async () => state.cluster },
    prompts: {
      take: async () => {
        await new Promise((resolve) => setTimeout(resolve, 10));
        return state.offered.shift();
      },
    },
    tokens: {
      append: async (tokens) => state.stored.push(...tokens),
      endOf: async () => {
        state.numStreamReads++;
        return undefined;
      },
    },
    locate: async () => {
      state.numStreamReads++;
      return 'unknown';
    },
    submit: async ({ id, tokenIds }: WorkItem) => state.submitted.push(`${id}: ${tokenIds.length}`),
    counter: () => counter,
    log: { debug: () => undefined, error: () => undefined },
    complain: () => undefined,
  });
  void prompts.run();
  return { prompts, state, offer };
}

beforeEach(() => vi.useFakeTimers());
afterEach(() => vi.useRealTimers());

test('while nobody can answer, a prompt in hand is read once, and no stream', async () => {
  const { prompts, state, offer } = bench();
  offer(1, { prompt: 'Hi' });
  await vi.advanceTimersByTimeAsync(60_000);
  expect([state.numBodyReads, state.numStreamReads, state.numTokenized]).toEqual([1, 0, 0]);
  state.cluster = ready(100);
  await vi.advanceTimersByTimeAsync(1_000);
  expect([state.submitted, state.numBodyReads, state.numDone]).toEqual([['p1: 2'], 1, 1]);
  prompts.stop();
});

test('while nobody can answer, a prompt ends all the same if it is bad, cancelled or late', async () => {
  const { prompts, state, offer } = bench();
  offer(1, { prompt: '', max_tokens: 0 });
  offer(2, { prompt: 'Hi', id: 'cancelled' });
  offer(3, { prompt: 'Hi', id: 'late', deadline_ms: 5_000 });
  await vi.advanceTimersByTimeAsync(1_000);
  prompts.cancel('cancelled');
  await vi.advanceTimersByTimeAsync(10_000);
  expect(state.stored.map(({ id, finish_reason, error }) => [id, error?.code ?? finish_reason])).toEqual([
    ['p1', 'invalid_request'],
    ['cancelled', 'cancelled'],
    ['late', 'deadline_exceeded'],
  ]);
  expect(state.numDone).toBe(3);
  prompts.stop();
});

test('a prompt that needs more KV than there is is tokenized once before there is as much, and is not read meanwhile', async () => {
  const { prompts, state, offer } = bench();
  state.cluster = ready(100);
  offer(1, { prompt: 'x'.repeat(150), max_tokens: 50 });
  await vi.advanceTimersByTimeAsync(60_000);
  expect([state.numTokenized, state.numBodyReads]).toEqual([1, 1]);
  state.cluster = DOWN;
  await vi.advanceTimersByTimeAsync(60_000);
  state.cluster = ready(199);
  await vi.advanceTimersByTimeAsync(60_000);
  expect([state.numTokenized, state.numBodyReads, state.submitted]).toEqual([1, 1, []]);
  state.cluster = ready(200);
  await vi.advanceTimersByTimeAsync(10_000);
  expect([state.submitted, state.numTokenized, state.numBodyReads]).toEqual([['p1: 150'], 2, 2]);
  prompts.stop();
});

test.each([
  ['cancelled', {}],
  ['deadline_exceeded', { deadline_ms: 30_000 }],
])('a prompt that needs more KV than there is can be %s', async (end, more) => {
  const { prompts, state, offer } = bench();
  state.cluster = ready(100);
  offer(1, { prompt: 'x'.repeat(150), ...more });
  await vi.advanceTimersByTimeAsync(20_000);
  expect(state.stored).toEqual([]);
  if (end === 'cancelled') prompts.cancel('p1');
  await vi.advanceTimersByTimeAsync(20_000);
  expect(state.stored.map(({ finish_reason, error }) => error?.code ?? finish_reason)).toEqual([end]);
  expect([state.numDone, state.numTokenized]).toEqual([1, 1]);
  prompts.stop();
});

test('a prompt of a new stream is not taken for the one that had its sequence, and one beyond the context is refused', async () => {
  const { prompts, state, offer } = bench();
  state.cluster = ready(100);
  offer(1, { prompt: 'x'.repeat(150), id: 'large' });
  await vi.advanceTimersByTimeAsync(3_000);
  offer(1, { prompt: 'Hi', id: 'small' });
  offer(2, { prompt: 'x'.repeat(1_000), id: 'endless' });
  await vi.advanceTimersByTimeAsync(1_000);
  expect(state.submitted).toEqual(['small: 2']);
  expect(state.stored.map(({ id, error }) => [id, error?.code])).toEqual([['endless', 'context_length_exceeded']]);
  prompts.stop();
});
