import { type GenerateRequest, parseGenerateBody } from '@lamina/protocol';
import { describe, expect, test } from 'vitest';
import { admit, promptOf, type ServedModel } from '../src/admission.ts';
import { createChat } from '../src/chat.ts';
import { createPromptEncoder } from '../src/prompt-encoder.ts';

const model: ServedModel = {
  modelId: 'tiny',
  contextLength: 32,
  vocabSize: 100,
  maxTokenBytes: 8,
  generationDefaults: { temperature: 0.7, topP: 0.9, topK: null, minP: null, maxNewTokens: 10 },
};
const template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}";
const chat = createChat({ modelId: 'tiny', chatTemplate: template, specialTokens: {} });
const facts = { id: 'r', encoding: 'json', nowMs: 1_000, randomSeed: 7, kvCapacityTokens: 1_000 } as const;

const bodyOf = (value: unknown): GenerateRequest =>
  parseGenerateBody(new TextEncoder().encode(JSON.stringify(value))).request;
const admitted = (value: object, promptTokens = 4) =>
  admit(bodyOf({ prompt: 'x', ...value }), new Array<number>(promptTokens).fill(1), model, facts);

describe('the prompt', () => {
  test('is text as it is, or messages', () => {
    expect(promptOf(bodyOf({ prompt: 'hello' }), model)).toEqual({ text: 'hello' });
    const messages = [{ role: 'user', content: 'hi' }];
    expect(promptOf(bodyOf({ messages }), model)).toEqual({ messages });
  });

  test('is the rendered conversation, which holds its special tokens already', () => {
    const encoded: unknown[] = [];
    const tokenizer = {
      encode: (...given: unknown[]): number[] => {
        encoded.push(given);
        return [1];
      },
    };
    const encode = createPromptEncoder(model, chat, tokenizer);
    encode({ messages: [{ role: 'user', content: 'hi' }] });
    encode({ text: 'hello' });
    expect(encoded).toEqual([
      ['user:hi;', { addSpecialTokens: false }],
      ['hello', { addSpecialTokens: true }],
    ]);
    expect(() => encode({ messages: [{ role: 'user', content: 'a'.repeat(32 * 64) }] })).toThrow(
      expect.objectContaining({ code: 'context_length_exceeded' }),
    );
  });

  test('names the served model when another one is asked for', () => {
    expect(() => promptOf(bodyOf({ prompt: 'x', model: 'big' }), model)).toThrow(
      expect.objectContaining({ code: 'unknown_model', message: expect.stringContaining('"tiny" is') }),
    );
  });

  test('has only tokens that the model knows', () => {
    expect(promptOf(bodyOf({ token_ids: [0, 99] }), model)).toEqual({ tokenIds: [0, 99] });
    expect(() => promptOf(bodyOf({ token_ids: [0, 100] }), model)).toThrow(
      expect.objectContaining({ code: 'invalid_request', message: expect.stringContaining('token_ids.1: 100') }),
    );
  });

  test('has no special tokens that the tokenizer declares and the model cannot read', () => {
    expect(() => admit(bodyOf({ prompt: 'x' }), [1, 100], model, facts)).toThrow(
      expect.objectContaining({ code: 'invalid_request', message: expect.stringContaining('token 100') }),
    );
  });

  test('is refused before it is tokenized when it cannot fit', () => {
    expect(() => promptOf(bodyOf({ prompt: 'a'.repeat(32 * 64 + 1) }), model)).toThrow(
      expect.objectContaining({ code: 'context_length_exceeded' }),
    );
  });

  test('must not be messages where there is no chat template, or one that refuses them', () => {
    const none = createChat({ modelId: 'tiny', chatTemplate: null, specialTokens: {} });
    const strict = createChat({ modelId: 'tiny', chatTemplate: "{{ raise_exception('no') }}", specialTokens: {} });
    const broken = createChat({ modelId: 'tiny', chatTemplate: '{% for %}', specialTokens: {} });
    const empty = createChat({ modelId: 'tiny', chatTemplate: '', specialTokens: {} });
    for (const render of [none, strict, broken, empty]) {
      const encode = createPromptEncoder(model, render, { encode: () => [1] });
      expect(() => encode({ messages: [{ role: 'user', content: 'hi' }] })).toThrow(
        expect.objectContaining({ code: 'invalid_request' }),
      );
    }
  });
});

describe('the length', () => {
  test('defaults to what generation_config.json says, cut to the context and the KV', () => {
    expect(admitted({}).maxTokens).toBe(10);
    expect(admitted({}, 30).maxTokens).toBe(2);
    expect(admit(bodyOf({ prompt: 'x' }), [1, 2], model, { ...facts, kvCapacityTokens: 5 }).maxTokens).toBe(3);
  });

  test('of prompt and max_tokens together must fit the context, and the message says what does', () => {
    expect(admitted({ max_tokens: 28 }).maxTokens).toBe(28);
    expect(() => admitted({ max_tokens: 29 })).toThrow(
      expect.objectContaining({ code: 'context_length_exceeded', message: expect.stringContaining('at most 28') }),
    );
    expect(() => admitted({}, 32)).toThrow(
      expect.objectContaining({ code: 'context_length_exceeded', message: expect.stringContaining('32 tokens') }),
    );
  });

  test('must fit the KV of the cluster', () => {
    const small = { ...facts, kvCapacityTokens: 16 };
    expect(() => admit(bodyOf({ prompt: 'x', max_tokens: 15 }), [1, 2], model, small)).toThrow(
      expect.objectContaining({ code: 'kv_capacity_exceeded' }),
    );
    expect(() => admit(bodyOf({ prompt: 'x' }), new Array<number>(16).fill(1), model, small)).toThrow(
      expect.objectContaining({ code: 'kv_capacity_exceeded' }),
    );
  });

  test('of a prompt is at least one token', () => {
    expect(() => admit(bodyOf({ prompt: 'x' }), [], model, facts)).toThrow(
      expect.objectContaining({ code: 'invalid_request' }),
    );
  });
});

describe('sampling', () => {
  test('comes from the request, else the model, else the defaults of OpenAI', () => {
    expect(admitted({ temperature: 0, seed: 3 }).sampling).toEqual({
      temperature: 0,
      topP: 0.9,
      topK: 0,
      minP: 0,
      seed: 3,
    });
    const silent = {
      ...model,
      generationDefaults: { temperature: null, topP: null, topK: null, minP: null, maxNewTokens: null },
    };
    const item = admit(bodyOf({ prompt: 'x' }), [1], silent, facts);
    expect(item.sampling).toEqual({ temperature: 1, topP: 1, topK: 0, minP: 0, seed: 7 });
    expect(item.maxTokens).toBe(31);
  });

  test('takes logprobs as a flag or as a number of alternatives', () => {
    expect(admitted({}).logprobs).toBeNull();
    expect(admitted({ logprobs: false }).logprobs).toBeNull();
    expect(admitted({ logprobs: true }).logprobs).toBe(0);
    expect(admitted({ logprobs: 5 }).logprobs).toBe(5);
  });

  test('turns deadline_ms into a point in time', () => {
    expect(admitted({}).deadlineAtMs).toBeNull();
    expect(admitted({ deadline_ms: 500 }).deadlineAtMs).toBe(1_500);
  });
});
