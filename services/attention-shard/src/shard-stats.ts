/**
 * Owns what a shard counts. Counted in plain numbers on the way, turned into metrics when they are scraped.
 */
import type { FrameCounts } from '@lamina/attention-kernel';
import { Counter, DURATION_BUCKETS_S, Gauge, Histogram, type Registry } from '@lamina/runtime';

export class ShardStats {
  /** Layer messages answered. */
  attends = 0;
  queryRows = 0;
  /** KV tokens seen by the queries, summed over layers. */
  tokensAttended = 0;
  /** Bytes of K and V that this takes to read. */
  bytesRead = 0;
  /** From the receipt of a layer's message to its answer, summed. */
  attendSeconds = 0;
  /** Frames that could not be used and layers that failed. */
  failures = 0;
  /** Layer messages in the kernel now. */
  queueDepth = 0;
  usedBlocks = 0;
  usedBlocksPeak = 0;
  numBlocks = 0;
  /** Called before anything is read: who counts elsewhere adds it now. */
  onRead: () => void = () => undefined;
  readonly #durations: Histogram;

  constructor(registry: Registry) {
    const registers = [registry];
    const counter = (name: string, help: string, value: () => number): void => {
      const metric: Counter = new Counter({
        name,
        help,
        registers,
        collect: () => {
          this.onRead();
          metric.reset();
          metric.inc(value());
        },
      });
    };
    const gauge = (name: string, help: string, value: () => number): void => {
      const metric: Gauge = new Gauge({ name, help, registers, collect: () => metric.set(value()) });
    };
    counter('lamina_shard_attends_total', 'Layer messages answered', () => this.attends);
    counter('lamina_shard_query_rows_total', 'Query rows, summed over layers', () => this.queryRows);
    counter('lamina_shard_kv_tokens_read_total', 'KV tokens read, summed over layers', () => this.tokensAttended);
    counter('lamina_shard_kv_bytes_read_total', 'Bytes of K and V read', () => this.bytesRead);
    counter('lamina_shard_failures_total', 'Tensor frames that were refused or failed', () => this.failures);
    gauge('lamina_shard_queue_depth', 'Layer messages in the kernel', () => this.queueDepth);
    gauge('lamina_shard_blocks', 'KV blocks that fit the budget', () => this.numBlocks);
    this.#durations = new Histogram({
      name: 'lamina_shard_attend_seconds',
      help: 'From the receipt of the message of a layer to its answer',
      buckets: DURATION_BUCKETS_S,
      registers,
      collect: () => this.onRead(),
    });
  }

  /** Layers that were answered natively. */
  answered({ attends, queryRows, kvTokens, durationsSeconds }: FrameCounts, kvBytes: number): void {
    this.attends += attends;
    this.queryRows += queryRows;
    this.tokensAttended += kvTokens;
    this.bytesRead += kvBytes;
    for (const seconds of durationsSeconds) {
      this.attendSeconds += seconds;
      this.#durations.observe(seconds);
    }
  }

  attended(queryRows: number, kvTokens: number, kvBytes: number, seconds: number): void {
    this.attends++;
    this.queryRows += queryRows;
    this.tokensAttended += kvTokens;
    this.bytesRead += kvBytes;
    this.attendSeconds += seconds;
    this.#durations.observe(seconds);
  }
}
