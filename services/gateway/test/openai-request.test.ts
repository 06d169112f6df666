import { LIMITS } from '@lamina/protocol';
import { expect, test } from 'vitest';
import { readChatCompletion, readCompletion } from '../src/http/openai-request.ts';

const chat = (body: object): unknown => readChatCompletion(body, undefined);
const completion = (body: object): unknown => readCompletion(body, undefined);
const withContent = (content: unknown): object => ({ messages: [{ role: 'user', content }] });
const part = { type: 'text', text: 'x' };
const hello = [{ role: 'user', content: 'Hello' }];

test('content is text or parts of text, a prompt text, one text in an array or token ids', () => {
  const { contentParts, messages } = LIMITS;
  for (const [content, text] of [
    ['Hello', 'Hello'],
    ['', ''],
    [[], ''],
    [
      [
        { ...part, text: 'Hel' },
        { ...part, text: 'lo' },
      ],
      'Hello',
    ],
    [new Array(contentParts).fill(part), 'x'.repeat(contentParts)],
  ])
    expect(chat(withContent(content))).toMatchObject({ generate: { messages: [{ role: 'user', content: text }] } });
  const most = new Array(messages).fill({ role: 'developer', content: 'x', name: 'n' });
  expect(chat({ messages: most })).toMatchObject({
    generate: { messages: new Array(messages).fill({ role: 'system', content: 'x' }) },
  });
  expect(completion({ prompt: 'a' })).toMatchObject({ generate: { prompt: 'a' } });
  expect(completion({ prompt: ['a'] })).toMatchObject({ generate: { prompt: 'a' } });
  expect(completion({ prompt: [1] })).toMatchObject({ generate: { token_ids: [1] } });
  const ids = new Array<number>(LIMITS.promptTokens).fill(7);
  expect(completion({ prompt: ids })).toMatchObject({ generate: { token_ids: { length: ids.length } } });
});

const NO_PROMPT = 'prompt: must be one text or one array of token ids';
const NO_PARTS = 'messages.0.content: must be text, or an array of parts of the type "text"';
test.for<[string, () => unknown, string]>([
  ['no prompt', () => completion({}), NO_PROMPT],
  ['an empty prompt array', () => completion({ prompt: [] }), NO_PROMPT],
  ['two prompts', () => completion({ prompt: ['a', 'b'] }), NO_PROMPT],
  ['mixed prompts', () => completion({ prompt: [1, 'b'] }), NO_PROMPT],
  ['a fraction as token', () => completion({ prompt: [1.5] }), 'token_ids.0: must be an integer that is at least 0'],
  ['no messages', () => chat({}), 'messages: must be an array of messages'],
  ['empty messages', () => chat({ messages: [] }), 'messages: must not be empty'],
  ['an object as content', () => chat(withContent({})), NO_PARTS],
  [
    'a part that is none',
    () => chat(withContent([part, { type: 'image_url' }])),
    'messages.0.content.1: must be {"type": "text", "text": <text>}',
  ],
  ['metadata of numbers', () => chat({ messages: hello, metadata: { a: 1 } }), 'metadata: must be an object of texts'],
])('%s is named', ([, read, message]) => {
  expect(read).toThrow(expect.objectContaining({ code: 'invalid_request', message }));
});

const many = new Array<number>(2_000_000).fill(1);
const keys = Object.fromEntries(Array.from({ length: 100_000 }, (_, index) => [`k${index}`, 1]));
test.for<[string, () => unknown, string | RegExp]>([
  ['messages', () => chat({ messages: many }), `messages: at most ${LIMITS.messages} messages are taken`],
  ['content', () => chat(withContent(many)), `messages.0.content: at most ${LIMITS.contentParts} parts are taken`],
  ['stop', () => chat({ messages: hello, stop: many }), 'stop: at most 16 stop strings are taken'],
  [
    'prompt',
    () => completion({ prompt: many }),
    `prompt: has 2000000 tokens; at most ${LIMITS.promptTokens} are taken`,
  ],
  ['texts as prompt', () => completion({ prompt: new Array(1_000_000).fill('') }), NO_PROMPT],
  ['metadata', () => chat({ messages: hello, metadata: keys }), 'metadata: must be an object of texts'],
  [
    'content in every message',
    () => chat({ messages: new Array(LIMITS.messages).fill({ role: 'user', content: new Array(1024).fill(1) }) }),
    /^(messages\.\d+\.content\.0: must be {"type": "text", "text": <text>}(; |$)){16}and 1008 more$/,
  ],
])('an enormous array of %s is refused at once with a short error', ([, read, message]) => {
  const before = process.cpuUsage();
  expect(read).toThrow(
    expect.objectContaining({
      code: 'invalid_request',
      message: expect.stringMatching(typeof message === 'string' ? `^${message}$` : message),
    }),
  );
  // Of this process, whatever else the machine does.
  expect(process.cpuUsage(before).user).toBeLessThan(150_000);
});
