/** The OpenAI API of the gateway over a real nats-server: what it answers to prompts, good and bad. */
import type { WorkLease } from '@lamina/bus';
import { describe, expect, test } from 'vitest';
import { READY, token } from './gateway-bench.ts';
import { allEvents, post, url } from './http-client.ts';
import { answer, kv, lease, restart, tokens, useGateway } from './running-gateway.ts';
import { store } from './store-answer.ts';

useGateway();

const ASK = { model: 'lamina-tiny', messages: [{ role: 'user', content: 'Hello' }] };
const usage = { prompt_tokens: 4, completion_tokens: 2, total_tokens: 6 };

async function answerWithUsage(work: WorkLease): Promise<void> {
  const { id } = work.item;
  const logprobs =
    work.item.logprobs === null ? {} : { logprob: -0.5, top_logprobs: [{ token: 5, text: 't0', logprob: -0.5 }] };
  await store(tokens, [{ ...token(id, 0), ...logprobs }]);
  await store(tokens, [{ ...token(id, 1, 'stop'), ...logprobs, usage }]);
  work.complete();
}

describe('a completion', () => {
  test('of a chat is one object', async () => {
    const asked = post('/v1/chat/completions', {
      ...ASK,
      max_completion_tokens: 9,
      temperature: 0,
      stop: null,
      user: 'me',
    });
    const work = await lease();
    expect(work.item).toMatchObject({ maxTokens: 9, sampling: { temperature: 0 } });
    await answerWithUsage(work);
    const response = await asked;
    expect(response.headers.get('lamina-request-id')).toBe(work.item.id);
    expect(await response.json()).toMatchObject({
      id: work.item.id,
      object: 'chat.completion',
      model: 'lamina-tiny',
      choices: [{ index: 0, message: { role: 'assistant', content: 't0t1' }, finish_reason: 'stop', logprobs: null }],
      usage,
    });
  });

  test('of a prompt has log-probabilities', async () => {
    const asked = post('/v1/completions', { prompt: ['Once'], logprobs: 1, max_tokens: 2 });
    const work = await lease();
    expect(work.item).toMatchObject({ logprobs: 1, maxTokens: 2 });
    await answerWithUsage(work);
    expect(await (await asked).json()).toMatchObject({
      object: 'text_completion',
      choices: [
        {
          text: 't0t1',
          finish_reason: 'stop',
          logprobs: {
            tokens: ['t0', 't1'],
            token_logprobs: [-0.5, -0.5],
            top_logprobs: [{ t0: -0.5 }, { t0: -0.5 }],
            text_offset: [0, 2],
          },
        },
      ],
    });
  });

  test('as a stream is an event per token, whose id is its index', async () => {
    const asked = post('/v1/chat/completions', { ...ASK, stream: true, stream_options: { include_usage: true } });
    await answerWithUsage(await lease());
    const events = await allEvents(await asked);
    expect(events.map(({ id }) => id)).toEqual(['0', '1', undefined, undefined]);
    expect(events.at(-1)?.data).toBe('[DONE]');
    const chunks = events.slice(0, -1).map(({ data }) => JSON.parse(data));
    expect(chunks.map(({ choices }) => choices[0])).toMatchObject([
      { delta: { role: 'assistant', content: 't0' }, finish_reason: null },
      { delta: { content: 't1' }, finish_reason: 'stop' },
      undefined,
    ]);
    expect(chunks.at(-1)).toMatchObject({ object: 'chat.completion.chunk', choices: [], usage });
  });

  test('is the text of the official client: token ids and our own fields, too', async () => {
    const asked = post('/v1/completions', { prompt: [1, 2, 3], top_k: 3, ignore_eos: true, priority: 2, top_p: 0 });
    const work = await lease();
    expect(work.item).toMatchObject({
      tokenIds: [1, 2, 3],
      ignoreEos: true,
      priority: 2,
      sampling: { topK: 3, topP: 1e-6 },
    });
    await answer(work, 1);
    expect((await asked).status).toBe(200);
  });
});

describe('a mistake', () => {
  test.for([
    ['broken JSON', '/v1/completions', '{', 400, 'invalid_request', null],
    ['an array', '/v1/completions', [], 400, 'invalid_request', null],
    ['an unknown field', '/v1/completions', { prompt: 'a', x: 1 }, 400, 'invalid_request', null],
    ['what is not supported', '/v1/completions', { prompt: 'a', n: 2 }, 400, 'invalid_request', 'n'],
    ['no messages', '/v1/chat/completions', {}, 400, 'invalid_request', 'messages'],
    ['a bad temperature', '/v1/completions', { prompt: 'a', temperature: -1 }, 400, 'invalid_request', 'temperature'],
    ['another model', '/v1/completions', { prompt: 'a', model: 'gpt' }, 404, 'unknown_model', null],
    ['too many tokens', '/v1/completions', { prompt: 'a', max_tokens: 5000 }, 400, 'context_length_exceeded', null],
    ['another path', '/v1/embeddings', {}, 404, 'invalid_request', null],
  ] as const)('such as %s has the shape of OpenAI', async ([, path, body, status, code, param]) => {
    const response = await post(path, body);
    const type = 'invalid_request_error';
    expect([response.status, await response.json()]).toEqual([
      status,
      { error: { message: expect.any(String), type, param, code } },
    ]);
  });

  test('also when a stream was asked for', async () => {
    const response = await post('/v1/completions', { prompt: 'a', stream: true, max_tokens: 5000 });
    expect([response.status, await response.json()]).toMatchObject([
      400,
      { error: { code: 'context_length_exceeded' } },
    ]);
  });

  test('of the model in a stream that has begun is its last event', async () => {
    const asked = post('/v1/completions', { prompt: 'a', stream: true });
    const work = await lease();
    const { id } = work.item;
    await store(tokens, [token(id, 0)]);
    const error = { code: 'numeric_error' as const, message: 'NaN' };
    await store(tokens, [{ ...token(id, 1, 'error'), token: null, text: '', error }]);
    work.complete();
    const events = await allEvents(await asked);
    expect(JSON.parse(events[1]!.data)).toMatchObject({ error: { code: 'numeric_error', type: 'server_error' } });
  });

  test('because nobody can answer says when to try again', async () => {
    kv.status = { ...READY, executors: [] };
    const response = await post('/v1/completions', { prompt: 'a' });
    expect([response.status, response.headers.get('retry-after')]).toEqual([503, '1']);
  });

  test('of size is refused before it is read', async () => {
    await restart(['--http-body-bytes', '1k']);
    const response = await post('/v1/completions', { prompt: 'a'.repeat(2_000) });
    expect([response.status, await response.json()]).toMatchObject([413, { error: { code: 'invalid_request' } }]);
  });
});

test('models are listed', async () => {
  expect(await (await fetch(`${url()}/v1/models`)).json()).toMatchObject({
    object: 'list',
    data: [{ id: 'lamina-tiny' }],
  });
  expect((await fetch(`${url()}/v1/models/lamina-tiny`)).status).toBe(200);
  expect((await fetch(`${url()}/v1/models/owner/gpt`)).status).toBe(404);
});
