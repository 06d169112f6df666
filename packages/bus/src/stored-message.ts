/**
 * Owns looking single messages up in a stream.
 */
import { LaminaError } from '@lamina/tensor';
import type { MsgRequest, StoredMsg } from 'nats';
import type { Bus } from './bus.ts';
import { isRefusedWith } from './jetstream-codes.ts';
import { streamManager } from './stream-manager.ts';

/**
 * The last message that a stream keeps on a subject.
 * @throws LaminaError `unavailable` when the stream cannot be read.
 */
export function lastMessage(bus: Bus, stream: string, subject: string): Promise<StoredMsg | undefined> {
  return storedMessage(bus, stream, { last_by_subj: subject });
}

/**
 * The message at a position of a stream.
 * @throws LaminaError `unavailable` when the stream cannot be read.
 */
export function messageAt(bus: Bus, stream: string, sequence: number): Promise<StoredMsg | undefined> {
  return storedMessage(bus, stream, { seq: sequence });
}

async function storedMessage(bus: Bus, stream: string, query: MsgRequest): Promise<StoredMsg | undefined> {
  try {
    const manager = await streamManager(bus);
    return await manager.streams.getMessage(stream, query);
  } catch (cause) {
    if (isRefusedWith(cause, 'noMessageFound')) return undefined;
    throw new LaminaError('unavailable', `the stream ${stream} cannot be read; is JetStream up?`, { cause });
  }
}

/** True when the server is sure that there is no such stream. */
export async function isStreamMissing(bus: Bus, stream: string): Promise<boolean> {
  try {
    const manager = await streamManager(bus);
    await manager.streams.info(stream);
    return false;
  } catch (cause) {
    return isRefusedWith(cause, 'streamNotFound');
  }
}
