import { ensureStreams, TokenStream } from '@lamina/bus';
import { STREAMS } from '@lamina/protocol';
import { describe, expect, test } from 'vitest';
import { client, server, token, useBus } from './bus-bench.ts';
import { store } from './store-answer.ts';

useBus();

describe('the streams', () => {
  test('streams are bounded, and many services may make them at once', async () => {
    const manager = await client.connection.jetstreamManager();
    for (const { name } of Object.values(STREAMS)) await manager.streams.delete(name).catch(() => false);
    await Promise.all([client, server, client, server].map(ensureStreams));
    for (const { name } of Object.values(STREAMS)) {
      const { config } = await manager.streams.info(name);
      expect(Math.max(config.max_msgs, config.max_bytes)).toBeGreaterThan(0);
      expect(config.storage).toBe('file');
    }
  });

  test('nobody purges a stream or deletes a message, also where the stream was made without that', async () => {
    const manager = await client.connection.jetstreamManager();
    for (const { name } of Object.values(STREAMS)) await manager.streams.delete(name).catch(() => false);
    await manager.streams.add({ name: STREAMS.tokens.name, subjects: [...STREAMS.tokens.subjects] });
    const tokens = new TokenStream(client, () => undefined);
    const sequence = await store(tokens, [token('kept', 0)]);
    await ensureStreams(client);
    for (const { name } of Object.values(STREAMS)) {
      await expect(manager.streams.purge(name)).rejects.toThrow(/purge not permitted/);
      await expect(manager.streams.deleteMessage(name, 1)).rejects.toThrow(/delete not permitted/);
      await expect(manager.streams.update(name, { deny_purge: false })).rejects.toThrow(/can not cancel deny purge/);
    }
    expect((await tokens.endOf('kept'))?.sequence).toBe(sequence);
  });
});
