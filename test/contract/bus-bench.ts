/**
 * Owns what tests of the bus share: a real nats-server for the file, and two connections to it for each test.
 */
import { Bus, ensureStreams } from '@lamina/bus';
import { STREAMS, type TokenMessage, type WorkItem } from '@lamina/protocol';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { afterAll, afterEach, beforeAll, beforeEach } from 'vitest';
import { connect } from './in-process.ts';

export const TIMEOUT = { timeoutMs: 2000 };
/** Shortest wait that a pull consumer takes. */
export const LEASE_MS = 1000;

export let nats: NatsServer;
export let client: Bus;
export let server: Bus;
/** What was reported to `server`. */
export let errors: { code: string; subject: string }[];

/** Call once in a file, before its tests. */
export function useBus(): void {
  beforeAll(async () => {
    nats = await startNatsServer();
  });
  afterAll(() => nats.stop());
  beforeEach(async () => {
    errors = [];
    client = await connect(nats.url);
    server = await Bus.connect(
      { url: nats.url, name: 'server', connectTimeoutMs: 5000 },
      { onError: ({ code }, subject) => errors.push({ code, subject }) },
    );
  });
  afterEach(async () => {
    await Promise.all([client.close(), server.close()]);
  });
}

export async function announce(
  bus: Bus = server,
  metadata: Record<string, string> = {},
  stats: unknown = null,
): Promise<void> {
  await bus.service.announce({ name: 'test-service', version: '0.1.0', description: '', metadata, stats: () => stats });
  await bus.flush();
}

export function workItem(id: string, overrides: Partial<WorkItem> = {}): WorkItem {
  return {
    id,
    model: 'm',
    tokenIds: [1, 2, 3],
    maxTokens: 5,
    sampling: { temperature: 0.5, topP: 0.9, topK: 0, minP: 0, seed: 7 },
    stop: ['x'],
    logprobs: null,
    ignoreEos: false,
    priority: 0,
    deadlineAtMs: null,
    encoding: 'json',
    submittedAtMs: 1,
    ...overrides,
  };
}

/** Where whoever knows its key publishes work. */
export async function workSubject(bus: Bus, requestId: string): Promise<string> {
  const manager = await bus.connection.jetstreamManager();
  const [subjects] = (await manager.streams.info(STREAMS.work.name)).config.subjects;
  return subjects!.replace('*', requestId);
}

/** Nobody may purge them. */
export async function renewStreams(bus: Bus): Promise<void> {
  const manager = await bus.connection.jetstreamManager();
  for (const { name } of Object.values(STREAMS)) await manager.streams.delete(name).catch(() => false);
  await ensureStreams(bus);
}

export async function numQueued(bus: Bus): Promise<number> {
  const manager = await bus.connection.jetstreamManager();
  return (await manager.streams.info(STREAMS.work.name)).state.messages;
}

export function token(id: string, index: number, finishReason: TokenMessage['finish_reason'] = null): TokenMessage {
  return { id, index, token: index + 10, text: `t${index}`, finish_reason: finishReason };
}
