/**
 * A local cluster of real processes, used as its users use it: prompts over plain NATS, cancelled requests, bad input,
 * and what it takes when nobody asks.
 */
import { readFileSync } from 'node:fs';
import type { Cluster } from '@lamina/cli';
import { packMessage, SERVICE_NAMES, SUBJECTS } from '@lamina/protocol';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { ask, lastOf, nothingLeft, PROMPT, start, tokensOf, useUncut } from './tiny-cluster.ts';

const LONG_TOKENS = 700;

const uncut = useUncut();

describe('a cluster', () => {
  let cluster: Cluster;
  beforeAll(async () => {
    cluster = await start({ spreadAboveTokens: '32' });
  }, 60_000);
  afterEach(() => nothingLeft(cluster));
  afterAll(() => cluster.stop());

  it('answers a JSON prompt with the tokens of the uncut graph', async () => {
    const replies = await ask(cluster, JSON.stringify({ prompt: PROMPT, temperature: 0, max_tokens: 60 }));
    const expected = await uncut.greedy(PROMPT, 60);
    expect(tokensOf(replies)).toEqual(expected);
    expect(replies.length, 'tokens are streamed').toBeGreaterThan(10);
    expect(lastOf(replies)).toMatchObject({ finish_reason: 'length', usage: { completion_tokens: 60 } });
  });

  it('answers plain text with the defaults of the model', async () => {
    const replies = await ask(cluster, PROMPT);
    const text = replies.flatMap((reply) => reply.messages.map((message) => message.text)).join('');
    expect(text.length).toBeGreaterThan(20);
    expect(text).not.toContain('\uFFFD');
    expect(lastOf(replies).usage!.completion_tokens).toBeLessThanOrEqual(200);
  });

  it('answers msgpack in msgpack', async () => {
    const replies = await ask(cluster, packMessage({ prompt: PROMPT, temperature: 0, max_tokens: 5 }));
    expect(replies.every((reply) => reply.data[0] !== 0x7b && reply.data[0] !== 0x5b)).toBe(true);
    expect(tokensOf(replies)).toEqual(await uncut.greedy(PROMPT, 5));
  });

  it('joins chat messages with the template of the model', async () => {
    const replies = await ask(
      cluster,
      JSON.stringify({ messages: [{ role: 'user', content: PROMPT }], temperature: 0, max_tokens: 5 }),
    );
    expect(tokensOf(replies)).toEqual(await uncut.greedy(PROMPT, 5));
  });

  it('gives the same tokens for the same seed, whatever else runs', async () => {
    const body = JSON.stringify({
      prompt: PROMPT,
      seed: 1234,
      temperature: 0.8,
      top_p: 0.95,
      max_tokens: 80,
      ignore_eos: true,
    });
    const alone = tokensOf(await ask(cluster, body));
    const others = Array.from({ length: 12 }, (_, i) =>
      ask(
        cluster,
        JSON.stringify({ prompt: `${PROMPT} `.repeat(1 + i * 3), max_tokens: 60, seed: i, ignore_eos: true }),
      ),
    );
    const amongOthers = tokensOf(await ask(cluster, body));
    await Promise.all(others);
    expect(amongOthers).toEqual(alone);
    const otherSeed = tokensOf(await ask(cluster, body.replace('1234', '1235')));
    expect(otherSeed).not.toEqual(alone);
  });

  it('stops at stop strings and reports log-probabilities', async () => {
    const replies = await ask(
      cluster,
      JSON.stringify({ prompt: PROMPT, temperature: 0, max_tokens: 60, stop: ' park', logprobs: 2 }),
    );
    const text = replies.flatMap((reply) => reply.messages.map((message) => message.text)).join('');
    expect(text).toBe(' She loved to play outside in the');
    expect(lastOf(replies).finish_reason).toBe('stop');
    expect(replies[0]!.messages[0]!.logprob).toBeLessThan(0);
    expect(replies[0]!.messages[0]!.top_logprobs).toHaveLength(2);
  });

  it('cancels a running request and frees its KV', async () => {
    let cancelledAt = 0;
    const replies = await ask(
      cluster,
      JSON.stringify({ id: 'to-be-cancelled', prompt: PROMPT, max_tokens: LONG_TOKENS, ignore_eos: true }),
      (message) => {
        if (message.index !== 20) return;
        cancelledAt = performance.now();
        cluster.bus.publish(SUBJECTS.cancel('to-be-cancelled'), new Uint8Array(0));
      },
    );
    expect(lastOf(replies)).toMatchObject({ token: null, finish_reason: 'cancelled' });
    expect(lastOf(replies).usage!.completion_tokens).toBeLessThan(LONG_TOKENS);
    expect(performance.now() - cancelledAt).toBeLessThan(1_000);
  });

  it('gives up at the deadline', async () => {
    const replies = await ask(
      cluster,
      JSON.stringify({ prompt: PROMPT, max_tokens: LONG_TOKENS, ignore_eos: true, deadline_ms: 150 }),
    );
    expect(lastOf(replies)).toMatchObject({ finish_reason: 'error', error: { code: 'deadline_exceeded' } });
  });

  it.each([
    ['JSON that is none', '{"prompt": ', 'invalid_request', /not valid JSON/],
    [
      'bytes that are no text',
      Uint8Array.of(0xff, 0xfe, 0x00),
      'invalid_request',
      /neither UTF-8 text nor a msgpack map/,
    ],
    ['an empty body', '', 'invalid_request', /empty/],
    ['an empty prompt', '{"prompt": ""}', 'invalid_request', /prompt: must not be empty/],
    ['a wrong type', '{"prompt": 5}', 'invalid_request', /prompt: /],
    ['an unknown field', '{"prompt": "a", "max_token": 5}', 'invalid_request', /max_token/],
    ['no prompt', '{"max_tokens": 5}', 'invalid_request', /exactly one of/],
    ['max_tokens below 1', '{"prompt": "a", "max_tokens": 0}', 'invalid_request', /max_tokens/],
    ['a negative temperature', '{"prompt": "a", "temperature": -1}', 'invalid_request', /temperature/],
    [
      'a temperature that is no number',
      packMessage({ prompt: 'a', temperature: Number.NaN }),
      'invalid_request',
      /temperature/,
    ],
    ['an id with wildcards', '{"prompt": "a", "id": "a.*"}', 'invalid_request', /id: must consist of/],
    ['a model that is not served', '{"prompt": "a", "model": "gpt-5"}', 'unknown_model', /lamina-tiny/],
    ['a token that the model lacks', '{"token_ids": [5, 99999]}', 'invalid_request', /99999/],
    [
      'a prompt beyond the context',
      JSON.stringify({ prompt: 'word '.repeat(3000) }),
      'context_length_exceeded',
      /1024/,
    ],
    ['more tokens than the context', '{"prompt": "a", "max_tokens": 5000}', 'context_length_exceeded', /1024/],
  ])('refuses %s at once', async (_, body, code, message) => {
    const sentAt = performance.now();
    const replies = await ask(cluster, body);
    expect(performance.now() - sentAt).toBeLessThan(1_000);
    expect(lastOf(replies)).toMatchObject({ finish_reason: 'error', token: null, error: { code } });
    expect(lastOf(replies).error!.message).toMatch(message);
  });

  it('shows itself on $SRV and in /metrics', async () => {
    for (const [service, count] of [
      ['gateway', 1],
      ['kv-manager', 1],
      ['dense-executor', 1],
      ['attention-shard', 2],
    ] as const) {
      expect(await cluster.bus.serviceStats(SERVICE_NAMES[service], 300), service).toHaveLength(count);
    }
    await ask(cluster, JSON.stringify({ prompt: PROMPT, max_tokens: 5 }));
    const metrics = await (await fetch(`${cluster.httpUrl}/metrics`)).text();
    for (const part of ['dense', 'wait', 'codec', 'sample', 'machine']) {
      expect(metrics).toMatch(new RegExp(`lamina_step_seconds_sum\\{[^}]*part="${part}"[^}]*\\} [0-9.e-]+`));
    }
    const health = await (await fetch(`${cluster.httpUrl}/health`)).json();
    expect(health).toMatchObject({ status: 'ok' });
  });
});

describe.runIf(process.platform === 'linux')('an idle cluster', () => {
  it('takes less than 2 % of a core', async () => {
    const cluster = await start({ heartbeatIntervalMs: '1000', heartbeatTimeoutMs: '4000' });
    try {
      await ask(cluster, JSON.stringify({ prompt: PROMPT, max_tokens: 5 }));
      await new Promise((resolve) => setTimeout(resolve, 2_000));
      const children = (['nats-server', 'gateway', 'kv-manager', 'dense-executor', 'attention-shard'] as const).flatMap(
        (kind) => cluster.processes(kind),
      );
      const ticksOf = (pid: number | undefined): number => {
        const fields = readFileSync(`/proc/${pid}/stat`, 'utf8')
          .replace(/^.*\) /, '')
          .split(' ');
        return Number(fields[11]) + Number(fields[12]);
      };
      const seconds = 2;
      const numWindows = 12;
      const windows = children.map((): number[] => []);
      let before = children.map(({ pid }) => ticksOf(pid));
      for (let i = 0; i < numWindows; i++) {
        await new Promise((resolve) => setTimeout(resolve, seconds * 1_000));
        const now = children.map(({ pid }) => ticksOf(pid));
        for (const [child, ticks] of now.entries()) windows[child]!.push(ticks - before[child]!);
        before = now;
      }
      // V8 collects what the start left behind once in each thread, 5 to 30 s later and for some 100 ms: the two windows in which a
      // process did most are left out; what it does all the time is in the others as well.
      const numLeftOut = 2;
      const steadyTicks = windows
        .flatMap((each) => [...each].sort((a, b) => a - b).slice(0, -numLeftOut))
        .reduce((sum, ticks) => sum + ticks, 0);
      const percent = steadyTicks / ((numWindows - numLeftOut) * seconds); // 100 ticks a second: percent of a core
      console.log(`idle: ${percent.toFixed(2)} % of a core for ${children.length} processes; ${windows.join(' | ')}`);
      expect(percent).toBeLessThan(2);
    } finally {
      await cluster.stop();
    }
  }, 60_000);
});
