/** Long prompts beside the event loop: on real worker threads with the tokenizer of lamina-tiny. */
import { monitorEventLoopDelay } from 'node:perf_hooks';
import { fileURLToPath } from 'node:url';
import { loadTokenizer, type Tokenizer, tokenizerDigest } from '@lamina/model';
import { LIMITS } from '@lamina/protocol';
import { afterEach, beforeAll, expect, test } from 'vitest';
import { createChat } from '../src/chat.ts';
import { createPromptEncoder, type EncodePrompt } from '../src/prompt-encoder.ts';
import { PromptThread, type PromptThreadOptions } from '../src/prompt-thread.ts';
import { INLINE_CHARACTERS, PromptTokenizer } from '../src/prompt-tokenizer.ts';

const MODEL = fileURLToPath(new URL('../../../models/lamina-tiny', import.meta.url));
const STORY = 'Once upon a time, there was a little girl named Lily. She had 3 dogs — and 17 cats! ';
const chat = {
  modelId: 'tiny',
  chatTemplate: "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
  specialTokens: {},
};
/** No bound in the way but that of a body. */
const bounds = { contextLength: 8 * 1024 * 1024, maxTokenBytes: 64 };

let tokenizer: Tokenizer;
let worker: PromptThreadOptions['worker'];
let inline: EncodePrompt;
const open: { close(): Promise<void> }[] = [];

beforeAll(async () => {
  tokenizer = await loadTokenizer(MODEL);
  worker = { modelDir: MODEL, digest: await tokenizerDigest(MODEL), bounds, chat };
  inline = createPromptEncoder(bounds, createChat(chat), tokenizer);
});
afterEach(async () => {
  await Promise.all(open.splice(0).map((closable) => closable.close()));
});

function start<T extends { close(): Promise<void> }>(closable: T): T {
  open.push(closable);
  return closable;
}

const textOf = (characters: number, salt = ''): { text: string } => ({
  text: (salt + STORY).repeat(Math.ceil(characters / STORY.length)).slice(0, characters),
});
const prompts = (options: Partial<PromptThreadOptions> = {}): PromptTokenizer =>
  start(new PromptTokenizer(inline, { worker, ...options }));
const thread = (options: Partial<PromptThreadOptions> = {}): PromptThread =>
  start(new PromptThread({ worker, maxWaiting: 8, ...options }));
const encodeOn = (target: PromptThread, characters: number, end = {}): Promise<number[]> =>
  target.encode(textOf(characters), characters, end);

test('the largest prompt leaves the event loop alone, and short and middle-sized ones do not wait for it', async () => {
  const target = prompts();
  await target.encode(textOf(INLINE_CHARACTERS + 1));
  const delay = monitorEventLoopDelay({ resolution: 5 });
  delay.enable();
  const done: string[] = [];
  const startedAt = performance.now();
  const huge = target.encode(textOf(LIMITS.generateBodyBytes)).finally(() => done.push('huge'));
  const middle = target.encode(textOf(64 * 1024)).finally(() => done.push('middle'));
  await target.encode(textOf(100));
  expect(performance.now() - startedAt).toBeLessThan(200);
  done.push('short');
  await middle;
  const hugeIds = await huge;
  await new Promise((resolve) => setTimeout(resolve, 20));
  delay.disable();
  expect(done).toEqual(['short', 'middle', 'huge']);
  const maxDelayMs = delay.max / 1e6;
  const inlineStartedAt = performance.now();
  const expected = inline(textOf(LIMITS.generateBodyBytes));
  const inlineMs = performance.now() - inlineStartedAt;
  expect(
    Buffer.compare(Buffer.from(Int32Array.from(hugeIds).buffer), Buffer.from(Int32Array.from(expected).buffer)),
  ).toBe(0);
  // Inline would hold it up for all of inlineMs.
  expect(maxDelayMs).toBeLessThan(Math.max(300, inlineMs / 4));
  expect(inlineMs).toBeGreaterThan(600);
}, 120_000);

test('tokens and errors are those of inline tokenization, in the order of the requests', async () => {
  const target = prompts();
  const long = 'x y 漢字 👍 <|endoftext|> '.repeat(300);
  const cases = [
    { text: long },
    { messages: [{ role: 'user' as const, content: long }] },
    { messages: Array.from({ length: 200 }, (_, i) => ({ role: 'user' as const, content: `message ${i}` })) },
    textOf(50_000, 'ü'),
  ];
  const order: number[] = [];
  const answers = cases.map((prompt, i) => target.encode(prompt).finally(() => order.push(i)));
  expect(await Promise.all(answers)).toEqual(cases.map(inline));
  expect(order).toEqual([0, 1, 2, 3]);
  await expect(target.encode({ text: `${long}\uD800` })).rejects.toMatchObject({
    code: 'invalid_request',
    message: expect.stringContaining('surrogate'),
  });
});

test('a full queue refuses, and a request that ends gives up its place', async () => {
  const target = thread({ maxWaiting: 2 });
  const running = encodeOn(target, 200_000);
  await expect.poll(() => encodeOn(target, 10).then(() => true)).toBe(true);
  const busy = encodeOn(target, 1_000_000);
  const cancel = new AbortController();
  const cancelled = encodeOn(target, 10, { signal: cancel.signal });
  const expired = encodeOn(target, 10, { deadlineAtMs: Date.now() + 20 });
  await expect(encodeOn(target, 10)).rejects.toMatchObject({ code: 'overloaded' });
  cancel.abort();
  await expect(cancelled).rejects.toMatchObject({ code: 'unavailable' });
  await expect(expired).rejects.toMatchObject({ code: 'deadline_exceeded' });
  const next = encodeOn(target, 10);
  expect(await next).toEqual(inline(textOf(10)));
  await Promise.all([running, busy]);
});

test('a prompt past its time limit is refused, and the next one has a new thread', async () => {
  const target = thread({ timeLimitMs: (characters) => (characters > 100_000 ? 30 : 30_000) });
  const hostile = encodeOn(target, 2_000_000);
  const next = encodeOn(target, 5_000);
  await expect(hostile).rejects.toMatchObject({
    code: 'invalid_request',
    message: expect.stringContaining('longer than'),
  });
  expect(await next).toEqual(inline(textOf(5_000)));
});

test('a prompt that exhausts the memory of its thread is refused, and the next one has a new thread', async () => {
  const target = thread({ maxHeapMiB: 48 });
  const hostile = encodeOn(target, LIMITS.generateBodyBytes);
  const next = encodeOn(target, 5_000);
  await expect(hostile).rejects.toMatchObject({ code: 'invalid_request', message: expect.stringContaining('memory') });
  expect(await next).toEqual(inline(textOf(5_000)));
}, 60_000);

test('a thread that cannot start fails what waits for it, and another tokenizer on disk is not used', async () => {
  const target = thread({ worker: { ...worker, digest: 'another' } });
  await expect(encodeOn(target, 10)).rejects.toMatchObject({
    code: 'unavailable',
    message: expect.stringContaining('changed on disk'),
  });
});

test('close refuses what waits and what runs', async () => {
  const target = thread();
  const all = [encodeOn(target, 1_000_000), encodeOn(target, 10)].map((answer) =>
    expect(answer).rejects.toMatchObject({ code: 'unavailable' }),
  );
  await target.close();
  await Promise.all(all);
  await expect(encodeOn(target, 10)).rejects.toMatchObject({ code: 'unavailable' });
});
