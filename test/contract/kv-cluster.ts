/**
 * Owns an executor and a kv-manager, both real, with a bus between them that delays and loses and a socket in which layers
 * are held up; and what must hold of them at every moment.
 */
import { type BlockRef, decodeStepPlan, ENDPOINTS, EVENTS, FRAME_HEADER_BYTES } from '@lamina/protocol';
import { createLogger } from '@lamina/runtime';
import { type AttentionSpec, asLaminaError, BLOCK_FIELDS } from '@lamina/tensor';
import { vi } from 'vitest';
import { KvClient } from '../../services/dense-executor/src/kv-client.ts';
import { KvLease } from '../../services/dense-executor/src/kv-lease.ts';
import type { StepRequest } from '../../services/dense-executor/src/worker/messages.ts';
import { Bench, BLOCK, LAYOUT } from '../../services/dense-executor/test/executor-bench.ts';
import { KvManager } from '../../services/kv-manager/src/kv-manager.ts';
import { BlockLedger, nameOf, type Table } from './block-ledger.ts';
import { FakeShards } from './fake-shards.ts';
import { LossyBus } from './lossy-bus.ts';

const HEARTBEAT_MS = 1_000;
const HEARTBEAT_TIMEOUT_MS = 4_000;
const OWN = 'e1';
const RIVAL = 'e2';
const log = createLogger({ level: 'silent', service: 'dense-executor', instance: 'test' });
const { blockSizeTokens: _, kvDtype: __, ...spec } = LAYOUT;
const SPEC: AttentionSpec = spec;

/** A layer that the executor handed to its socket. */
interface SentLayer {
  readonly step: StepRequest;
  readonly originId: number;
  /** Where it writes, and whose that was. */
  readonly writes: readonly (readonly [address: string, table: Table | undefined])[];
  /** The connection was cut: it may come at any later time, and nobody waits for it. */
  isHeldUp: boolean;
}

export class Cluster {
  readonly bench: Bench;
  readonly bus = new LossyBus((subject, body) => this.#serve(subject, body));
  readonly #lease = new KvLease();
  readonly #client: KvClient;
  readonly #shards = new FakeShards();
  readonly #ledger = new BlockLedger((shardId) => this.#shards.has(shardId));
  #numManagers = 0;
  #manager = this.#startManager();
  readonly #takenOver = new Set<string>();
  #numOrigins = 1;
  /** Of the executor, by the term of its lease from which on it sends under it. */
  readonly #origins = [{ term: 0, originId: 1 }];
  #rivalOrigin = 0;
  #socket: SentLayer[] = [];

  constructor() {
    const tables = () => this.bench.executor.tables;
    const lease = this.#lease;
    const origins = this.#origins;
    this.#client = new KvClient(
      {
        bus: this.bus,
        executorId: OWN,
        modelId: 'tiny',
        spec: SPEC,
        requestTimeoutMs: 1_500,
        lease,
        origins: {
          get originIds() {
            return [origins.at(-1)!.originId];
          },
          renewOrigins: () => void origins.push({ term: lease.term, originId: ++this.#numOrigins }),
        },
        log,
        fail: (cause) => {
          throw cause;
        },
      },
      {
        onTablesVoid: (layout) => tables().onTablesVoid(layout),
        onRequestsVoid: (ids) => tables().onRequestsVoid(ids),
        onRequestsTakenOver: (ids) => tables().onRequestsTakenOver(ids),
        onShardLost: (shardId) => tables().onShardLost(shardId),
        onCapacityFreed: (numFreeBlocks) => tables().onCapacityFreed(numFreeBlocks),
        onLeaseRenewed: () => tables().onLeaseRenewed(),
      },
    );
    this.bench = new Bench(this.#client);
  }

  async start(): Promise<void> {
    const registered = this.#client.register();
    this.bus.deliver(1);
    this.bus.reply(1);
    await registered;
    this.join(8);
  }

  stop(): void {
    void this.#client.stop();
  }

  get numShards(): number {
    return this.#shards.ids.length;
  }

  get mostBlocksOfShard(): number {
    return this.#shards.mostBlocks;
  }

  get numUsedBlocks(): number {
    return this.#manager.pools.reduce((sum, pool) => sum + pool.usedBlocks, 0);
  }

  isTakenOver(requestId: string): boolean {
    return this.#takenOver.has(requestId);
  }

  #startManager(): KvManager {
    return new KvManager({
      managerEpoch: `epoch-${this.#numManagers++}`,
      blockSizeTokens: BLOCK,
      kvDtype: LAYOUT.kvDtype,
      spreadAboveTokens: 2 * BLOCK,
      heartbeatIntervalMs: HEARTBEAT_MS,
      heartbeatTimeoutMs: HEARTBEAT_TIMEOUT_MS,
      nowMs: () => performance.now(),
      events: {
        onShardLost: (shardId) => {
          this.#shards.lose(shardId);
          this.#ledger.loseShard(shardId);
          this.bus.publish(EVENTS.shardLost.subject, { shardId });
        },
        onCapacityFreed: (freeBlocks) => this.bus.publish(EVENTS.capacityFreed.subject, { freeBlocks }),
        onNote: () => undefined,
      },
    });
  }

  managerDies(): void {
    this.#manager = this.#startManager();
    // The shards hear that it does not know them: they give their memory up and come again under other ids.
    this.#shards.clear();
    this.#ledger.clear();
  }

  join(numBlocks: number): void {
    this.#shards.join(this.#manager, numBlocks);
  }

  loseShard(index: number): void {
    const lost = this.#shards.ids[index];
    if (lost !== undefined) this.#manager.removeShard(lost, 'shard lost');
  }

  #serve(subject: string, body: unknown): unknown {
    const manager = this.#manager;
    const managerEpoch = manager.status().managerEpoch;
    switch (subject) {
      case ENDPOINTS.executorHeartbeat.subject:
        return manager.executorHeartbeat(ENDPOINTS.executorHeartbeat.request.parse(body));
      case ENDPOINTS.allocate.subject:
        return { managerEpoch, blocks: this.#allocate(ENDPOINTS.allocate.request.parse(body)) };
      case ENDPOINTS.extend.subject: {
        const call = ENDPOINTS.extend.request.parse(body);
        const blocks = manager.extend(call);
        this.#ledger.extend(call.executorId, call.requestId, call.numBlocks, blocks);
        return { managerEpoch, blocks };
      }
      case ENDPOINTS.free.subject: {
        const { requestId, executorId } = ENDPOINTS.free.request.parse(body);
        manager.free(requestId, executorId);
        this.#ledger.free(executorId, requestId);
        return {};
      }
      case ENDPOINTS.suspectShard.subject: {
        const { shardId } = ENDPOINTS.suspectShard.request.parse(body);
        return { isLost: !manager.hasShard(shardId) };
      }
      default:
        throw new Error(`${subject} is not served`);
    }
  }

  #allocate(call: Parameters<KvManager['allocate']>[0]): BlockRef[] {
    const { executorId, requestId } = call;
    if (this.#executorIds().includes(executorId)) this.#ledger.free(executorId, requestId);
    const refs = this.#manager.allocate(call);
    this.#ledger.give(executorId, requestId, refs);
    return refs;
  }

  #executorIds(): string[] {
    return this.#manager.status().executors.map(({ executorId }) => executorId);
  }

  rivalTakesOver(requestId: string): void {
    try {
      if (!this.#executorIds().includes(RIVAL)) this.#rivalOrigin = ++this.#numOrigins;
      const originIds = [this.#rivalOrigin];
      this.#manager.executorHeartbeat({ executorId: RIVAL, modelId: 'tiny', spec: SPEC, originIds });
      this.#allocate({ requestId, executorId: RIVAL, numTokens: 20, maxTokens: 20, deliveryCount: 2 });
      this.#takenOver.add(requestId);
    } catch (cause) {
      if (asLaminaError(cause).code === 'internal') throw cause;
    }
  }

  rivalFrees(): void {
    for (const { requestId } of this.#ledger.tablesOf(RIVAL)) {
      this.#manager.free(requestId, RIVAL);
      this.#ledger.free(RIVAL, requestId);
    }
  }

  rivalLeaves(): void {
    this.#manager.executorLeave(RIVAL);
    this.#ledger.fence(RIVAL);
  }

  /** `isListening`: the shards do what the kv-manager tells them. */
  pass(ms: number, isListening = true): void {
    vi.advanceTimersByTime(ms);
    this.#shards.beat(this.#manager, isListening, (shardId, fencedUpTo) => this.#ledger.confirm(shardId, fencedUpTo));
    const before = this.#executorIds();
    this.#manager.tick();
    const after = this.#executorIds();
    for (const executorId of before) if (!after.includes(executorId)) this.#ledger.fence(executorId);
  }

  /** Nothing comes through for longer than the time-out. */
  cutOff(): void {
    for (const layer of this.#socket) layer.isHeldUp = true;
    this.pass(HEARTBEAT_TIMEOUT_MS + 1_000, false);
  }

  /** The step of a wave hands a layer to its socket. */
  send(wave: number): void {
    const step = this.bench.steps.get(wave);
    if (step === undefined || !this.#lease.allows(step.leaseTerm)) return;
    const owners = this.#ledger.owners();
    const writes = blocksNamed(step).map((address) => [address, owners.get(address)] as const);
    this.#socket.push({ step, originId: this.#originOf(step), writes, isHeldUp: false });
  }

  #originOf({ leaseTerm }: StepRequest): number {
    return this.#origins.findLast(({ term }) => term <= leaseTerm)!.originId;
  }

  /** A layer that was sent may arrive at any moment: now, it must be written to nobody else's block. */
  #checkLate({ originId, writes }: SentLayer, owners: ReadonlyMap<string, Table>): void {
    for (const [address, table] of writes) {
      if (!this.#shards.takes(shardOf(address), originId)) continue;
      const owner = owners.get(address);
      if (owner !== undefined && owner !== table)
        throw new Error(`a late layer of ${nameOf(table)} is written to ${address}, which is of ${nameOf(owner)}`);
    }
  }

  /** What a step sent has come to the shards when it ends, unless the connection is cut. */
  #endStep(step: StepRequest): void {
    this.#socket = this.#socket.filter((layer) => layer.step !== step || layer.isHeldUp);
  }

  /** A worker that may write ends its step; else it fails it. */
  finish(wave: number, token = 100): void {
    const step = this.bench.steps.get(wave);
    if (step === undefined) return;
    if (!this.#lease.allows(step.leaseTerm)) this.failStep(wave, 'unavailable', []);
    else if (step.shards.some(({ shardId }) => !this.#shards.has(shardId))) this.failStep(wave, 'unavailable');
    else {
      this.#endStep(step);
      this.bench.finish(
        wave,
        Array.from(step.sampledRows, () => token),
      );
    }
  }

  failStep(wave: number, code: 'shard_lost' | 'unavailable', shardIds?: readonly string[]): void {
    const step = this.bench.steps.get(wave);
    const shardId = step?.shards[0]?.shardId;
    if (step === undefined || shardId === undefined) return;
    this.#endStep(step);
    this.bench.failStep(wave, code, shardIds ?? [shardId]);
  }

  check(): void {
    const owners = this.#ledger.owners();
    if (this.numUsedBlocks !== owners.size)
      throw new Error(`${this.numUsedBlocks} blocks are used, and ${owners.size} are in tables or behind fences`);
    const { numFences } = this.#manager;
    if (numFences !== this.#ledger.numFences) throw new Error(`${numFences}, not ${this.#ledger.numFences} fences`);
    for (const layer of this.#socket) this.#checkLate(layer, owners);
    for (const step of this.bench.steps.values()) {
      if (!this.#lease.allows(step.leaseTerm)) continue;
      const named = blocksNamed(step);
      if (new Set(named).size !== named.length) throw new Error(`a step names a block twice: ${named.join()}`);
      const originId = this.#originOf(step);
      for (const address of named) {
        if (!this.#shards.has(shardOf(address))) continue;
        const owner = owners.get(address);
        if (owner?.executorId !== OWN) throw new Error(`a step may write to ${address}, which is of ${nameOf(owner)}`);
        if (!this.#shards.takes(shardOf(address), originId))
          throw new Error(`${address} is refused to an executor that is registered`);
      }
    }
  }

  describe(): string {
    const requests = [...this.bench.executor.requests.all()].map((request) => {
      const { id, phase, numTableBlocks, isStarved, isExtending, isHeldBack, isInStep, isReleasePending } = request;
      return { id, phase, numTableBlocks, isStarved, isExtending, isHeldBack, isInStep, isReleasePending };
    });
    return JSON.stringify({ requests, status: this.#manager.status().shards, steps: this.bench.steps.size });
  }
}

const namedBy = new WeakMap<StepRequest, readonly string[]>();

/** Addresses of the blocks that the plans of a step name. */
function blocksNamed(step: StepRequest): readonly string[] {
  let named = namedBy.get(step);
  if (named === undefined) {
    named = step.shards.flatMap(({ shardId, plan }) => {
      const { blocks } = decodeStepPlan(plan.subarray(FRAME_HEADER_BYTES));
      return Array.from({ length: blocks.length / BLOCK_FIELDS }, (_, i) => `${shardId}/${blocks[i * BLOCK_FIELDS]}`);
    });
    namedBy.set(step, named);
  }
  return named;
}

const shardOf = (address: string): string => address.slice(0, address.indexOf('/'));
