/** What a gateway makes of a prompt, over a real nats-server: a work item, or an error at once; health and ports. */
import { packMessage, SUBJECTS } from '@lamina/protocol';
import { describe, expect, test } from 'vitest';
import { startGateway } from '../../services/gateway/src/service.ts';
import { GATEWAY_FLAGS, READY, token } from './gateway-bench.ts';
import { url } from './http-client.ts';
import { startInProcess } from './in-process.ts';
import { answer, ask, bus, gateway, kv, lease, nats, useGateway, workMessages } from './running-gateway.ts';

useGateway();

describe('a prompt', () => {
  test('as text is tokenized, completed with defaults and answered in JSON', async () => {
    const client = ask('Once upon a time');
    const work = await lease();
    expect(work.item).toMatchObject({
      model: 'lamina-tiny',
      maxTokens: 200,
      sampling: { temperature: 0.7, topP: 0.9, topK: 0, minP: 0 },
      encoding: 'json',
      logprobs: null,
    });
    expect(work.item.tokenIds.length).toBeGreaterThan(2);
    await answer(work);
    await client.final();
    expect(client.messages.map((message) => message.index)).toEqual([0, 1, 2]);
    expect(JSON.parse(Buffer.from(client.bodies[0]!).toString())).toEqual(token(work.item.id, 0));
  });

  test('as JSON keeps its id and its options', async () => {
    const client = ask({
      id: 'mine-1',
      messages: [{ role: 'user', content: 'Hello' }],
      max_tokens: 5,
      temperature: 0,
      seed: 9,
      stop: 'end',
      logprobs: true,
      ignore_eos: true,
      priority: 3,
    });
    const work = await lease();
    expect(work.item).toMatchObject({
      id: 'mine-1',
      maxTokens: 5,
      sampling: { temperature: 0, seed: 9 },
      stop: ['end'],
      logprobs: 0,
      ignoreEos: true,
      priority: 3,
    });
    await answer(work, 1);
    expect(await client.final()).toMatchObject({ id: 'mine-1', finish_reason: 'length' });
  });

  test('as msgpack is answered in msgpack, with the same bytes as the executor wrote', async () => {
    const client = ask(packMessage({ token_ids: [1, 2, 3], max_tokens: 2 }));
    const work = await lease();
    expect(work.item).toMatchObject({ tokenIds: [1, 2, 3], encoding: 'msgpack' });
    await answer(work, 2);
    await client.final();
    expect(Buffer.from(client.bodies[0]!)).toEqual(Buffer.from(packMessage(token(work.item.id, 0))));
  });

  test('costs the kv-manager no question of its own when many come', async () => {
    const clients = Array.from({ length: 20 }, () => ask('Hi'));
    for (let count = 0; count < 20; count++) await answer(await lease(), 1);
    for (const client of clients) await client.final();
    expect(kv.requests).toBe(1);
  });
});

describe('bad input is answered at once', () => {
  const long = Array.from({ length: 1_100 }, () => 1);
  const cases: readonly (readonly [string, Uint8Array | object | string, string, string])[] = [
    ['an empty body', '', 'invalid_request', 'empty'],
    ['neither text nor msgpack', Uint8Array.of(0xff, 0xfe, 0x80), 'invalid_request', 'UTF-8'],
    ['broken JSON', '{"prompt": ', 'invalid_request', 'JSON'],
    ['an empty prompt', { prompt: '' }, 'invalid_request', 'prompt'],
    ['no prompt', { max_tokens: 3 }, 'invalid_request', 'exactly one'],
    ['two prompts', { prompt: 'a', token_ids: [1] }, 'invalid_request', 'exactly one'],
    ['a wrong type', { prompt: 5 }, 'invalid_request', 'prompt'],
    ['an unknown field', { prompt: 'a', max_token: 3 }, 'invalid_request', 'max_token'],
    ['max_tokens of 0', { prompt: 'a', max_tokens: 0 }, 'invalid_request', 'max_tokens'],
    ['a negative temperature', { prompt: 'a', temperature: -1 }, 'invalid_request', 'temperature'],
    ['a temperature of NaN', packMessage({ prompt: 'a', temperature: Number.NaN }), 'invalid_request', 'temperature'],
    ['an unpaired surrogate', { prompt: '\ud800' }, 'invalid_request', 'surrogate'],
    ['a token beyond the vocabulary', { token_ids: [1_024] }, 'invalid_request', 'token_ids.0'],
    ['an unknown model', { prompt: 'a', model: 'gpt' }, 'unknown_model', 'lamina-tiny'],
    ['an id with a wildcard', { prompt: 'a', id: 'a.*' }, 'invalid_request', 'id'],
    ['an id with a larger wildcard', { prompt: 'a', id: '>' }, 'invalid_request', 'id'],
    ['a prompt longer than the context', { token_ids: long }, 'context_length_exceeded', '1100'],
    ['text longer than any context', 'a'.repeat(900_000), 'context_length_exceeded', '900000'],
    ['max_tokens beyond the context', { token_ids: [1], max_tokens: 1_024 }, 'context_length_exceeded', 'at most 1023'],
    ['more than the KV of the cluster', { token_ids: [1], max_tokens: 600 }, 'kv_capacity_exceeded', '512'],
  ];
  test.for(cases)('%s', async ([, body, code, hint]) => {
    const client = ask(body);
    const last = await client.final();
    expect(last).toMatchObject({ index: 0, token: null, text: '', finish_reason: 'error', error: { code } });
    expect(last.error?.message).toContain(hint);
    expect(client.messages).toHaveLength(1);
    expect(gateway.running.stats?.()).toMatchObject({ openRequests: 0 });
  });

  test('with the id of the request, in its encoding', async () => {
    const json = ask({ id: 'bad-1', prompt: 'a', max_tokens: 0 });
    expect(await json.final()).toMatchObject({ id: 'bad-1' });
    const msgpack = ask(packMessage({ id: 'bad-2', prompt: 'a', max_tokens: 0 }));
    expect(await msgpack.final()).toMatchObject({ id: 'bad-2' });
    expect(msgpack.bodies[0]![0]).not.toBe(0x7b);
  });
});

describe('a cluster that cannot answer', () => {
  test.for([
    ['has no executor', { executors: [] }, 'dense-executor'],
    ['serves another model', { executors: [{ executorId: 'e', modelId: 'big' }] }, 'big'],
    ['has no shard', { shards: [] }, 'attention-shard'],
  ] as const)('because it %s', async ([, change, hint]) => {
    kv.status = {
      ...READY,
      ...change,
      executors: [...('executors' in change ? change.executors : READY.executors)],
      shards: 'shards' in change ? [] : READY.shards,
    };
    const last = await ask('Hi').final();
    expect(last.error).toMatchObject({ code: 'unavailable', message: expect.stringContaining(hint) });
    kv.status = READY;
    const client = ask('Hi');
    await answer(await lease(), 1);
    expect((await client.final()).finish_reason).toBe('length');
  });
});

test('a prompt that nobody could be answered for is not run', async () => {
  bus.publish(SUBJECTS.generate, Buffer.from('Hi'));
  await bus.flush();
  await ask('').final();
  expect(await workMessages()).toBe(0);
});

test('HTTP tells health, metrics and what is not there', async () => {
  const health = await fetch(`${url()}/health`);
  expect([health.status, await health.json()]).toEqual([
    200,
    { status: 'ok', model: 'lamina-tiny', executors: 1, shards: 1, freeBlocks: 30 },
  ]);
  kv.status = { ...READY, shards: [] };
  const unwell = await fetch(`${url()}/health`);
  expect([unwell.status, await unwell.json()]).toEqual([
    503,
    { status: 'unavailable', reason: 'no attention-shard is ready' },
  ]);
  const missing = await fetch(`${url()}/nothing`);
  expect([missing.status, await missing.json()]).toMatchObject([404, { error: { code: 'invalid_request' } }]);
  expect((await fetch(`${url()}/metrics`)).status).toBe(200);
});

test('a port that is taken is said in one line', async () => {
  const second = startInProcess('gateway', startGateway, nats.url, [
    ...GATEWAY_FLAGS.slice(0, 2),
    '--http-port',
    new URL(url()).port,
  ]);
  await expect(second).rejects.toMatchObject({
    code: 'address_in_use',
    message: expect.stringContaining('--http-port'),
  });
});
