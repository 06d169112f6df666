/**
 * Owns the wiring of the kv-manager: endpoints, events, the one timer, metrics.
 *
 * Invariants
 * 1. The state machine is synchronous and there is one of it, so every operation is atomic.
 * 2. The timer runs only while somebody is registered.
 * 3. Time in which this process was stalled or cut off from NATS is nobody's silence.
 */
import { ENDPOINTS, type Endpoint, EVENTS } from '@lamina/protocol';
import { Counter, createInstanceId, Gauge, type RunningService, type ServiceContext } from '@lamina/runtime';
import { asLaminaError, LaminaError } from '@lamina/tensor';
import { KvManager } from './kv-manager.ts';
import { Suspicions } from './suspicions.ts';

export type KvManagerContext = Pick<ServiceContext, 'config' | 'bus' | 'log' | 'registry'>;

const MAX_TICK_MS = 1000;

export async function startKvManager(context: KvManagerContext): Promise<RunningService> {
  const { config, bus, log } = context;
  const { heartbeatIntervalMs, heartbeatTimeoutMs } = config;
  if (heartbeatTimeoutMs < 2 * heartbeatIntervalMs)
    throw new LaminaError(
      'config_invalid',
      `LAMINA_HEARTBEAT_TIMEOUT_MS (${heartbeatTimeoutMs}) must be at least twice LAMINA_HEARTBEAT_INTERVAL_MS (${heartbeatIntervalMs})`,
    );
  const nowMs = (): number => performance.now();
  const manager = new KvManager({
    managerEpoch: createInstanceId('epoch'),
    blockSizeTokens: config.blockSizeTokens,
    kvDtype: config.kvDtype,
    spreadAboveTokens: config.spreadAboveTokens,
    heartbeatIntervalMs,
    heartbeatTimeoutMs,
    nowMs,
    events: {
      onShardLost: (shardId) => bus.publishEvent(EVENTS.shardLost, { shardId }),
      onCapacityFreed: (freeBlocks) => bus.publishEvent(EVENTS.capacityFreed, { freeBlocks }),
      onNote: (text, facts) => log.info(facts, text),
    },
  });

  const tickMs = Math.min(MAX_TICK_MS, Math.ceil(heartbeatTimeoutMs / 4));
  let timer: NodeJS.Timeout | undefined;
  let tickedAtMs = 0;
  let isConnected = true;
  const tick = (): void => {
    const wasStalled = nowMs() - tickedAtMs > 2 * tickMs;
    tickedAtMs = nowMs();
    if (!isConnected || wasStalled) manager.forgiveSilence();
    manager.tick();
    if (!manager.isEmpty) return;
    clearInterval(timer);
    timer = undefined;
  };
  const arm = (): void => {
    if (timer !== undefined) return;
    tickedAtMs = nowMs();
    timer = setInterval(tick, tickMs);
  };
  bus.onStatus((type) => {
    if (type === 'disconnect') isConnected = false;
    if (type !== 'reconnect') return;
    isConnected = true;
    manager.forgiveSilence();
  });

  const refusals = new Counter({
    name: 'lamina_kv_refused_total',
    help: 'Control-plane requests that the kv-manager refused',
    labelNames: ['code'],
    registers: [context.registry],
  });
  registerGauges(context, manager);
  const serve = <Request, Reply>(
    endpoint: Endpoint<Request, Reply>,
    handle: (body: Request) => Reply | Promise<Reply>,
  ): void =>
    bus.service.serve(endpoint, (body) => {
      try {
        return handle(body);
      } catch (cause) {
        const error = asLaminaError(cause);
        refusals.inc({ code: error.code });
        log.debug({ subject: endpoint.subject, code: error.code, reason: error.message }, 'refused');
        throw cause;
      }
    });

  const { managerEpoch } = manager.status();
  serve(ENDPOINTS.executorHeartbeat, (body) => {
    const reply = manager.executorHeartbeat(body);
    arm();
    return reply;
  });
  serve(ENDPOINTS.executorLeave, ({ executorId }) => {
    manager.executorLeave(executorId);
    return {};
  });
  serve(ENDPOINTS.shardHeartbeat, (body) => {
    const reply = manager.shardHeartbeat(body);
    if (!manager.isEmpty) arm();
    return reply;
  });
  serve(ENDPOINTS.shardLeave, ({ shardId }) => {
    manager.removeShard(shardId, 'shard left');
    return {};
  });
  const suspicions = new Suspicions(bus, manager);
  serve(ENDPOINTS.suspectShard, async ({ shardId }) => ({ isLost: await suspicions.isLost(shardId) }));
  serve(ENDPOINTS.allocate, (body) => ({ managerEpoch, blocks: manager.allocate(body) }));
  serve(ENDPOINTS.extend, (body) => ({ managerEpoch, blocks: manager.extend(body) }));
  serve(ENDPOINTS.trim, (body) => {
    manager.trim(body);
    return {};
  });
  serve(ENDPOINTS.free, ({ requestId, executorId }) => {
    manager.free(requestId, executorId);
    return {};
  });
  serve(ENDPOINTS.kvStatus, () => manager.status());
  await bus.flush();

  return {
    stats: () => {
      const { numRequests, shards } = manager.status();
      return { numRequests, shards };
    },
    stop: () => {
      clearInterval(timer);
      return Promise.resolve();
    },
  };
}

/** Read when they are scraped; nothing is counted on the way. */
function registerGauges({ registry }: KvManagerContext, manager: KvManager): void {
  const byShard = (name: string, help: string, value: (pool: KvManager['pools'][number]) => number): void => {
    const gauge: Gauge<'shard'> = new Gauge({
      name,
      help,
      labelNames: ['shard'],
      registers: [registry],
      collect: () => {
        gauge.reset();
        for (const pool of manager.pools) gauge.set({ shard: pool.shardId }, value(pool));
      },
    });
  };
  byShard('lamina_kv_blocks_used', 'KV blocks of a shard that are in a block table', (pool) => pool.usedBlocks);
  byShard('lamina_kv_blocks_used_peak', 'Most KV blocks of a shard in use at a time', (pool) => pool.usedBlocksPeak);
  byShard('lamina_kv_blocks_total', 'KV blocks of a shard', (pool) => pool.numBlocks);
  const requests: Gauge = new Gauge({
    name: 'lamina_kv_requests',
    help: 'Requests that have a live block table',
    registers: [registry],
    collect: () => requests.set(manager.numRequests),
  });
  const fences: Gauge = new Gauge({
    name: 'lamina_kv_fences',
    help: 'Executors that are no more and whose blocks wait until the shards refuse them',
    registers: [registry],
    collect: () => fences.set(manager.numFences),
  });
}
