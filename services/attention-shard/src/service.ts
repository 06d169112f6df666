/**
 * Owns the membership of this shard: heartbeats, the layout it is given, its lives.
 *
 * Invariants
 * 1. Registered with memory only in the life that the kv-manager knows: told that it is unknown, or given another
 *    layout, the shard ends that life and begins another under a new id.
 * 2. One heartbeat is under way at a time; while nobody answers it is tried for ever, and logged once.
 * 3. A fence is confirmed as soon as it holds: others wait for those blocks. Fences are of one life: the next one has a
 *    subject to which those executors never sent.
 */
import { openTensorLink } from '@lamina/bus';
import { ENDPOINTS, type FenceNotice, type ShardHeartbeatReply } from '@lamina/protocol';
import { natsAccessOf, type RunningService } from '@lamina/runtime';
import { asLaminaError, type KvLayout, sameKvLayout } from '@lamina/tensor';
import { Incarnation, type LifeContext, type ShardContext } from './incarnation.ts';
import { ShardStats } from './shard-stats.ts';

export type { ShardContext } from './incarnation.ts';

const RETRY_MS = 1000;
/** The services of a cluster start together: look again soon at first. */
const FIRST_RETRY_MS = 100;
const NUM_FIRST_RETRIES = 20;
const MIN_HEARTBEAT_TIMEOUT_MS = 500;
const LEAVE_TIMEOUT_MS = 1000;
/** Until a layer in the kernel is looked for again, which is all that a fence can wait for. */
const FENCE_RETRY_MS = 20;

class ShardMember {
  readonly #context: ShardContext & LifeContext;
  readonly #stats: ShardStats;
  #life: Incarnation | undefined;
  #numLives = 0;
  #shardId: string;
  #isStopping = false;
  #numFailures = 0;
  /** Number of the last fence that holds. */
  #fencedUpTo = 0;
  #isFencing = false;
  /** The server has the subscription of this life: before, its blocks would be given out and nobody heard. */
  #isListening = false;
  #heartbeatIntervalMs = RETRY_MS;
  #timer: NodeJS.Timeout | undefined;
  #beating: Promise<void> = Promise.resolve();

  constructor(context: ShardContext & LifeContext, stats: ShardStats) {
    this.#context = context;
    this.#stats = stats;
    this.#shardId = context.instanceId;
  }

  get shardId(): string {
    return this.#shardId;
  }

  /** The connection of the tensors was cut, and is there again. */
  onReconnect(): void {
    this.#life?.plane.connectionCut();
  }

  get kernelName(): string {
    return this.#life?.kernelName ?? 'none';
  }

  /** Resolves after the first heartbeat, answered or not. */
  start(): Promise<void> {
    this.#beating = this.#beat().then(
      () => this.#schedule(),
      (cause: unknown) => this.#context.fail(cause),
    );
    return this.#beating;
  }

  async stop(): Promise<void> {
    this.#isStopping = true;
    clearTimeout(this.#timer);
    await this.#beating;
    const life = this.#life;
    if (life === undefined) return;
    await this.#context.bus
      .request(ENDPOINTS.shardLeave, { shardId: life.shardId }, { timeoutMs: LEAVE_TIMEOUT_MS })
      .catch((cause: unknown) => this.#context.log.debug({ err: asLaminaError(cause) }, 'could not say goodbye'));
    await life.end();
  }

  #schedule(): void {
    if (this.#isStopping) return;
    const isStarting = this.#numFailures > 0 && this.#numFailures <= NUM_FIRST_RETRIES && this.#life === undefined;
    const retryMs = isStarting ? FIRST_RETRY_MS : Math.min(RETRY_MS, this.#heartbeatIntervalMs);
    const beatMs = this.#isFencing ? FENCE_RETRY_MS : this.#heartbeatIntervalMs;
    const delayMs = this.#numFailures > 0 ? retryMs : beatMs;
    this.#timer = setTimeout(() => {
      this.#life?.plane.dropIdle();
      void this.start();
    }, delayMs);
  }

  async #beat(): Promise<void> {
    for (;;) {
      const reply = await this.#request();
      if (reply === undefined || this.#isStopping) return;
      this.#heartbeatIntervalMs = reply.heartbeatIntervalMs;
      this.#stats.usedBlocks = reply.usedBlocks;
      this.#stats.usedBlocksPeak = reply.usedBlocksPeak;
      const { known, layout } = reply;
      if (this.#life !== undefined && (!known || layout === null || !sameKvLayout(this.#life.layout, layout)))
        await this.#endLife();
      else if (this.#life === undefined && layout !== null) this.#beginLife(layout);
      else if (this.#life !== undefined && !this.#isListening) {
        if (!(await this.#listens())) return;
      } else if (this.#life === undefined || !this.#fence(this.#life, reply.fences)) return;
      // Something changed: say so now, not a heartbeat later.
    }
  }

  /** Without the connection of the tensors the next heartbeat asks again. */
  async #listens(): Promise<boolean> {
    let timer: NodeJS.Timeout | undefined;
    const tooLate = new Promise<boolean>((resolve) => {
      timer = setTimeout(() => resolve(false), MIN_HEARTBEAT_TIMEOUT_MS);
    });
    const flushed = this.#context.link.flush().then(
      () => true,
      () => false,
    );
    this.#isListening = await Promise.race([flushed, tooLate]);
    clearTimeout(timer);
    return this.#isListening;
  }

  /** Returns whether there is something new to confirm. */
  #fence({ plane }: Incarnation, fences: readonly FenceNotice[]): boolean {
    const former = this.#fencedUpTo;
    this.#isFencing = false;
    for (const { number, originIds } of fences) {
      if (number <= this.#fencedUpTo) continue;
      this.#isFencing = !plane.fence(originIds);
      if (this.#isFencing) break;
      this.#fencedUpTo = number;
      this.#context.log.info({ fence: number, originIds }, 'an executor is no more: nothing is taken from it now');
    }
    return this.#fencedUpTo > former;
  }

  async #request(): Promise<ShardHeartbeatReply | undefined> {
    const { bus, config, log } = this.#context;
    try {
      const reply = await bus.request(
        ENDPOINTS.shardHeartbeat,
        {
          shardId: this.#shardId,
          budgetBytes: config.kvBudgetBytes,
          kernel: this.kernelName,
          numBlocks: this.#isListening ? (this.#life?.numBlocks ?? null) : null,
          fencedUpTo: this.#fencedUpTo,
        },
        { timeoutMs: Math.max(MIN_HEARTBEAT_TIMEOUT_MS, this.#heartbeatIntervalMs) },
      );
      if (this.#numFailures > 0) log.info({ numFailures: this.#numFailures }, 'kv-manager answers');
      this.#numFailures = 0;
      return reply;
    } catch (cause) {
      this.#numFailures++;
      if (this.#numFailures === 1)
        log.warn({ reason: asLaminaError(cause).message }, 'no answer from the kv-manager; trying again');
      return undefined;
    }
  }

  #beginLife(layout: KvLayout): void {
    this.#life = new Incarnation(this.#context, this.#shardId, layout, this.#stats);
    this.#stats.numBlocks = this.#life.numBlocks;
  }

  async #endLife(): Promise<void> {
    const life = this.#life;
    this.#life = undefined;
    this.#isListening = false;
    this.#fencedUpTo = 0;
    this.#isFencing = false;
    this.#shardId = `${this.#context.instanceId}-${++this.#numLives}`;
    this.#context.log.warn({ former: life?.shardId, shardId: this.#shardId }, 'KV given up; joining anew');
    await life?.end();
  }
}

export async function startAttentionShard(context: ShardContext): Promise<RunningService> {
  const stats = new ShardStats(context.registry);
  const { config, log, instanceId } = context;
  const { link, fallbackReason } = await openTensorLink(
    {
      url: config.natsUrl,
      name: `attention-shard ${instanceId} tensors`,
      connectTimeoutMs: config.natsConnectTimeoutMs,
      access: natsAccessOf(config, 'attention-shard'),
    },
    { onError: context.complain },
    config.tensorLink,
  );
  if (fallbackReason !== null) log.warn({ reason: fallbackReason }, 'tensors travel over nats.js, which is slow');
  const member = new ShardMember({ ...context, link }, stats);
  link.onStatus((status) => {
    log.debug({ status }, 'tensor connection');
    if (status === 'reconnect') member.onReconnect();
  });
  await member.start();
  return {
    stats: () => {
      stats.onRead();
      return {
        shardId: member.shardId,
        kernel: member.kernelName,
        numBlocks: stats.numBlocks,
        blocksUsed: stats.usedBlocks,
        blocksUsedPeak: stats.usedBlocksPeak,
        attends: stats.attends,
        tokensAttended: stats.tokensAttended,
        attendSeconds: stats.attendSeconds,
        bytesRead: stats.bytesRead,
      };
    },
    stop: async () => {
      await member.stop();
      await link.close();
    },
  };
}
