/**
 * Owns `lamina demo`: one prompt, answered by a whole cluster, and what each shard did for it.
 *
 * Invariants
 * 1. The prompt goes to `lamina.v1.generate` as any NATS client sends it; nothing here knows of tokenizers or models.
 * 2. Tokens are printed as they arrive. The same seed prints the same story.
 */
import type { Bus } from '@lamina/bus';
import { decodeTokens, SUBJECTS, type TokenMessage } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';
import type { Cluster } from './cluster.ts';
import { readShards, type ShardReport } from './probes.ts';
import { table } from './table.ts';

const REPORT_WAIT_MS = 250;

export interface DemoFlags {
  readonly seed: number;
  readonly maxTokens?: number;
  readonly temperature?: number;
}

export interface Answer {
  readonly tokens: number;
  readonly timeToFirstTokenMs: number;
  /** Of the tokens after the first, whose time is the prefill's; null for fewer than two. */
  readonly tokensPerSecond: number | null;
  readonly finishReason: string;
}

/**
 * Sends a request and calls back with every token message until the last one.
 * @throws LaminaError with the code of the answer; `unavailable` when no gateway listens.
 */
export function generate(bus: Bus, body: object, onToken: (message: TokenMessage) => void): Promise<void> {
  return new Promise((resolve, reject) => {
    const data = new TextEncoder().encode(JSON.stringify(body));
    const subscription = bus.requestStream(SUBJECTS.generate, data, (reply) => {
      try {
        if (reply === undefined) throw new LaminaError('unavailable', 'no gateway listens');
        for (const message of decodeTokens(reply.data)) {
          if (message.error !== undefined) throw new LaminaError(message.error.code, message.error.message);
          onToken(message);
          if (message.finish_reason === null) continue;
          subscription.unsubscribe();
          resolve();
        }
      } catch (cause) {
        subscription.unsubscribe();
        reject(cause);
      }
    });
  });
}

export async function runDemo(cluster: Cluster, prompt: string, flags: DemoFlags): Promise<number> {
  const body = { prompt, seed: flags.seed, max_tokens: flags.maxTokens, temperature: flags.temperature };
  process.stdout.write(`\n${prompt}`);
  try {
    const answer = await ask(cluster.bus, body);
    const shards = await readShards(cluster.bus, REPORT_WAIT_MS);
    process.stdout.write(`\n\n${describeAnswer(answer)}\n\n${describeShards(shards)}\n`);
    return 0;
  } catch (cause) {
    if (!(cause instanceof LaminaError)) throw cause;
    process.stdout.write('\n');
    process.stderr.write(`${cause.code}: ${cause.message}\n`);
    return 1;
  }
}

async function ask(bus: Bus, body: object): Promise<Answer> {
  const sentAt = performance.now();
  let firstAt = sentAt;
  let lastAt = sentAt;
  let tokens = 0;
  let finishReason = '';
  await generate(bus, body, (message) => {
    process.stdout.write(message.text);
    finishReason = message.finish_reason ?? finishReason;
    if (message.token === null) return;
    lastAt = performance.now();
    if (tokens === 0) firstAt = lastAt;
    tokens++;
  });
  return {
    tokens,
    timeToFirstTokenMs: firstAt - sentAt,
    tokensPerSecond: tokens < 2 ? null : ((tokens - 1) * 1000) / (lastAt - firstAt),
    finishReason,
  };
}

export function describeAnswer(answer: Answer): string {
  const speed = answer.tokensPerSecond === null ? '' : `${answer.tokensPerSecond.toFixed(0)} tokens/s, `;
  const first = `first token after ${answer.timeToFirstTokenMs.toFixed(0)} ms`;
  return `${answer.tokens} tokens (${answer.finishReason}), ${speed}${first}`;
}

export function describeShards(shards: readonly ShardReport[]): string {
  const total = shards.reduce((sum, shard) => sum + shard.tokensAttended, 0);
  const rows = shards
    .toSorted((a, b) => a.shardId.localeCompare(b.shardId))
    .map((shard) => [
      shard.shardId,
      shard.kernel,
      `${shard.usedBlocksPeak} of ${shard.numBlocks}`,
      total === 0 ? '-' : `${((100 * shard.tokensAttended) / total).toFixed(0)} %`,
    ]);
  return table([['attention shard', 'kernel', 'blocks held', 'part of the attention'], ...rows]);
}
