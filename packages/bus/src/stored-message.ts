/**
 * Owns looking single messages up in a stream.
 */
import { LaminaError } from '@lamina/tensor';
import { type MsgRequest, NatsError, type StoredMsg } from 'nats';
import type { Bus } from './bus.ts';
import { streamManager } from './stream-manager.ts';

const NO_MESSAGE_ERROR_CODE = 10037;
const STREAM_NOT_FOUND_ERROR_CODE = 10059;

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
    if (cause instanceof NatsError && cause.api_error?.err_code === NO_MESSAGE_ERROR_CODE) return undefined;
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
    return cause instanceof NatsError && cause.api_error?.err_code === STREAM_NOT_FOUND_ERROR_CODE;
  }
}
