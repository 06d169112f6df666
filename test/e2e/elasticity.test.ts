/**
 * A local cluster of real processes that grows, shrinks and fills up: shards that come and go in the middle of a
 * generation, requests that outgrow the KV cache, executors that share the queue.
 */
import type { Cluster } from '@lamina/cli';
import { afterEach, describe, expect, it } from 'vitest';
import { ask, kvStatus, lastOf, nothingLeft, PROMPT, start, tokensOf, useUncut } from './tiny-cluster.ts';

const LONG_TOKENS = 700;

const uncut = useUncut();

describe('elasticity', () => {
  let cluster: Cluster | undefined;
  afterEach(() => cluster?.stop());

  it('uses a shard that starts in the middle of a generation', async () => {
    cluster = await start({ spreadAboveTokens: '64' }, { attentionShards: 1 });
    const running = cluster;
    const expected = await uncut.greedy(PROMPT, LONG_TOKENS, { ignoreEos: true });
    let added: Promise<unknown> | undefined;
    const shardsUsed = new Set<string>();
    const watch = setInterval(() => {
      void kvStatus(running).then((status) => {
        for (const shard of status.shards) if (shard.usedBlocks > 0) shardsUsed.add(shard.shardId);
      });
    }, 50);
    const replies = await ask(
      running,
      JSON.stringify({ prompt: PROMPT, temperature: 0, max_tokens: LONG_TOKENS, ignore_eos: true }),
      (message) => {
        if (message.index === 30) added = running.addShard();
      },
    );
    clearInterval(watch);
    await added;
    expect(tokensOf(replies)).toEqual(expected);
    expect(shardsUsed.size).toBe(2);
  }, 60_000);

  it('loses no token when a shard is killed in the middle of a generation', async () => {
    let numEnded = 0;
    cluster = await start(
      { logLevel: 'error', spreadAboveTokens: '32', heartbeatTimeoutMs: '500' },
      { attentionShards: 3, onExit: () => numEnded++ },
    );
    const running = cluster;
    const expected = await uncut.greedy(PROMPT, 400, { ignoreEos: true });
    const replies = await ask(
      running,
      JSON.stringify({ prompt: PROMPT, temperature: 0, max_tokens: 400, ignore_eos: true }),
      (message) => {
        if (message.index === 150) process.kill(running.processes('attention-shard')[0]!.pid!, 'SIGKILL');
      },
    );
    expect(tokensOf(replies)).toEqual(expected);
    expect(numEnded).toBe(1);
    await nothingLeft(running);
  }, 60_000);

  it('lets requests take turns when they outgrow the KV cache', async () => {
    // Two shards of 12 blocks of 16 tokens, 3,072 bytes per token: one request of 300 tokens fits, four at once do not.
    cluster = await start({ kvBudgetBytes: String(12 * 16 * 3072) });
    const body = (index: number): string =>
      JSON.stringify({
        prompt: `${PROMPT} ${'Tom. '.repeat(index)}`,
        temperature: 0,
        max_tokens: 250,
        ignore_eos: true,
      });
    const answers = await Promise.all(Array.from({ length: 4 }, (_, index) => ask(cluster!, body(index))));
    for (let index = 0; index < 4; index++) {
      const expected = await uncut.greedy(`${PROMPT} ${'Tom. '.repeat(index)}`, 250, {
        ignoreEos: true,
      });
      expect(tokensOf(answers[index]!), `request ${index}`).toEqual(expected);
    }
    const refused = await ask(cluster, JSON.stringify({ prompt: PROMPT, max_tokens: 900 }));
    expect(lastOf(refused)).toMatchObject({ finish_reason: 'error', error: { code: 'kv_capacity_exceeded' } });
    await nothingLeft(cluster);
  }, 60_000);

  it('shares the queue between executors', async () => {
    cluster = await start({ maxRunningRequests: '2' }, { denseExecutors: 2 });
    const expected = await uncut.greedy(PROMPT, 60, { ignoreEos: true });
    const answers = await Promise.all(
      Array.from({ length: 10 }, () =>
        ask(cluster!, JSON.stringify({ prompt: PROMPT, temperature: 0, max_tokens: 60, ignore_eos: true })),
      ),
    );
    for (const answer of answers) expect(tokensOf(answer)).toEqual(expected);
    const metrics = await (await fetch(`${cluster.httpUrl}/metrics`)).text();
    const shares = [...metrics.matchAll(/^lamina_requests_total\{.*service="dense-executor".*\} (\d+)$/gm)].map(
      (match) => Number(match[1]),
    );
    expect(shares.length).toBe(2);
    expect(shares.reduce((a, b) => a + b, 0)).toBe(10);
  }, 60_000);
});
