/** The body of lamina.v1.generate as clients write it, well and badly. */
import { describe, expect, test } from 'vitest';
import { packMessage } from '../src/codec.ts';
import { checkGenerateRequest, encodingOf, parseGenerateBody, requestIdOf } from '../src/generate-request.ts';
import { LIMITS } from '../src/limits.ts';

const json = (value: unknown): Uint8Array => Buffer.from(JSON.stringify(value));
const text = (value: string): Uint8Array => Buffer.from(value);

function refusal(body: Uint8Array): string {
  try {
    return `taken: ${JSON.stringify(parseGenerateBody(body)).slice(0, 200)}`;
  } catch (error) {
    return `${Object(error).code}: ${Object(error).message}`;
  }
}

describe('what a body is', () => {
  test.each([
    'Once upon a time',
    ' {"prompt": "x"}',
    '[1, 2]',
    '"quoted"',
    'null',
    '\n',
    'caf\u00e9 \u4f60\u597d \u{1f600}',
    '\u0000',
  ])('%j is a prompt', (prompt) => {
    expect(parseGenerateBody(text(prompt))).toEqual({ encoding: 'json', request: { prompt } });
    expect(encodingOf(text(prompt))).toBe('json');
  });

  test('text whose first byte could begin a msgpack map is a prompt', () => {
    // U+0780 to U+07FF are 0xDE or 0xDF first, the bytes of map 16 and map 32.
    const wrong: string[] = [];
    for (let codePoint = 0x780; codePoint <= 0x7ff; codePoint++) {
      for (const rest of ['', 'a', '\u0000', '\u0000\u0000\u0000', String.fromCodePoint(codePoint).repeat(40)]) {
        const prompt = String.fromCodePoint(codePoint) + rest;
        const { encoding, request } = parseGenerateBody(text(prompt));
        if (encoding !== 'json' || request.prompt !== prompt) wrong.push(prompt);
        if (encodingOf(text(prompt)) !== 'json') wrong.push(prompt);
      }
    }
    expect(wrong).toEqual([]);
  });

  test('a JSON object and a msgpack map say the same, and are answered in kind', () => {
    const request = { prompt: 'Hi', max_tokens: 5, stop: ['a', 'b'], logprobs: true, seed: -7 };
    expect(parseGenerateBody(json(request))).toEqual({ encoding: 'json', request });
    expect(parseGenerateBody(packMessage(request))).toEqual({ encoding: 'msgpack', request });
    expect([encodingOf(json(request)), encodingOf(packMessage(request))]).toEqual(['json', 'msgpack']);
  });

  test('every form of a msgpack map is one, in a Buffer at any offset too', () => {
    const entry = Buffer.concat([packMessage('prompt'), packMessage('x')]);
    for (const head of [[0x81], [0xde, 0, 1], [0xdf, 0, 0, 0, 1]]) {
      const chunk = Buffer.concat([Buffer.alloc(3, 0x81), Buffer.from(head), entry, Buffer.alloc(3, 0xc0)]);
      const body = chunk.subarray(3, chunk.length - 3);
      expect(parseGenerateBody(body)).toEqual({ encoding: 'msgpack', request: { prompt: 'x' } });
    }
    for (let entries = 0; entries <= 15; entries++) {
      const pairs = Array.from({ length: entries }, (_, i) => Buffer.concat([packMessage(`k${i}`), Buffer.of(i)]));
      expect(encodingOf(Buffer.concat([Buffer.of(0x80 + entries), ...pairs]))).toBe('msgpack');
    }
  });

  test('a body that is none of them is refused, and answered in JSON', () => {
    const map = packMessage({ prompt: 'x' });
    const bad = {
      empty: new Uint8Array(0),
      'half a map': map.subarray(0, map.length - 1),
      'a map and more': Buffer.concat([map, Buffer.of(0xc1)]),
      'no UTF-8': Buffer.of(0x61, 0xff),
      'half a letter': Buffer.of(0x61, 0xc3),
      'a msgpack array': packMessage(['x']),
      'half an object': text('{"prompt": "x"'),
      'an object and more': text('{"prompt": "x"} y'),
      'too large': new Uint8Array(LIMITS.generateBodyBytes + 1).fill(0x61),
    };
    const codes = Object.entries(bad).map(([name, body]) => `${name}: ${refusal(body).split(':')[0]}`);
    expect(codes).toEqual(Object.keys(bad).map((name) => `${name}: invalid_request`));
    expect(Object.values(bad).map(encodingOf)).toEqual(Object.values(bad).map(() => 'json'));
    expect(refusal(text('{prompt}'))).toContain('starts with "{" but is not valid JSON');
    const atTheLimit = new Uint8Array(LIMITS.generateBodyBytes).fill(0x61);
    expect(parseGenerateBody(atTheLimit).request.prompt).toHaveLength(LIMITS.generateBodyBytes);
  });

  test('the encoding of a bad request is that of its body', () => {
    const bad = { prompt: 5 };
    expect(refusal(packMessage(bad))).toContain('invalid_request: prompt');
    expect([encodingOf(packMessage(bad)), encodingOf(json(bad)), encodingOf(new Uint8Array(0))]).toEqual([
      'msgpack',
      'json',
      'json',
    ]);
  });

  test('the id of a bad request is found when it is one', () => {
    expect(requestIdOf(json({ id: 'a-1', prompt: 5 }))).toBe('a-1');
    expect(requestIdOf(packMessage({ id: 'a-1', x: 5 }))).toBe('a-1');
    const none = [json({ id: 'a.b' }), json({ id: 5 }), json({}), text('id'), text('{'), new Uint8Array(0)];
    expect(none.map(requestIdOf)).toEqual(none.map(() => undefined));
  });
});

/** Field -> values that are taken, values that are not. Each at its bound and just beyond. */
const FIELDS: Readonly<Record<string, { good: readonly unknown[]; bad: readonly unknown[] }>> = {
  id: {
    good: ['a', 'A-z_0', 'x'.repeat(LIMITS.idCharacters)],
    bad: ['', 'a.b', 'a b', 'a*', 'a>', 'a\n', '\u00e9', 'x'.repeat(LIMITS.idCharacters + 1), 5, null],
  },
  model: { good: ['m', 'm'.repeat(256)], bad: ['', 'm'.repeat(257), 5, null] },
  prompt: { good: ['x', ' '], bad: ['', 5, null, ['x'], {}] },
  max_tokens: { good: [1, LIMITS.maxTokens], bad: [0, -1, 1.5, LIMITS.maxTokens + 1, '5', null, 1e300] },
  temperature: { good: [0, 0.7, 100], bad: [-0.001, 100.001, '1', null] },
  top_p: { good: [0.001, 1], bad: [0, 1.001, -1, '1'] },
  top_k: { good: [0, 1, 1e6], bad: [-1, 0.5, '1'] },
  min_p: { good: [0, 1], bad: [-0.001, 1.001, '0'] },
  seed: { good: [0, -5, 2 ** 53 - 1], bad: [0.5, 2 ** 53, '1'] },
  stop: {
    good: ['a', 's'.repeat(LIMITS.stopStringCharacters), [], new Array(LIMITS.stopStrings).fill('a')],
    bad: ['', 's'.repeat(LIMITS.stopStringCharacters + 1), [''], new Array(LIMITS.stopStrings + 1).fill('a'), 5, [5]],
  },
  logprobs: { good: [true, false, 0, LIMITS.topLogprobs], bad: [-1, LIMITS.topLogprobs + 1, 1.5, 'true', null] },
  ignore_eos: { good: [true, false], bad: [0, 1, 'true', null] },
  priority: { good: [-100, 0, 100], bad: [-101, 101, 0.5, '1'] },
  deadline_ms: { good: [1, 1e9], bad: [0, -1, 0.5, '1', null] },
};
const SOURCES: typeof FIELDS = {
  token_ids: {
    good: [[0], [1, 2, 3], [2 ** 53 - 1]],
    bad: [[], [-1], [0.5], ['1'], [null], [[1]], [2 ** 53], 5, 'text', {}, null],
  },
  messages: {
    good: [[{ role: 'user', content: '' }], new Array(LIMITS.messages).fill({ role: 'tool', content: 'x' })],
    bad: [
      [],
      new Array(LIMITS.messages + 1).fill({ role: 'user', content: 'x' }),
      [{ role: 'robot', content: 'x' }],
      [{ role: 'user' }],
      [{ role: 'user', content: 5 }],
      [{ role: 'user', content: 'x', name: 'y' }],
      ['x'],
      'text',
    ],
  },
};

describe('bounds', () => {
  test.each([...Object.entries(FIELDS), ...Object.entries(SOURCES)])('%s', (field, { good, bad }) => {
    const base = field in SOURCES || field === 'prompt' ? {} : { prompt: 'x' };
    for (const encode of [json, packMessage]) {
      for (const value of good) expect(refusal(encode({ ...base, [field]: value }))).toMatch(/^taken/);
      for (const value of bad)
        expect(refusal(encode({ ...base, [field]: value }))).toMatch(new RegExp(`^invalid_request: ${field}\\b`));
    }
  });

  test('numbers that JSON cannot write are refused in msgpack', () => {
    const fields = ['max_tokens', 'temperature', 'top_p', 'top_k', 'min_p', 'seed', 'logprobs', 'priority'];
    const values = [Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY];
    const taken = fields.flatMap((field) =>
      values.map((value) => refusal(packMessage({ prompt: 'x', [field]: value }))).filter((it) => it.startsWith('t')),
    );
    expect(taken).toEqual([]);
    expect(refusal(text('{"prompt": "x", "temperature": 1e999}'))).toContain('invalid_request: temperature');
  });

  test('a single stop string becomes a list, a prompt of very many tokens is taken', () => {
    expect(parseGenerateBody(json({ prompt: 'x', stop: 'end' })).request.stop).toEqual(['end']);
    const ids = new Array<number>(LIMITS.promptTokens).fill(1);
    expect(parseGenerateBody(packMessage({ token_ids: ids })).request.token_ids).toHaveLength(LIMITS.promptTokens);
    expect(refusal(packMessage({ token_ids: [...ids, 1] }))).toContain(`at most ${LIMITS.promptTokens}`);
  });
});

describe('what is said about a bad request', () => {
  test('every problem at once', () => {
    const said = refusal(json({ prompt: '', max_tokens: 0, top_p: 2, temprature: 1, stop: [''] }));
    for (const part of ['prompt: must not be empty', 'max_tokens: ', 'top_p: ', '"temprature"', 'stop'])
      expect(said).toContain(part);
  });

  test('unknown fields are named, inherited ones are no fields', () => {
    for (const field of ['n', 'stream', '__proto__', 'constructor', 'toString'])
      expect(refusal(text(`{"prompt": "x", "${field}": 1}`))).toContain(`"${field}"`);
    expect(refusal(text('{"__proto__": {"prompt": "x"}}'))).toMatch(/^invalid_request/);
    expect(Object('').polluted).toBeUndefined();
  });

  test('exactly one of prompt, messages and token_ids', () => {
    const one = 'give exactly one of prompt, messages and token_ids';
    expect(refusal(json({}))).toBe(`invalid_request: ${one}; none is there`);
    expect(refusal(json({ prompt: 'x', token_ids: [1] }))).toBe(
      `invalid_request: ${one}; prompt and token_ids are there`,
    );
    const all = { prompt: 'x', token_ids: [1], messages: [{ role: 'user', content: 'x' }] };
    expect(refusal(json(all))).toContain('prompt and messages and token_ids are there');
  });

  test('is short and quick, whatever was sent', () => {
    const bodies = {
      'bad tokens': { token_ids: new Array(900_000).fill('') },
      'bad messages': { messages: new Array(1024).fill({ role: 5, x: 1 }) },
      'many fields': Object.fromEntries(Array.from({ length: 100_000 }, (_, i) => [`field${i}`, 1])),
      'a long field': { ['k'.repeat(3_000_000)]: 1 },
      'a long id': { prompt: 'x', id: '.'.repeat(3_000_000) },
      'a long JSON error': undefined,
    };
    const slow: string[] = [];
    for (const [name, value] of Object.entries(bodies)) {
      const body = value === undefined ? text(`{"prompt": ${'x'.repeat(3_000_000)}`) : json(value);
      const startMs = performance.now();
      const said = refusal(body);
      const tookMs = performance.now() - startMs;
      if (!said.startsWith('invalid_request') || said.length > 10_000 || tookMs > 5000)
        slow.push(`${name}: ${said.length} characters after ${tookMs} ms`);
    }
    expect(slow).toEqual([]);
    expect(refusal(json(bodies['bad tokens']))).toBe(
      'invalid_request: token_ids.0: must be an integer that is at least 0',
    );
    expect(refusal(json(bodies['bad messages']))).toMatch(/and \d+ more$/);
  });

  const many = new Array<number>(2_000_000).fill(1);
  test.for([
    ['messages', { messages: many }, `messages: at most ${LIMITS.messages} messages are taken`],
    ['stop', { prompt: 'x', stop: many }, `stop: at most ${LIMITS.stopStrings} stop strings are taken`],
    ['token_ids', { token_ids: many }, `token_ids: has 2000000 tokens; at most ${LIMITS.promptTokens} are taken`],
    ['prompt', { prompt: many }, 'prompt: Invalid input: expected string, received array'],
    [
      'content',
      { messages: [{ role: 'user', content: many }] },
      'messages.0.content: Invalid input: expected string, received array',
    ],
  ] as const)('two million elements of %s are counted, not looked at', ([, value, message]) => {
    const before = process.cpuUsage();
    expect(() => checkGenerateRequest(value)).toThrow(expect.objectContaining({ code: 'invalid_request', message }));
    // Of this process, whatever else the machine does.
    expect(process.cpuUsage(before).user).toBeLessThan(150_000);
  });

  test('deep nesting is refused, not a crash', () => {
    expect(refusal(text(`{"prompt":${'['.repeat(1_000_000)}${']'.repeat(1_000_000)}}`))).toContain(
      'invalid_request: prompt',
    );
    const deep = Buffer.concat([Buffer.of(0x81, 0xa1, 0x61), Buffer.alloc(1_000_000, 0x91), Buffer.of(0)]);
    expect(refusal(deep)).toMatch(/^invalid_request/);
  });
});
