/** What the executor asks the kv-manager over a real nats-server, with a kv-manager that answers what the test says. */
import type { Bus } from '@lamina/bus';
import { ENDPOINTS, type ExecutorHeartbeatReply } from '@lamina/protocol';
import { createLogger } from '@lamina/runtime';
import { LaminaError } from '@lamina/tensor';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest';
import { KvClient, type KvEvents } from '../../services/dense-executor/src/kv-client.ts';
import { KvLease } from '../../services/dense-executor/src/kv-lease.ts';
import { connect, eventually } from './in-process.ts';

const SPEC = { numLayers: 1, numHeads: 1, numKvHeads: 1, headDim: 8, scale: 1 };
const HEARTBEAT_MS = 50;
const TIMEOUT_MS = 400;
const REQUEST_TIMEOUT_MS = 150;

let nats: NatsServer;
let managerBus: Bus;
let bus: Bus;
let client: KvClient;
let lease: KvLease;
/** What the kv-manager was asked, in order. */
let asked: string[];
let events: string[];
/** Answers of the kv-manager; `silence` is none. */
let answer: { heartbeat: Partial<ExecutorHeartbeatReply>; free: 'ok' | 'silence'; allocate: 'ok' | 'overloaded' };
let isSilent: boolean;
/** Origins of every heartbeat, and whether the lease was held when it came. */
let beats: { originIds: readonly number[]; holdsLease: boolean }[];
let originIds: number[];

const never = new Promise<never>(() => undefined);

beforeAll(async () => {
  nats = await startNatsServer();
});
afterAll(() => nats.stop());

beforeEach(async () => {
  asked = [];
  events = [];
  answer = { heartbeat: {}, free: 'ok', allocate: 'ok' };
  isSilent = false;
  beats = [];
  originIds = [1, 2];
  [managerBus, bus] = await Promise.all([connect(nats.url), connect(nats.url)]);
  await managerBus.service.announce({ name: 'kv', version: '0.0.1', description: '', metadata: {}, stats: () => null });
  managerBus.service.serve(ENDPOINTS.executorHeartbeat, (body) => {
    beats.push({ originIds: body.originIds, holdsLease: lease.isHeld });
    return isSilent
      ? never
      : {
          managerEpoch: 'm1',
          layout: { ...SPEC, blockSizeTokens: 16, kvDtype: 'f32' },
          heartbeatIntervalMs: HEARTBEAT_MS,
          heartbeatTimeoutMs: TIMEOUT_MS,
          registration: 1,
          voidRequestIds: [],
          takenOverRequestIds: [],
          ...answer.heartbeat,
        };
  });
  managerBus.service.serve(ENDPOINTS.allocate, ({ requestId, deliveryCount }) => {
    asked.push(`allocate ${requestId} ${deliveryCount}`);
    if (answer.allocate === 'overloaded') throw new LaminaError('overloaded', 'full');
    return { managerEpoch: 'm1', blocks: [{ shardId: 's', block: 1 }] };
  });
  managerBus.service.serve(ENDPOINTS.free, ({ requestId }) => {
    asked.push(`free ${requestId}`);
    return answer.free === 'silence' ? never : {};
  });
  await managerBus.flush();
  lease = new KvLease();
  const log =
    (event: string) =>
    (about: unknown): void =>
      void events.push(`${event} ${JSON.stringify(about)}`);
  const listener: KvEvents = {
    onTablesVoid: () => void events.push('tablesVoid'),
    onRequestsVoid: log('void'),
    onRequestsTakenOver: log('takenOver'),
    onShardLost: log('shardLost'),
    onCapacityFreed: log('capacityFreed'),
    onLeaseRenewed: () => void events.push('leaseRenewed'),
  };
  client = new KvClient(
    {
      bus,
      executorId: 'e1',
      modelId: 'm',
      spec: SPEC,
      requestTimeoutMs: REQUEST_TIMEOUT_MS,
      lease,
      origins: {
        get originIds() {
          return originIds;
        },
        renewOrigins: () => {
          originIds = originIds.map((originId) => originId + 10);
          events.push('originsRenewed');
        },
      },
      log: createLogger({ level: 'silent', service: 'dense-executor', instance: 'test' }),
      fail: () => undefined,
    },
    listener,
  );
  await client.register();
});
afterEach(async () => {
  await client.stop();
  await Promise.all([bus.close(), managerBus.close()]);
});

const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

test('a free that is not confirmed is asked again until it is, and then no more', async () => {
  await client.allocate('r', 10, 10, 1, 1);
  answer.free = 'silence';
  await client.free('r');
  await eventually(() => (asked.filter((call) => call === 'free r').length >= 3 ? true : undefined));
  answer.free = 'ok';
  await sleep(REQUEST_TIMEOUT_MS + 4 * HEARTBEAT_MS);
  const numFrees = asked.length;
  await sleep(4 * HEARTBEAT_MS);
  expect(asked).toHaveLength(numFrees);
});

test.each([
  ['before', 0],
  ['after', REQUEST_TIMEOUT_MS + 20],
])('a free whose confirmation is lost never hits a table that is allocated %s that is known', async (_, waitMs) => {
  await client.allocate('r', 10, 10, 1, 1);
  answer.free = 'silence';
  const freed = client.free('r');
  await sleep(waitMs);
  await client.allocate('r', 10, 10, 2, 1);
  await freed;
  answer.free = 'ok';
  await sleep(4 * HEARTBEAT_MS + REQUEST_TIMEOUT_MS);
  expect(asked.lastIndexOf('free r')).toBeLessThan(asked.indexOf('allocate r 2'));
});

test('a refused allocate leaves an open free open', async () => {
  await client.allocate('r', 10, 10, 1, 1);
  answer.free = 'silence';
  const freed = client.free('r');
  answer.allocate = 'overloaded';
  await expect(client.allocate('r', 10, 10, 1, 1)).rejects.toMatchObject({ code: 'overloaded' });
  await freed;
  await eventually(() => (asked.filter((call) => call === 'free r').length >= 2 ? true : undefined));
});

test('the lease ends with the time-out of the last answered heartbeat, and its renewal is said', async () => {
  expect(client.holdsLease).toBe(true);
  await sleep(2 * TIMEOUT_MS);
  expect(client.holdsLease).toBe(true);
  isSilent = true;
  const silentAtMs = performance.now();
  await eventually(() => (client.holdsLease ? undefined : true));
  expect(performance.now() - silentAtMs).toBeLessThan(TIMEOUT_MS + HEARTBEAT_MS + 100);
  expect(new KvLease(lease.shared).isHeld).toBe(false);
  const { leaseTerm } = client;
  events.length = 0;
  isSilent = false;
  await eventually(() => (events.includes('leaseRenewed') ? true : undefined));
  expect(client.holdsLease).toBe(true);
  // What was formed before must not write any more.
  expect(lease.allows(leaseTerm)).toBe(false);
  expect(lease.allows(client.leaseTerm)).toBe(true);
});

test('tables that are void, lost or taken over are told apart', async () => {
  answer.heartbeat = { voidRequestIds: ['a'], takenOverRequestIds: ['b'] };
  await eventually(() => (events.length >= 2 ? true : undefined));
  expect(events.slice(0, 3).filter((event) => event !== 'leaseRenewed')).toEqual(['void ["a"]', 'takenOver ["b"]']);
  events.length = 0;
  answer.heartbeat = { registration: 2, voidRequestIds: ['a'] };
  await eventually(() => (events.includes('tablesVoid') ? true : undefined));
  expect(events.filter((event) => event.startsWith('void')).length).toBeLessThan(2);
});

test('an executor that was lost takes other origins, and holds no lease before the kv-manager knows them', async () => {
  expect(beats.every(({ originIds }) => originIds.join() === '1,2')).toBe(true);
  const { leaseTerm } = client;
  beats.length = 0;
  events.length = 0;
  answer.heartbeat = { registration: 2 };
  await eventually(() => (beats.length >= 3 ? true : undefined));
  // The lease would have been held for long; none of it is left when the other origins are named.
  expect(beats.slice(0, 3)).toEqual([
    { originIds: [1, 2], holdsLease: true },
    { originIds: [11, 12], holdsLease: false },
    { originIds: [11, 12], holdsLease: true },
  ]);
  expect(events).toEqual(['originsRenewed', 'tablesVoid', 'leaseRenewed']);
  expect(lease.allows(leaseTerm)).toBe(false);
  expect(lease.allows(client.leaseTerm)).toBe(true);
});
