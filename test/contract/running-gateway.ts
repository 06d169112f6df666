/**
 * Owns a gateway over a real nats-server for tests that play its clients, the kv-manager and the executor.
 */
import { type Bus, TokenStream, type WorkLease, WorkQueue } from '@lamina/bus';
import { decodeTokens, type KvStatus, SUBJECTS, type TokenMessage } from '@lamina/protocol';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { afterAll, afterEach, beforeAll, beforeEach, expect } from 'vitest';
import { startGateway } from '../../services/gateway/src/service.ts';
import { answerWith, GATEWAY_FLAGS, messagesIn, playKvManager, READY } from './gateway-bench.ts';
import { connect, eventually, type InProcessService, startInProcess } from './in-process.ts';

export let nats: NatsServer;
export let bus: Bus;
export let gateway: InProcessService;
export let queue: WorkQueue;
export let tokens: TokenStream;
/** What the kv-manager says of itself, and how often it was asked. */
export const kv: { status: KvStatus; requests: number } = { status: READY, requests: 0 };

/** Call once in a file, before its tests. */
export function useGateway(): void {
  beforeAll(async () => {
    nats = await startNatsServer();
    bus = await connect(nats.url);
    await playKvManager(bus, () => {
      kv.requests++;
      return kv.status;
    });
  });
  afterAll(async () => {
    await bus.close();
    await nats.stop();
  });
  beforeEach(async () => {
    kv.status = READY;
    kv.requests = 0;
    await start();
  });
  afterEach(async () => {
    await gateway.stop();
    expect(await workMessages()).toBe(0);
  });
}

export async function start(flags: readonly string[] = []): Promise<void> {
  gateway = await startInProcess('gateway', startGateway, nats.url, [...GATEWAY_FLAGS, ...flags]);
  queue = new WorkQueue(bus);
  tokens = new TokenStream(bus, () => undefined);
}

/** The same with other flags. */
export async function restart(flags: readonly string[]): Promise<void> {
  await gateway.stop();
  await start(flags);
}

export interface Client {
  readonly messages: TokenMessage[];
  readonly bodies: Uint8Array[];
  readonly isFinal: () => boolean;
  readonly final: () => Promise<TokenMessage>;
}

/** An ordinary client: a body and a reply subject. */
export function ask(body: Uint8Array | object | string): Client {
  const data = body instanceof Uint8Array ? body : Buffer.from(typeof body === 'string' ? body : JSON.stringify(body));
  const messages: TokenMessage[] = [];
  const bodies: Uint8Array[] = [];
  let finals = 0;
  const subscription = bus.requestStream(SUBJECTS.generate, data, (reply) => {
    if (reply === undefined) throw new Error('no gateway');
    bodies.push(reply.data);
    messages.push(...decodeTokens(reply.data));
    if (reply.header('Lamina-Final') === 'true') finals++;
  });
  return {
    messages,
    bodies,
    isFinal: () => finals > 0,
    final: async () => {
      await eventually(() => (finals > 0 ? true : undefined));
      await bus.flush();
      subscription.unsubscribe();
      expect(finals).toBe(1);
      return messages.at(-1)!;
    },
  };
}

export function lease(): Promise<WorkLease> {
  return eventually(() => queue.lease(1_000, () => undefined));
}

export const answer = (work: WorkLease, count?: number): Promise<void> => answerWith(tokens, work, count);
export const openRequests = (): number => Object(gateway.running.stats?.()).openRequests;
export const workMessages = (): Promise<number> => messagesIn(bus, 'work');
