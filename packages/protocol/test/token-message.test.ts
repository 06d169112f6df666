import { expect, test } from 'vitest';
import { packMessage } from '../src/codec.ts';
import { decodeTokens, encodeTokens, type TokenMessage } from '../src/token-message.ts';

const TOKEN: TokenMessage = { id: 'a-1', index: 0, token: 5, text: ' caf\u00e9', finish_reason: null };
const LAST: TokenMessage = {
  id: 'a-1',
  index: 1,
  token: null,
  text: '',
  finish_reason: 'error',
  usage: { prompt_tokens: 3, completion_tokens: 1, total_tokens: 4 },
  error: { code: 'shard_lost', message: 'gone' },
};
const FULL: TokenMessage = {
  ...TOKEN,
  logprob: -0.25,
  top_logprobs: [
    { token: 5, text: ' caf\u00e9', logprob: -0.25 },
    { token: 6, text: '{"', logprob: -Number.MAX_VALUE },
  ],
};

test.each(['json', 'msgpack'] as const)('one token is an object, several are an array, in %s', (encoding) => {
  for (const messages of [[TOKEN], [FULL], [LAST], [TOKEN, LAST], [FULL, FULL, LAST]])
    expect(decodeTokens(encodeTokens(messages, encoding))).toEqual(messages);
});

test('what a client sees in JSON', () => {
  const text = (messages: TokenMessage[]): string => Buffer.from(encodeTokens(messages, 'json')).toString();
  expect(JSON.parse(text([TOKEN]))).toEqual(TOKEN);
  expect(JSON.parse(text([TOKEN, LAST]))).toEqual([TOKEN, LAST]);
  expect(text([TOKEN])).toBe('{"id":"a-1","index":0,"token":5,"text":" caf\u00e9","finish_reason":null}');
});

test('is read from a Buffer at any offset', () => {
  for (const encoding of ['json', 'msgpack'] as const) {
    const bytes = encodeTokens([FULL, LAST], encoding);
    const chunk = Buffer.concat([Buffer.alloc(5, 0x5b), bytes, Buffer.alloc(5, 0x5d)]);
    expect(decodeTokens(chunk.subarray(5, 5 + bytes.length))).toEqual([FULL, LAST]);
  }
});

test('what is no token message is refused with a code', () => {
  const { id: _, ...withoutId } = TOKEN;
  const bodies: Record<string, Uint8Array> = {
    empty: new Uint8Array(0),
    'half an object': Buffer.from('{"id": "a"'),
    'half an array': Buffer.from('[{}'),
    'not a token': Buffer.from('{}'),
    'an array of nothing': Buffer.from('[]'),
    'an array of something else': Buffer.from('[1]'),
    text: Buffer.from('hello'),
    'half a map': packMessage(TOKEN).subarray(0, 20),
    'a map and more': Buffer.concat([packMessage(TOKEN), Buffer.of(0)]),
    'an id with a dot': packMessage({ ...TOKEN, id: 'a.b' }),
    'no id': packMessage(withoutId),
    'a negative index': packMessage({ ...TOKEN, index: -1 }),
    'a negative token': packMessage({ ...TOKEN, token: -1 }),
    'no text': packMessage({ ...TOKEN, text: null }),
    'another reason': packMessage({ ...TOKEN, finish_reason: 'done' }),
    'another code': packMessage({ ...LAST, error: { code: 'oops', message: '' } }),
    'a log-probability that is none': packMessage({ ...TOKEN, logprob: Number.NaN }),
  };
  const codes = Object.entries(bodies).map(([name, body]) => {
    try {
      decodeTokens(body);
      return `${name}: taken`;
    } catch (error) {
      return `${name}: ${Object(error).code}`;
    }
  });
  expect(codes).toEqual(Object.keys(bodies).map((name) => `${name}: protocol_violation`));
});
