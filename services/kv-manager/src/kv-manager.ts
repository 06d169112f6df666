/**
 * Owns the state of the KV cache: the layout, who is registered, every block table. Plain data and injected time, no I/O.
 *
 * Invariants
 * 1. A refused operation changes nothing, save that an executor that asks for a table gives up its own former one.
 * 2. A block goes to another request only when its owner has given it up (free, trim, or allocate of the same id) or is
 *    dead.
 *    A table that lost a shard, or whose request another executor took over, is void: it keeps its blocks until then,
 *    because a step of its owner may still be on its way and would write into what has a new owner.
 * 3. A shard enters with no memory and is given the layout; one that comes with memory but is not registered may still
 *    hold blocks that somebody remembers, and must come again under another id.
 * 4. Every live table has an owner that is registered, and every block of it is on a registered shard.
 */
import type {
  BlockRef,
  ExecutorHeartbeat,
  ExecutorHeartbeatReply,
  KvStatus,
  ShardHeartbeat,
  ShardHeartbeatReply,
} from '@lamina/protocol';
import { type AttentionSpec, type KvDtype, type KvLayout, LaminaError, sameAttentionSpec } from '@lamina/tensor';
import { BlockPool, BlockTable } from './block-table.ts';
import { Capacity } from './capacity.ts';
import { Membership } from './membership.ts';
import { describeSpec } from './spec.ts';

export interface KvManagerOptions {
  /** Random per process. */
  readonly managerEpoch: string;
  readonly blockSizeTokens: number;
  readonly kvDtype: KvDtype;
  readonly spreadAboveTokens: number;
  readonly heartbeatIntervalMs: number;
  readonly heartbeatTimeoutMs: number;
  readonly nowMs: () => number;
  readonly events: KvManagerEvents;
}

export interface KvManagerEvents {
  readonly onShardLost: (shardId: string) => void;
  readonly onCapacityFreed: (freeBlocks: number) => void;
  /** Something worth a log line. */
  readonly onNote: (text: string, facts: Readonly<Record<string, unknown>>) => void;
}

interface Executor {
  readonly registration: number;
  readonly modelId: string;
  readonly spec: AttentionSpec;
  /** Live and void, by request id. */
  readonly tables: Map<string, BlockTable>;
}

interface Shard {
  readonly budgetBytes: number;
  /** Known for good when the shard has its memory. */
  kernel: string;
  /** Undefined until the shard has its memory. */
  pool: BlockPool | undefined;
}

interface TableRequest {
  readonly requestId: string;
  readonly executorId: string;
  readonly numTokens: number;
}

/** Heartbeat interval while a shard waits for the first executor to bring the layout. */
const NO_LAYOUT_HEARTBEAT_MS = 250;
/** Slots of a shard are int32 on the wire. */
const MAX_SLOTS = 2 ** 31 - 1;

export class KvManager {
  readonly #options: KvManagerOptions;
  readonly #executors: Membership<Executor>;
  readonly #shards: Membership<Shard>;
  readonly #capacity: Capacity;
  readonly #liveTables = new Map<string, BlockTable>();
  #layout: KvLayout | null = null;
  #modelId: string | null = null;
  #numRegistrations = 0;

  constructor(options: KvManagerOptions) {
    this.#options = options;
    this.#executors = new Membership(options.heartbeatTimeoutMs);
    this.#shards = new Membership(options.heartbeatTimeoutMs);
    const { blockSizeTokens, spreadAboveTokens, events } = options;
    this.#capacity = new Capacity({ blockSizeTokens, spreadAboveTokens, onCapacityFreed: events.onCapacityFreed });
  }

  get isEmpty(): boolean {
    return this.#executors.size === 0 && this.#shards.size === 0;
  }

  get numRequests(): number {
    return this.#liveTables.size;
  }

  get pools(): readonly BlockPool[] {
    return this.#capacity.pools;
  }

  executorHeartbeat(beat: ExecutorHeartbeat): ExecutorHeartbeatReply {
    const { executorId, modelId, spec } = beat;
    const former = this.#executors.get(executorId);
    if (former === undefined) this.#adoptModel(modelId, spec);
    else if (former.modelId !== modelId || !sameAttentionSpec(former.spec, spec))
      throw otherModel(modelId, spec, former.modelId, former.spec);
    const { tables, registration } = this.#executors.hear(executorId, this.#options.nowMs(), () => {
      this.#options.events.onNote('executor registered', { executorId, modelId });
      return { registration: ++this.#numRegistrations, modelId, spec, tables: new Map() };
    });
    const voidRequestIds: string[] = [];
    const takenOverRequestIds: string[] = [];
    for (const { requestId, voidReason } of tables.values()) {
      if (voidReason?.kind === 'shard_lost') voidRequestIds.push(requestId);
      else if (voidReason !== undefined) takenOverRequestIds.push(requestId);
    }
    const { managerEpoch, heartbeatIntervalMs, heartbeatTimeoutMs } = this.#options;
    return {
      managerEpoch,
      layout: this.#theLayout(),
      heartbeatIntervalMs,
      heartbeatTimeoutMs,
      registration,
      voidRequestIds,
      takenOverRequestIds,
    };
  }

  shardHeartbeat(beat: ShardHeartbeat): ShardHeartbeatReply {
    const { shardId, numBlocks, kernel, budgetBytes } = beat;
    const known = this.#shards.get(shardId) !== undefined || numBlocks === null;
    if (known) {
      const shard = this.#shards.hear(shardId, this.#options.nowMs(), () => ({ budgetBytes, kernel, pool: undefined }));
      if (numBlocks !== null) this.#join(shardId, shard, beat, numBlocks);
    }
    const pool = this.#shards.get(shardId)?.pool;
    const { managerEpoch, heartbeatIntervalMs } = this.#options;
    return {
      managerEpoch,
      layout: this.#layout,
      heartbeatIntervalMs:
        this.#layout === null ? Math.min(heartbeatIntervalMs, NO_LAYOUT_HEARTBEAT_MS) : heartbeatIntervalMs,
      known,
      usedBlocks: pool?.usedBlocks ?? 0,
      usedBlocksPeak: pool?.usedBlocksPeak ?? 0,
    };
  }

  executorLeave(executorId: string): void {
    const executor = this.#executors.remove(executorId);
    if (executor !== undefined) this.#releaseAll(executorId, executor, 'executor left');
  }

  hasShard(shardId: string): boolean {
    return this.#shards.get(shardId) !== undefined;
  }

  /** A shard that left, or that is known not to answer: `text` says which. */
  removeShard(shardId: string, text: string): void {
    const shard = this.#shards.remove(shardId);
    if (shard !== undefined) this.#loseShard(shardId, shard, text);
  }

  /** A new table for a request: all of its blocks, or a LaminaError and none. */
  allocate(request: TableRequest & { readonly maxTokens: number; readonly deliveryCount: number }): BlockRef[] {
    const { requestId, executorId, numTokens, maxTokens, deliveryCount } = request;
    const executor = this.#executors.get(executorId);
    if (executor === undefined)
      throw new LaminaError('unavailable', `executor ${executorId} is not registered; it must send a heartbeat first`);
    this.#release(executor, requestId);
    const other = this.#liveTables.get(requestId);
    if (other !== undefined && other.deliveryCount > deliveryCount)
      throw new LaminaError('duplicate_id', `request ${requestId} was taken over by another executor`);
    if (numTokens > maxTokens)
      throw new LaminaError('invalid_request', `numTokens ${numTokens} is more than maxTokens ${maxTokens}`);
    this.#capacity.checkTotal(maxTokens);
    const numBlocks = this.#capacity.blocksFor(numTokens);
    this.#capacity.checkFree(numBlocks);
    if (other !== undefined) this.#makeVoid(other, { kind: 'taken_over' });
    const table = new BlockTable(requestId, executorId, deliveryCount);
    this.#capacity.place(table, numBlocks);
    executor.tables.set(requestId, table);
    this.#liveTables.set(requestId, table);
    return table.refs();
  }

  /** Blocks at the end of a table, so that it has room for `numTokens`; those after the caller's `numBlocks` are returned. */
  extend(request: TableRequest & { readonly numBlocks: number }): BlockRef[] {
    const { requestId, executorId, numTokens, numBlocks } = request;
    const table = this.#executors.get(executorId)?.tables.get(requestId);
    if (table === undefined)
      throw new LaminaError('invalid_request', `executor ${executorId} has no block table of request ${requestId}`);
    if (table.voidReason?.kind === 'shard_lost')
      throw new LaminaError('shard_lost', `request ${requestId} had KV on ${table.voidReason.shardId}, which is lost`);
    if (table.voidReason !== undefined)
      throw new LaminaError('duplicate_id', `request ${requestId} was taken over by another executor`);
    if (numBlocks > table.numBlocks || numBlocks < table.numFreed)
      throw new LaminaError(
        'invalid_request',
        `request ${requestId} has blocks ${table.numFreed} to ${table.numBlocks}, not ${numBlocks}`,
      );
    const numAdded = this.#capacity.blocksFor(numTokens) - table.numBlocks;
    if (numAdded <= 0) return table.refs(numBlocks);
    this.#capacity.checkTotal(numTokens - table.numFreed * this.#options.blockSizeTokens);
    this.#capacity.checkFree(numAdded);
    this.#capacity.place(table, numAdded);
    return table.refs(numBlocks);
  }

  /** Frees the first blocks of the caller's table, `numFreedBlocks` with those of earlier calls; no error without a table. */
  trim(request: { readonly requestId: string; readonly executorId: string; readonly numFreedBlocks: number }): void {
    const { requestId, executorId, numFreedBlocks } = request;
    const table = this.#executors.get(executorId)?.tables.get(requestId);
    if (table === undefined || numFreedBlocks <= table.numFreed) return;
    if (numFreedBlocks > table.numBlocks)
      throw new LaminaError(
        'invalid_request',
        `request ${requestId} has ${table.numBlocks} blocks, ${numFreedBlocks} cannot be freed`,
      );
    table.trim(numFreedBlocks);
    this.#capacity.announce();
  }

  /** Frees the caller's table of this id, live or void. Nobody else's, and no error when there is none. */
  free(requestId: string, executorId: string): void {
    const executor = this.#executors.get(executorId);
    if (executor !== undefined) this.#release(executor, requestId);
  }

  /** Removes whoever was silent for the time-out. */
  tick(): void {
    const nowMs = this.#options.nowMs();
    for (const { id, member } of this.#executors.expire(nowMs)) this.#releaseAll(id, member, 'executor lost');
    for (const { id, member } of this.#shards.expire(nowMs)) this.#loseShard(id, member, 'shard lost');
  }

  /** For the time in which this process itself was stalled or cut off: nobody could be heard. */
  forgiveSilence(): void {
    const nowMs = this.#options.nowMs();
    this.#executors.forgive(nowMs);
    this.#shards.forgive(nowMs);
  }

  status(): KvStatus {
    const executors: KvStatus['executors'] = [];
    for (const [executorId, { modelId }] of this.#executors.entries()) executors.push({ executorId, modelId });
    const shards: KvStatus['shards'] = [];
    for (const [shardId, { kernel, budgetBytes, pool }] of this.#shards.entries())
      shards.push({
        shardId,
        kernel,
        budgetBytes,
        numBlocks: pool?.numBlocks ?? 0,
        usedBlocks: pool?.usedBlocks ?? 0,
        usedBlocksPeak: pool?.usedBlocksPeak ?? 0,
      });
    return {
      managerEpoch: this.#options.managerEpoch,
      modelId: this.#modelId,
      layout: this.#layout,
      executors,
      shards,
      numRequests: this.numRequests,
    };
  }

  /** The layout of the first executor stands while any executor lives; then another model may bring its own. */
  #adoptModel(modelId: string, spec: AttentionSpec): void {
    const { blockSizeTokens, kvDtype, events } = this.#options;
    const layout = this.#layout;
    if (layout !== null && this.#modelId !== null) {
      const isSame = sameAttentionSpec(layout, spec);
      if (this.#executors.size > 0 && (!isSame || this.#modelId !== modelId))
        throw otherModel(modelId, spec, this.#modelId, layout);
      if (!isSame) {
        // Shards are forgotten with their memory: each comes again under a new id (invariant 3).
        events.onNote('layout dropped', { modelId: this.#modelId, spec: describeSpec(layout) });
        this.#layout = null;
        this.#shards.clear();
        this.#capacity.clear();
      }
    }
    this.#modelId = modelId;
    this.#layout ??= { ...spec, blockSizeTokens, kvDtype };
  }

  #theLayout(): KvLayout {
    if (this.#layout === null) throw new LaminaError('internal', 'an executor is registered and there is no layout');
    return this.#layout;
  }

  /** A registered shard says that it has its memory. */
  #join(shardId: string, shard: Shard, beat: ShardHeartbeat, numBlocks: number): void {
    if (shard.pool !== undefined) {
      if (shard.pool.numBlocks !== numBlocks)
        throw new LaminaError('protocol_violation', `shard ${shardId} changed its number of blocks`);
      return;
    }
    if (this.#layout === null || numBlocks * this.#layout.blockSizeTokens > MAX_SLOTS)
      throw new LaminaError('protocol_violation', `shard ${shardId} has ${numBlocks} blocks of no valid layout`);
    const pool = new BlockPool(shardId, numBlocks);
    shard.kernel = beat.kernel;
    shard.pool = pool;
    this.#options.events.onNote('shard joined', { shardId, numBlocks, kernel: beat.kernel });
    this.#capacity.add(pool);
  }

  #loseShard(shardId: string, shard: Shard, text: string): void {
    const { pool } = shard;
    if (pool === undefined) return;
    this.#capacity.remove(pool);
    let numTables = 0;
    for (const table of [...this.#liveTables.values()]) {
      if (table.numBlocksOn(pool) === 0) continue;
      this.#makeVoid(table, { kind: 'shard_lost', shardId });
      numTables++;
    }
    this.#options.events.onNote(text, { shardId, numTables });
    this.#options.events.onShardLost(shardId);
  }

  #makeVoid(table: BlockTable, reason: NonNullable<BlockTable['voidReason']>): void {
    table.voidReason = reason;
    this.#liveTables.delete(table.requestId);
  }

  #releaseAll(executorId: string, executor: Executor, text: string): void {
    this.#options.events.onNote(text, { executorId, numTables: executor.tables.size });
    for (const requestId of [...executor.tables.keys()]) this.#release(executor, requestId);
  }

  #release(executor: Executor, requestId: string): void {
    const table = executor.tables.get(requestId);
    if (table === undefined) return;
    executor.tables.delete(requestId);
    if (this.#liveTables.get(requestId) === table) this.#liveTables.delete(requestId);
    table.release();
    this.#capacity.announce();
  }
}

function otherModel(modelId: string, spec: AttentionSpec, formerId: string, former: AttentionSpec): LaminaError {
  return new LaminaError(
    'invalid_request',
    `this cluster serves ${formerId} (${describeSpec(former)}), not ${modelId} (${describeSpec(spec)}); ` +
      'stop its executors first, or start another cluster',
  );
}
