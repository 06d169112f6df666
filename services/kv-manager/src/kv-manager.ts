/**
 * Owns the state of the KV cache: the layout, who is registered, and what follows for block tables when somebody comes or
 * goes. Plain data and injected time, no I/O.
 *
 * Invariants
 * 1. A block goes to another request only when its owner has given it up (free, trim, or allocate of the same id), or when
 *    its owner is no more and the shards have confirmed that they take nothing more from it (see fences.ts).
 * 2. A shard enters with no memory and is given the layout; one that comes with memory but is not registered may still
 *    hold blocks that somebody remembers, and must come again under another id.
 * 3. Every live table has an owner that is registered, and every block of it is on a registered shard.
 */
import type {
  BlockRef,
  ExecutorHeartbeat,
  ExecutorHeartbeatReply,
  KvStatus,
  ShardHeartbeat,
  ShardHeartbeatReply,
} from '@lamina/protocol';
import {
  type AttentionSpec,
  blockBytes,
  type KvDtype,
  type KvLayout,
  LaminaError,
  sameAttentionSpec,
} from '@lamina/tensor';
import { BlockPool } from './block-table.ts';
import { Capacity } from './capacity.ts';
import { type Fence, Fences, nameOrigins } from './fences.ts';
import { LostBegins } from './lost-begins.ts';
import { Membership } from './membership.ts';
import { otherModel, ServedModel } from './served-model.ts';
import { describeSpec } from './spec.ts';
import { type AllocateRequest, type ExecutorTables, type ExtendRequest, Tables, type TrimRequest } from './tables.ts';

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
  readonly tables: ExecutorTables;
  /** All that were named under this registration, the latest last. */
  readonly originIds: Set<number>;
}

interface Shard {
  readonly budgetBytes: number;
  /** Known for good when the shard has its memory. */
  kernel: string;
  /** Undefined until the shard has its memory. */
  pool: BlockPool | undefined;
}

/** Heartbeat interval while a shard waits for the first executor to bring the layout. */
const NO_LAYOUT_HEARTBEAT_MS = 250;
/** Slots of a shard are int32 on the wire. */
const MAX_SLOTS = 2 ** 31 - 1;

export class KvManager {
  readonly #options: KvManagerOptions;
  readonly #executors: Membership<Executor>;
  readonly #shards: Membership<Shard>;
  readonly #model: ServedModel;
  readonly #capacity: Capacity;
  readonly #tables: Tables;
  readonly #fences = new Fences((fence) => this.#onLifted(fence));
  readonly #lostBegins = new LostBegins();
  #numRegistrations = 0;

  constructor(options: KvManagerOptions) {
    this.#options = options;
    this.#executors = new Membership(options.heartbeatTimeoutMs);
    this.#shards = new Membership(options.heartbeatTimeoutMs);
    const { blockSizeTokens, spreadAboveTokens, events } = options;
    this.#capacity = new Capacity({ blockSizeTokens, spreadAboveTokens, onCapacityFreed: events.onCapacityFreed });
    this.#model = new ServedModel(blockSizeTokens, options.kvDtype);
    this.#tables = new Tables(this.#capacity, blockSizeTokens);
  }

  get isEmpty(): boolean {
    return this.#executors.size === 0 && this.#shards.size === 0;
  }

  get numRequests(): number {
    return this.#tables.numLive;
  }

  get numFences(): number {
    return this.#fences.size;
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
    const { tables, registration, originIds } = this.#executors.hear(executorId, this.#options.nowMs(), () => {
      this.#options.events.onNote('executor registered', { executorId, modelId });
      return { registration: ++this.#numRegistrations, modelId, spec, tables: new Map(), originIds: new Set() };
    });
    nameOrigins(originIds, beat.originIds);
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
      this.#fences.confirm(shardId, beat.fencedUpTo);
    }
    const pool = this.#shards.get(shardId)?.pool;
    const { managerEpoch, heartbeatIntervalMs } = this.#options;
    const { layout } = this.#model;
    return {
      managerEpoch,
      layout,
      heartbeatIntervalMs:
        layout === null ? Math.min(heartbeatIntervalMs, NO_LAYOUT_HEARTBEAT_MS) : heartbeatIntervalMs,
      known,
      usedBlocks: pool?.usedBlocks ?? 0,
      usedBlocksPeak: pool?.usedBlocksPeak ?? 0,
      fences: this.#fences.noticesFor(shardId),
    };
  }

  executorLeave(executorId: string): void {
    const executor = this.#executors.remove(executorId);
    if (executor !== undefined) this.#fence(executorId, executor, 'executor left');
  }

  hasShard(shardId: string): boolean {
    return this.#shards.get(shardId) !== undefined;
  }

  /** A shard that left, or that is known not to answer: `text` says which. */
  removeShard(shardId: string, text: string): void {
    const shard = this.#shards.remove(shardId);
    if (shard !== undefined) this.#loseShard(shardId, shard, text);
  }

  /** As Tables.allocate; `internal` when too many executors were lost that had begun the request. */
  allocate(request: AllocateRequest): BlockRef[] {
    const { executorId, requestId, vainDeliveryCount } = request;
    const executor = this.#executors.get(executorId);
    if (executor === undefined)
      throw new LaminaError('unavailable', `executor ${executorId} is not registered; it must send a heartbeat first`);
    if (vainDeliveryCount !== undefined) this.#lostBegins.check(requestId, vainDeliveryCount);
    return this.#tables.allocate(executor.tables, request);
  }

  /** As Tables.extend. */
  extend(request: ExtendRequest): BlockRef[] {
    return this.#tables.extend(this.#executors.get(request.executorId)?.tables, request);
  }

  /** As Tables.trim. */
  trim(request: TrimRequest): void {
    this.#tables.trim(this.#executors.get(request.executorId)?.tables, request);
  }

  /** As Tables.free. */
  free(requestId: string, executorId: string): void {
    this.#tables.free(this.#executors.get(executorId)?.tables, requestId);
  }

  /** Removes whoever was silent for the time-out. */
  tick(): void {
    const nowMs = this.#options.nowMs();
    for (const { id, member } of this.#executors.expire(nowMs)) {
      this.#lostBegins.add(member.tables.keys());
      this.#fence(id, member, 'executor lost');
    }
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
      modelId: this.#model.modelId,
      layout: this.#model.layout,
      executors,
      shards,
      numRequests: this.numRequests,
    };
  }

  #adoptModel(modelId: string, spec: AttentionSpec): void {
    const dropped = this.#model.adopt(modelId, spec, this.#executors.size > 0);
    if (dropped === null) return;
    // Shards are forgotten with their memory: each comes again under a new id (invariant 2).
    this.#options.events.onNote('layout dropped', { spec: describeSpec(dropped), nextModelId: modelId });
    this.#shards.clear();
    this.#capacity.clear();
    this.#fences.removeAllShards();
  }

  #theLayout(): KvLayout {
    const { layout } = this.#model;
    if (layout === null) throw new LaminaError('internal', 'an executor is registered and there is no layout');
    return layout;
  }

  /** A registered shard says that it has its memory. */
  #join(shardId: string, shard: Shard, beat: ShardHeartbeat, numBlocks: number): void {
    if (shard.pool !== undefined) {
      if (shard.pool.numBlocks !== numBlocks)
        throw new LaminaError('protocol_violation', `shard ${shardId} changed its number of blocks`);
      return;
    }
    const { layout } = this.#model;
    if (layout === null)
      throw new LaminaError('protocol_violation', `shard ${shardId} has ${numBlocks} blocks and was given no layout`);
    const { blockSizeTokens } = layout;
    const mostBySlots = Math.floor(MAX_SLOTS / blockSizeTokens);
    const mostByBudget = Math.floor(shard.budgetBytes / blockBytes(layout));
    if (numBlocks > Math.min(mostBySlots, mostByBudget))
      throw new LaminaError(
        'protocol_violation',
        `shard ${shardId} says that it has ${numBlocks} blocks: its budget of ${shard.budgetBytes} bytes holds ` +
          `${mostByBudget} of ${blockBytes(layout)} bytes, and slots of 32 bits name ${mostBySlots} of ${blockSizeTokens} tokens`,
      );
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
    const numTables = this.#tables.loseShard(pool);
    this.#fences.removeShard(shardId);
    this.#options.events.onNote(text, { shardId, numTables });
    this.#options.events.onShardLost(shardId);
  }

  /** Nothing of an executor that is no more may be written to its blocks when they have another owner. */
  #fence(executorId: string, { tables: own, originIds }: Executor, text: string): void {
    const tables = this.#tables.takeAll(own);
    this.#options.events.onNote(text, { executorId, numTables: tables.length });
    if (tables.length === 0) return;
    const hasBlocks = (pool: BlockPool): boolean => tables.some((table) => table.numBlocksOn(pool) > 0);
    const shardIds = this.#capacity.pools.filter(hasBlocks).map(({ shardId }) => shardId);
    this.#fences.raise(executorId, originIds, tables, shardIds);
  }

  #onLifted({ number, executorId }: Fence): void {
    this.#options.events.onNote('blocks of an executor that is no more are free', { executorId, fence: number });
    this.#capacity.announce();
  }
}
