/**
 * Owns what tests of the gateway share: a kv-manager that the test plays, token messages, an executor that the test plays.
 */
import { fileURLToPath } from 'node:url';
import type { Bus, TokenStream, WorkLease, WorkQueue } from '@lamina/bus';
import { ENDPOINTS, type KvStatus, SERVICE_NAMES, STREAMS, type TokenMessage } from '@lamina/protocol';
import { eventually } from './in-process.ts';
import { store } from './store-answer.ts';

const MODEL = fileURLToPath(new URL('../../models/lamina-tiny', import.meta.url));
const LAYOUT = { numLayers: 6, numHeads: 4, numKvHeads: 2, headDim: 32, scale: 0.25, blockSizeTokens: 16 } as const;

export const GATEWAY_FLAGS = ['--model', MODEL, '--http-port', '0'];
/** The cluster holds 512 tokens, less than the model's context of 1,024. */
export const READY: KvStatus = {
  managerEpoch: 'm',
  modelId: 'lamina-tiny',
  layout: { ...LAYOUT, kvDtype: 'f16' },
  executors: [{ executorId: 'e1', modelId: 'lamina-tiny' }],
  shards: [{ shardId: 's1', kernel: 'portable', budgetBytes: 1, numBlocks: 32, usedBlocks: 2, usedBlocksPeak: 2 }],
  numRequests: 0,
};

/** Announces `bus` as a kv-manager that says what `status` says at the time. */
export async function playKvManager(bus: Bus, status: () => KvStatus): Promise<void> {
  await bus.service.announce({
    name: SERVICE_NAMES['kv-manager'],
    version: '0.1.0',
    description: '',
    metadata: {},
    stats: () => null,
  });
  bus.service.serve(ENDPOINTS.kvStatus, status);
}

export const token = (id: string, index: number, finishReason: TokenMessage['finish_reason'] = null): TokenMessage => ({
  id,
  index,
  token: index + 5,
  text: `t${index}`,
  finish_reason: finishReason,
});

/** Plays an executor: answers with `count` tokens. */
export async function answerWith(tokens: TokenStream, work: WorkLease, count = 3): Promise<void> {
  const { id, encoding } = work.item;
  for (let index = 0; index < count; index++) {
    await store(tokens, [token(id, index, index === count - 1 ? 'length' : null)], encoding);
  }
  work.complete();
}

/** Plays an executor that takes an item whose request was ended while it waited. Returns the end. */
export async function dropEnded(queue: WorkQueue, tokens: TokenStream): Promise<TokenMessage> {
  const work = await eventually(() => queue.lease(1_000, () => undefined));
  const end = (await tokens.stored(work.item.id)).tokens.at(-1);
  if (end === undefined || end.finish_reason === null) throw new Error(`${work.item.id} has no end`);
  work.complete();
  return end;
}

/** Messages of a stream: those of LAMINA_WORK and LAMINA_PROMPTS are not done yet. */
export async function messagesIn(bus: Bus, stream: keyof typeof STREAMS): Promise<number> {
  const manager = await bus.connection.jetstreamManager();
  return (await manager.streams.info(STREAMS[stream].name)).state.messages;
}
